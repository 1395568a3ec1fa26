import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline

from diffgen.pipelines import APG, CFG, guide
from diffgen.pipelines.base import Guidance
from diffgen.tiny import call_kwargs, tiny_pipeline

quiet = pytest.mark.filterwarnings("ignore:.*guidance-distilled")


@pytest.fixture
def sd3(scene):
    return scene("StableDiffusion3Pipeline")


def test_a_rule_holds_inside_its_with_block_and_no_longer(sd3):
    stock, default = sd3.run(), sd3.run(sd3.call)
    with guide(sd3.pipe, CFG(4.0)):
        assert torch.equal(sd3.run(sd3.call), stock)
    assert torch.equal(sd3.run(sd3.call), default)
    assert type(sd3.pipe) is StableDiffusion3Pipeline
    assert "_guidance_run" not in vars(sd3.pipe)


def test_an_exception_in_the_block_takes_the_rule_off(sd3):
    with pytest.raises(KeyError), guide(sd3.pipe, CFG(4.0)):
        raise KeyError
    assert type(sd3.pipe) is StableDiffusion3Pipeline


def test_without_a_with_block_a_rule_stays_until_it_is_replaced_or_taken_off(sd3):
    default = sd3.run(sd3.call)
    run = guide(sd3.pipe, CFG(4.0))
    four = sd3.run(sd3.call)
    assert run.nfe == 6
    guide(sd3.pipe, CFG(2.0))
    two = sd3.run(sd3.call)
    assert guide(sd3.pipe, None) is None
    assert torch.equal(four, sd3.run())
    assert not torch.equal(two, four)
    assert torch.equal(sd3.run(sd3.call), default)
    guide(sd3.pipe, None)  # twice is no error


def test_an_inner_rule_replaces_the_outer_until_its_block_ends(sd3):
    with guide(sd3.pipe, CFG(4.0)):
        outer = sd3.run(sd3.call)
        with guide(sd3.pipe, CFG(2.0)):
            assert not torch.equal(sd3.run(sd3.call), outer)
            with guide(sd3.pipe, CFG(3.0)):
                pass
            assert torch.equal(sd3.run(sd3.call), sd3.run({**sd3.call, "guidance_scale": 2.0}))
        assert torch.equal(sd3.run(sd3.call), outer)
    assert type(sd3.pipe) is StableDiffusion3Pipeline


def test_a_run_can_be_entered_again(sd3):
    run = guide(sd3.pipe, CFG(4.0))
    with run:
        first = sd3.run(sd3.call)
    assert type(sd3.pipe) is StableDiffusion3Pipeline
    with run:
        assert torch.equal(sd3.run(sd3.call), first)
    assert type(sd3.pipe) is StableDiffusion3Pipeline


def test_a_guidance_scale_in_the_call_takes_the_rules_place_for_that_call(sd3):
    with guide(sd3.pipe, CFG(4.0)) as run:
        four = sd3.run(sd3.call)
        two = sd3.run({**sd3.call, "guidance_scale": 2.0})
        assert torch.equal(sd3.run(sd3.call), four)
        sd3.run({**sd3.call, "guidance_scale": 1.0})
        assert run.nfe == 3  # 1 is conditional only
    assert torch.equal(two, sd3.run({**sd3.call, "guidance_scale": 2.0}))
    assert run.rule.scale == 4.0


def test_positional_arguments_and_scales_that_count_from_0_are_understood(scene):
    s = scene("ZImagePipeline")
    s.call["prompt"] = prompt = "a red circle"
    s.call["negative_prompt"] = "green"
    stock = s.run({**s.call, "guidance_scale": 2.5})
    with guide(s.pipe, CFG(9.0)):
        rest = {k: v for k, v in s.call.items() if k != "prompt"}
        guided = s.pipe(prompt, **rest, guidance_scale=2.5, generator=torch.Generator().manual_seed(0))[0]
    torch.testing.assert_close(guided, stock, rtol=1e-4, atol=1e-4)


@quiet
def test_run_nfe_counts_evaluations_per_sample_of_the_last_call(scene):
    s = scene("FluxPipeline")
    with guide(s.pipe, CFG(4.0)) as run:
        assert run.nfe == 0
        s.run(s.call)
        assert run.nfe == 6
        s.run({**s.call, "num_inference_steps": 2})
        assert run.nfe == 4


# --- classes, saving, copying ------------------------------------------------------------------------------------


def test_a_guided_pipeline_is_still_an_instance_of_its_class_with_its_name(sd3):
    with guide(sd3.pipe, APG(4.0)):
        assert isinstance(sd3.pipe, StableDiffusion3Pipeline)
        assert type(sd3.pipe).__name__ == "StableDiffusion3Pipeline"
        assert type(sd3.pipe).__module__ == StableDiffusion3Pipeline.__module__
        assert "transformer" in sd3.pipe.components


def test_a_pipeline_saved_under_guidance_has_the_original_class_and_reloads(scene, tmp_path):
    s = scene("StableDiffusionXLPipeline")
    stock = s.run()
    with guide(s.pipe, CFG(4.0)):
        s.pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert "guidance" not in str(index)
    s.pipe = DiffusionPipeline.from_pretrained(tmp_path)
    s.pipe.set_progress_bar_config(disable=True)
    assert type(s.pipe) is StableDiffusionXLPipeline
    assert torch.equal(s.run(), stock)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["copy", "pickle"]
)
def test_a_copied_or_pickled_pipeline_is_guided_on_its_own(copied, sd3):
    guided = sd3.run()
    sd3 = type(sd3)(sd3.name)  # transformers' models can't be pickled once they have run
    with guide(sd3.pipe, CFG(4.0)):
        original, sd3.pipe = sd3.pipe, copied(sd3.pipe)
    assert type(original) is StableDiffusion3Pipeline
    assert isinstance(sd3.pipe, StableDiffusion3Pipeline)
    assert torch.equal(sd3.run(sd3.call), guided)
    guide(sd3.pipe, None)
    assert type(sd3.pipe) is StableDiffusion3Pipeline
    assert sd3.pipe.transformer is not original.transformer


def test_a_shallow_copy_and_a_pipeline_made_from_a_guided_one_work(sd3):
    from diffusers import AutoPipelineForImage2Image

    with guide(sd3.pipe, CFG(4.0)):
        guided = sd3.run(sd3.call)
        other = AutoPipelineForImage2Image.from_pipe(sd3.pipe)
        original, sd3.pipe = sd3.pipe, copy.copy(sd3.pipe)
        assert torch.equal(sd3.run(sd3.call), guided)
    assert other.transformer is original.transformer
    assert type(other).__name__ == "StableDiffusion3Img2ImgPipeline"


def test_guide_is_the_function_whatever_was_imported_first():
    code = "import diffgen.pipelines.{0}; from diffgen.pipelines import guide, check; assert callable(guide), guide; "
    code += (
        "assert callable(check), check; import diffgen; assert diffgen.guide is guide; assert diffgen.check is check"
    )
    subprocess.run([sys.executable, "-c", code.format("guide")], check=True)


# --- refusals and warnings ---------------------------------------------------------------------------------------


def test_flux_warns_that_its_guidance_is_distilled_and_gets_an_empty_negative_prompt(scene):
    s = scene("FluxPipeline")
    del s.call["negative_prompt"]
    stock = s.run({**s.call, "true_cfg_scale": 4.0, "negative_prompt": ""})
    with pytest.warns(
        UserWarning, match="transformer is guidance-distilled .* CFG guides on top of it, as true CFG does"
    ) as caught:
        run = guide(s.pipe, CFG(4.0))
    assert caught[0].filename == __file__
    assert torch.equal(s.run(s.call), stock)
    assert run.nfe == 6
    s.run({**s.call, "guidance_scale": 1.5})  # the embedded one: not the rule's
    assert run.nfe == 6
    assert not torch.equal(s.run({**s.call, "negative_prompt": "green"}), stock)
    conditional = s.run({**s.call, "true_cfg_scale": 1.0})
    assert run.nfe == 3
    guide(s.pipe, None)
    assert torch.equal(s.run(s.call), conditional)
    assert type(s.pipe) is FluxPipeline


def test_flux_without_guidance_embeds_does_not_warn(scene, recwarn):
    s = scene("FluxPipeline", guidance_embeds=False)
    guide(s.pipe, CFG(4.0))
    assert not [w for w in recwarn if "guidance" in str(w.message)]


def test_a_unet_distilled_like_lcm_is_refused(scene):
    s = scene("StableDiffusionPipeline")
    s.pipe.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ValueError, match=r"unet is guidance-distilled \(time_cond_proj_dim is set, as in LCM\)"):
        guide(s.pipe, CFG(4.0))
    assert "_guidance_run" not in vars(s.pipe)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "LTXPipeline"])
def test_the_pipelines_own_rescale_works_under_guide(name, scene):
    s = scene(name)
    stock = s.run(guidance_rescale=0.7)
    with guide(s.pipe, CFG(4.0)):
        assert torch.equal(s.run({**s.call, "guidance_rescale": 0.7}), stock)


def test_the_second_experts_scale_works_under_guide(scene):
    s = scene("WanPipeline", two_experts=True)
    stock = s.run(guidance_scale_2=2.0)
    assert not torch.equal(stock, s.run())
    with guide(s.pipe, CFG(4.0)):
        assert torch.equal(s.run({**s.call, "guidance_scale_2": 2.0}), stock)
        assert torch.equal(s.run(s.call), s.run(s.call))


@pytest.mark.parametrize("rule", [4.0, "CFG", CFG])
def test_something_that_is_no_rule_is_refused(rule, sd3):
    with pytest.raises(TypeError, match=r"rule must be a Guidance such as CFG\(scale=4\) or APG\(scale=10\), got"):
        guide(sd3.pipe, rule)
    assert type(sd3.pipe) is StableDiffusion3Pipeline


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0, 1e6, "7", None])
def test_a_bad_scale_is_an_error_that_names_rule_and_field(scale):
    with pytest.raises(ValueError, match=r"CFG\.scale must be a number in \[0, 1000\], got"):
        CFG(scale)


def test_the_base_class_guides_nothing_and_wants_all():
    with pytest.raises(NotImplementedError):
        Guidance()(None, None, None)
    assert Guidance().wants_uncond(None) is True
    assert APG(4.0, eta=0.3).with_scale(2.0) == APG(2.0, eta=0.3)


def test_a_pipeline_that_never_ran_cfg_says_so_and_does_not_ignore_the_rule():
    """Embedded guidance under the name guidance_scale, in a class that the table does not know."""
    from diffusers import FluxPipeline

    pipe = tiny_pipeline("FluxPipeline", guidance_embeds=True)
    pipe.__class__ = type("MyFlux", FluxPipeline.__mro__[1:], {"__call__": _embedded_only})
    with pytest.raises(ValueError, match=r"guidance-distilled .* has no true_cfg_scale"):
        guide(pipe, CFG(4.0))


def _embedded_only(self, prompt=None, guidance_scale=3.5):
    raise AssertionError("never called")


def test_a_scale_below_one_is_refused_because_pipelines_would_ignore_it():
    pipe = tiny_pipeline("StableDiffusionPipeline")
    with guide(pipe, CFG(0.5)), pytest.raises(ValueError, match=r"scale 0.5: pipelines run no CFG below 1"):
        pipe("a red circle", num_inference_steps=1, output_type="latent", **call_kwargs("StableDiffusionPipeline"))


def test_rules_put_on_one_after_another_leave_no_trail_and_the_pipeline_is_freed(scene):
    import gc
    import weakref

    s = scene("StableDiffusion3Pipeline")
    runs = [guide(s.pipe, CFG(4.0)) for _ in range(5)]
    assert [run._previous is None for run in runs] == [True, True, True, True, False]
    assert runs[-1]._previous is runs[-2]
    gone, pipe = weakref.ref(s.pipe), s.__dict__.pop("pipe")
    gc.disable()
    try:
        del pipe, runs
        assert gone() is None  # by counting alone: nothing refers to it in a circle
    finally:
        gc.enable()


def test_blocks_left_in_another_order_and_entered_twice_leave_the_pipeline_as_it_was(sd3):
    first, second = guide(sd3.pipe, CFG(4.0)), guide(sd3.pipe, CFG(5.0))
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert vars(sd3.pipe)["_guidance_run"] is second
    second.__exit__()
    assert type(sd3.pipe) is StableDiffusion3Pipeline
    with guide(sd3.pipe, CFG(4.0)) as run:
        with run:
            pass
        assert vars(sd3.pipe)["_guidance_run"] is run
    assert type(sd3.pipe) is StableDiffusion3Pipeline


@pytest.mark.parametrize("scale", ["7", [4.0], True, float("nan")])
def test_a_scale_in_the_call_that_is_no_number_is_named(scale, sd3):
    with guide(sd3.pipe, CFG(4.0)), pytest.raises(ValueError, match="guidance_scale must be a finite number, got"):
        sd3.run({**sd3.call, "guidance_scale": scale})
