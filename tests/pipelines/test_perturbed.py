import math

import pytest
import torch

from diffgen.pipelines import APG, CFG, PAG, SEG, SLG, AdaptiveGuidance, AutoGuidance, guide
from diffgen.pipelines.perturbed import blocks, blur, chosen, skip_blocks
from diffgen.samplers import log_prob
from diffgen.table import denoisers
from diffgen.tiny import TINY, tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:.*guidance-distilled")
EVERYWHERE: dict = {"start": 0.0, "stop": 1.0}


def untouched(pipe):
    return all("forward" not in vars(part) for module in denoisers(pipe).values() for part in module.modules())


# --- what the libraries have -------------------------------------------------------------------------------------


def test_pag_is_diffusers_own_pag_pipeline(scene):
    """StableDiffusionPAGPipeline predicts [u, c, perturbed] in one call: u + w (c - u) + s (c - p)."""
    from diffusers import StableDiffusionPAGPipeline

    s = scene("StableDiffusionPipeline")
    theirs = StableDiffusionPAGPipeline(**s.pipe.components, pag_applied_layers="mid", requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    processors = dict(s.pipe.unet.attn_processors)
    want = theirs(**s.arguments, pag_scale=2.0, generator=torch.Generator().manual_seed(0))[0]
    s.pipe.unet.set_attn_processor(processors)
    with guide(s.pipe, PAG(CFG(4.0), strength=2.0)) as run:
        torch.testing.assert_close(s.run(s.call), want, rtol=1e-4, atol=1e-4)
    assert run.nfe == 9


def test_slg_is_sd3s_own_skip_guidance_layers(scene):
    s = scene("StableDiffusion3Pipeline")
    window = {"skip_layer_guidance_start": 0.01, "skip_layer_guidance_stop": 0.9, "skip_layer_guidance_scale": 2.0}
    want = s.run(skip_guidance_layers=[1], **window)
    assert not torch.equal(want, s.run())
    with guide(s.pipe, SLG(CFG(4.0), strength=2.0, layers=[1], start=0.01, stop=0.9)) as run:
        torch.testing.assert_close(s.run(s.call), want, rtol=1e-4, atol=1e-4)
    assert run.nfe == 8  # two guided steps of three: not the very first


@pytest.mark.parametrize("name", ["WanPipeline", "LTXPipeline", "PixArtSigmaPipeline"])
def test_skipped_blocks_are_diffusers_layer_skip_hook(name, scene):
    """The altered prediction itself, against apply_layer_skip on the same call.

    Only blocks with one output: diffusers 0.42.1 hands on (hidden, text) whatever the block's own order, which breaks SD3.
    """
    from contextlib import contextmanager

    from diffusers.hooks import HookRegistry, LayerSkipConfig
    from diffusers.hooks.layer_skip import apply_layer_skip

    @contextmanager
    def theirs(module):
        apply_layer_skip(module, LayerSkipConfig([0], fqn="blocks" if name == "WanPipeline" else "transformer_blocks"))
        try:
            yield module
        finally:
            HookRegistry.check_if_exists_or_initialize(module).remove_hook("layer_skip_hook", recurse=True)

    seen = {}

    class Spy(SLG):
        def extra(self, step):
            return {"ours": skip_blocks((0,)), "theirs": theirs}

        def __call__(self, cond, uncond, step):
            seen.update(step.extra, cond=cond)
            return cond

    s = scene(name)
    with guide(s.pipe, Spy(4.0, **EVERYWHERE)):
        s.run(s.call)
    assert torch.equal(seen["ours"], seen["theirs"])
    assert not torch.allclose(seen["ours"], seen["cond"], rtol=1e-3, atol=1e-3)


# --- everywhere --------------------------------------------------------------------------------------------------

RULES = {
    "slg": lambda: SLG(4.0, **EVERYWHERE),
    "pag": lambda: PAG(4.0),
    "seg": lambda: SEG(4.0),
    "autoguidance": lambda: AutoGuidance(4.0),
}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("rule", RULES)
def test_it_guides_every_pipeline_or_says_why_not(name, rule, scene):
    s = scene(name)
    stock = s.run()
    with guide(s.pipe, RULES[rule]()) as run:
        if (name, rule) == ("SanaPipeline", "pag"):
            with pytest.raises(ValueError, match=r"PAG found no attention map to replace .*\(linear attention"):
                s.run(s.call)
        else:
            guided = s.run(s.call)
            assert torch.isfinite(guided).all()
            assert not torch.allclose(guided, stock, rtol=1e-2, atol=1e-2)
            assert run.nfe == (6 if rule == "autoguidance" else 9)
    assert untouched(s.pipe)
    assert torch.equal(s.run(), stock)


@pytest.mark.parametrize("rule", [PAG, SEG, SLG])
def test_without_strength_it_is_the_inner_rule_and_costs_nothing(rule, scene):
    s = scene("StableDiffusion3Pipeline")
    with guide(s.pipe, rule(APG(4.0), strength=0.0)) as run:
        guided = s.run(s.call)
    assert run.nfe == 6
    with guide(s.pipe, APG(4.0)):
        assert torch.equal(s.run(s.call), guided)


def test_without_cfg_the_unconditional_prediction_is_left_out(scene):
    """c + s (c - c_perturbed), the form of both papers' unconditional experiments."""
    for name in ("StableDiffusion3Pipeline", "FluxPipeline"):
        s = scene(name)
        with guide(s.pipe, PAG(1.0)) as run:
            guided = s.run({k: v for k, v in s.call.items() if k != "negative_prompt"})
        assert run.nfe == 6
        assert not torch.allclose(guided, s.run(s.plain), rtol=1e-2, atol=1e-2)


def test_it_acts_in_its_window_only(scene):
    s = scene("StableDiffusion3Pipeline")
    for window, nfe in (((0.0, 0.3), 7), ((0.3, 1.0), 8), ((0.6, 1.0), 7)):
        with guide(s.pipe, PAG(4.0, start=window[0], stop=window[1])) as run:
            s.run(s.call)
        assert run.nfe == nfe


def test_adaptive_guidance_around_it_drops_both_further_calls(scene):
    s = scene("StableDiffusion3Pipeline")
    with guide(s.pipe, AdaptiveGuidance(PAG(4.0), threshold=-1.0)) as run:
        s.run(s.call)
    assert run.nfe == 3 + 2


# --- SEG ---------------------------------------------------------------------------------------------------------


def test_blur_is_the_mean_at_infinity_and_nothing_at_a_tiny_sigma():
    query = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(blur(query, math.inf, (2, 4, 3, 4)), query.mean(1, keepdim=True).expand(2, 12, 5))
    torch.testing.assert_close(blur(query, 1e-3, (2, 4, 3, 4)), query)


def test_blur_runs_over_rows_and_columns_of_the_image():
    """A bump in a 10 x 8 grid, away from the edges, spreads as the outer product of two Gaussians."""
    query = torch.zeros(1, 80, 1)
    query[0, 3 * 8 + 3] = 1.0
    spread = blur(query, 0.5, (1, 4, 20, 16)).view(10, 8)
    weights = torch.tensor([math.exp(-2.0 * i * i) for i in (-2, -1, 0, 1, 2)])
    weights = weights / weights.sum()
    torch.testing.assert_close(spread[1:6, 1:6], weights[:, None] * weights[None], rtol=1e-5, atol=1e-6)
    assert float(spread.sum()) == pytest.approx(1.0)


def test_blur_refuses_tokens_that_are_no_image():
    with pytest.raises(ValueError, match=r"the 7 tokens of this attention are no grid of \(3, 4\)"):
        blur(torch.zeros(1, 7, 2), 1.0, (1, 4, 3, 4))


# --- AutoGuidance ------------------------------------------------------------------------------------------------


def test_autoguidance_extrapolates_from_a_weaker_model_with_the_same_prompt(scene, tmp_path):
    s, weak = scene("StableDiffusion3Pipeline"), tiny_pipeline("StableDiffusion3Pipeline", seed=1).transformer
    calls = []
    weak.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    with guide(s.pipe, AutoGuidance(CFG(2.0), weak=weak)) as run:
        guided = s.run(s.call)
    assert run.nfe == 6
    assert [len(c) for c in calls] == [2, 2, 2]
    weak.save_pretrained(tmp_path / "weak")
    with guide(s.pipe, AutoGuidance(CFG(2.0), weak=str(tmp_path / "weak"))):
        assert torch.equal(s.run(s.call), guided)
    with guide(s.pipe, AutoGuidance(CFG(2.0), weak=s.pipe.transformer)):  # as good as the model: nothing to guide
        torch.testing.assert_close(s.run(s.call), s.run(s.plain), rtol=1e-4, atol=1e-4)


def test_autoguidance_takes_the_inner_rules_form(scene):
    s, weak = scene("StableDiffusion3Pipeline"), tiny_pipeline("StableDiffusion3Pipeline", seed=1).transformer

    class Spy(CFG):
        def __call__(self, cond, uncond, step):
            assert torch.equal(uncond, next(iter(step.extra.values())))
            return super().__call__(cond, uncond, step)

    with guide(s.pipe, AutoGuidance(Spy(2.0), weak=weak)):
        s.run(s.call)


def test_a_missing_weak_model_is_an_error(scene):
    s = scene("StableDiffusion3Pipeline")
    with (
        guide(s.pipe, AutoGuidance(2.0, weak="/no/such/model")),
        pytest.raises(ValueError, match="/no/such/model': no such folder"),
    ):
        s.run(s.call)
    assert untouched(s.pipe)


# --- replay, errors, compiled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [PAG(4.0), AutoGuidance(3.0), SLG(4.0, **EVERYWHERE)])
def test_a_recorded_step_replays_with_its_further_calls(rule, scene):
    s = scene("StableDiffusion3Pipeline")
    recorded = s.record(rule)
    assert recorded
    for transition, call in recorded.values():
        with torch.no_grad():
            logp = log_prob(transition.x_next, transition.remake(call.replay()))
        torch.testing.assert_close(logp, transition.logp, rtol=0, atol=1e-4)
        row = torch.tensor([1])
        output = call.replay(row)
        logp = log_prob(transition.x_next[row], transition.remake(output, row))
        torch.testing.assert_close(logp, transition.logp[row], rtol=1e-3, atol=1e-3)
        assert output.requires_grad
    assert untouched(s.pipe)


def test_layers_by_index_by_pattern_and_by_default():
    sd3, unet, flux = (
        denoisers(tiny_pipeline(name))
        for name in ("StableDiffusion3Pipeline", "StableDiffusionPipeline", "FluxPipeline")
    )
    assert list(chosen(sd3["transformer"], None)) == ["transformer_blocks.1"]
    assert list(chosen(sd3["transformer"], (0, 1))) == ["transformer_blocks.0", "transformer_blocks.1"]
    assert list(chosen(unet["unet"], None)) == ["mid_block.attentions.0.transformer_blocks.0"]
    assert len(chosen(unet["unet"], ("up_blocks.*",))) == 2
    assert list(chosen(flux["transformer"], (1,))) == ["single_transformer_blocks.0"]
    assert not any("refiner" in name for name in blocks(tiny_pipeline("Lumina2Pipeline").transformer))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((2,), "SD3Transformer2DModel has no transformer block 2: it has 2"),
        ((-1,), "has no transformer block -1"),
        (("transformer_block.0",), r"has no transformer block 'transformer_block.0': .*transformer_blocks.0"),
    ],
)
def test_unknown_layers_are_an_error_and_leave_nothing_behind(layers, message, scene):
    s = scene("StableDiffusion3Pipeline")
    stock = s.run()
    with guide(s.pipe, PAG(4.0, layers=layers)), pytest.raises(ValueError, match=message):
        s.run(s.call)
    assert untouched(s.pipe)
    assert torch.equal(s.run(), stock)


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (PAG, {"strength": math.nan}, r"PAG.strength must be a number in \[0, 1000\], got nan"),
        (SLG, {"start": 0.5, "stop": 0.5}, "SLG.start must be a fraction of the steps below stop=0.5"),
        (SLG, {"stop": 1.5}, "SLG.start .* stop=1.5"),
        (PAG, {"layers": []}, "PAG.layers must be block indices or name patterns"),
        (PAG, {"layers": [1.5]}, "PAG.layers"),
        (SEG, {"sigma": 0.0}, "SEG.sigma must be a number > 0, or inf, got 0.0"),
        (AutoGuidance, {"weak": 3}, "AutoGuidance.weak must be a torch module, a folder, or None, got 3"),
        (AutoGuidance, {"weak": "x", "layers": [1]}, "AutoGuidance.layers must be left out where weak is given"),
    ],
)
def test_a_bad_option_is_an_error_that_names_it(rule, options, message):
    with pytest.raises(ValueError, match=message):
        rule(4.0, **options)


def test_a_compiled_denoiser_is_altered_all_the_same(scene):
    s = scene("StableDiffusion3Pipeline")
    with guide(s.pipe, PAG(4.0)):
        want = s.run(s.call)
    s.pipe.transformer = torch.compile(s.pipe.transformer, backend="eager")
    with guide(s.pipe, PAG(4.0)):
        torch.testing.assert_close(s.run(s.call), want, rtol=1e-4, atol=1e-4)


def test_two_rules_of_one_kind_keep_their_predictions_apart(scene):
    s = scene("StableDiffusion3Pipeline")

    def run(rule):
        with guide(s.pipe, rule) as opened:
            return s.run(s.call), opened.nfe

    both, nfe = run(PAG(PAG(4.0, strength=1.0, layers=0), strength=1.0, layers=1))
    assert nfe == 12
    for layer in (0, 1):
        assert not torch.allclose(both, run(PAG(4.0, strength=2.0, layers=layer))[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rule", [PAG(4.0), SEG(4.0), SLG(4.0, **EVERYWHERE), AutoGuidance(3.0)])
def test_gradient_checkpointing_changes_no_gradient(rule, scene):
    """The backward pass runs checkpointed blocks again, when they are no longer altered."""
    s = scene("StableDiffusion3Pipeline")
    recorded = next(iter(s.record(rule).values()))[1]
    found = []
    for checkpoint in (False, True):
        if checkpoint:
            s.pipe.transformer.enable_gradient_checkpointing()
        s.pipe.transformer.train(checkpoint)  # checkpoints are made in train mode only
        s.pipe.transformer.zero_grad()
        recorded.replay().square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in s.pipe.transformer.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert s.pipe.transformer.is_gradient_checkpointing


def test_seg_says_that_fused_projections_hide_the_queries(scene):
    s = scene("StableDiffusionPipeline")
    s.pipe.fuse_qkv_projections(vae=False)
    with guide(s.pipe, SEG(4.0)), pytest.raises(ValueError, match=r"SEG blurred no query .* unfuse_qkv_projections"):
        s.run(s.call)


def test_a_cached_denoiser_keeps_a_cache_of_its_own_for_further_calls(scene):
    from diffusers import FirstBlockCacheConfig

    s = scene("FluxPipeline")
    with guide(s.pipe, SLG(4.0, layers=(1,), **EVERYWHERE)):
        want = s.run(s.call)
    s.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with guide(s.pipe, SLG(4.0, layers=(1,), **EVERYWHERE)):
        torch.testing.assert_close(s.run(s.call), want, rtol=1e-3, atol=1e-3)


def test_a_weak_model_that_cannot_be_called_is_refused(scene):
    s = scene("WanPipeline", two_experts=True)
    with (
        guide(s.pipe, AutoGuidance(2.0, weak=s.pipe.transformer_2)),
        pytest.raises(ValueError, match="own transformer_2"),
    ):
        s.run(s.call)
    s, weak = scene("StableDiffusion3Pipeline"), tiny_pipeline("StableDiffusion3Pipeline", seed=1).transformer
    with guide(s.pipe, AutoGuidance(2.0, weak=weak.train())), pytest.raises(ValueError, match="in train mode"):
        s.run(s.call)


def test_a_window_that_holds_no_step_is_refused(scene):
    s = scene("StableDiffusion3Pipeline")
    with (
        guide(s.pipe, SLG(4.0)),
        pytest.raises(ValueError, match=r"SLG acts from 0.01 to 0.2 of the steps, which are none of 3"),
    ):
        s.run(s.call)
