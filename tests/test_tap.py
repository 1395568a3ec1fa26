from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, StableDiffusionImg2ImgPipeline

from diffgen import table
from diffgen.pipelines import CFG, check, guide
from diffgen.table import denoisers, row_for
from diffgen.tap import Tap, take

pytestmark = pytest.mark.filterwarnings("ignore:.*guidance-distilled", "ignore:.*not in the pipeline table")
LAYOUTS = ["StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "WanPipeline"]


@dataclass
class Masked(CFG):
    """CFG for some samples, the conditional prediction for the others."""

    wanted: tuple = ()

    def wants_uncond(self, step):
        return torch.tensor(self.wanted)


# --- no trace ----------------------------------------------------------------------------------------------------


def trace(pipe):
    """All that a tap could leave behind: attributes of each denoiser's modules by identity, hooks, the weights."""
    found = {}
    for name, module in denoisers(pipe).items():
        for path, part in module.named_modules():
            found[name, path] = {k: id(v) for k, v in vars(part).items()}
            found[name, path, "hooks"] = {k: list(v) for k, v in vars(part).items() if k.endswith("hooks")}
        found[name, "forward"] = getattr(module.forward, "__func__", None) is type(module).forward
        found[name, "state"] = {k: v.clone() for k, v in module.state_dict().items()}
    found["scheduler"] = set(vars(pipe.scheduler))
    found["pipe"] = set(vars(pipe))
    return found


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tap_leaves_no_trace(name, scene):
    s = scene(name, **({"two_experts": True} if name == "WanPipeline" else {}))
    s.run()
    before = trace(s.pipe)
    seen = []

    def look(pipe, i, t, kwargs):
        seen.append(same(trace(pipe), before))
        return {}

    s.tapped(callback_on_step_end=look)
    assert not any(seen)  # the comparison does see an open tap
    assert len(seen) == 3
    assert same(trace(s.pipe), before)
    s.tapped(None, s.plain, {"record": lambda i: True})
    assert same(trace(s.pipe), before)


class Broken(CFG):
    def __call__(self, cond, uncond, step):
        if step.index == 1:
            raise KeyError("inside the second step")
        return super().__call__(cond, uncond, step)


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_exception_in_the_call_leaves_no_trace_and_the_next_run_is_as_ever(name, scene):
    s = scene(name)
    stock = s.run()
    before = trace(s.pipe)
    with pytest.raises(KeyError, match="inside the second step"):
        s.tapped(Broken(4.0))
    assert same(trace(s.pipe), before)
    assert torch.equal(s.tapped()[0], stock)
    assert torch.equal(s.run(), stock)


def test_a_tap_whose_opening_fails_leaves_no_trace(scene):
    s = scene("WanPipeline", two_experts=True)
    before = trace(s.pipe)
    scheduler, s.pipe.scheduler = s.pipe.scheduler, torch.nn.Identity()  # has no step
    with pytest.raises(AttributeError), Tap(s.pipe, CFG(4.0), batch=2):
        pass
    s.pipe.scheduler = scheduler
    assert same(trace(s.pipe), before)
    s.tapped()


def test_opening_a_tap_inside_another_on_the_same_pipeline_or_parts_is_an_error(scene):
    s, other = scene("StableDiffusion3Pipeline"), scene("StableDiffusion3Pipeline")
    with Tap(s.pipe, batch=2):
        with pytest.raises(RuntimeError, match="StableDiffusion3Pipeline is already being tapped: a pipeline"):
            s.tapped()
        other.tapped()  # another one is free
        other.pipe.scheduler = s.pipe.scheduler
        with pytest.raises(RuntimeError, match="shares its denoiser or scheduler"):
            other.tapped()
    s.tapped()
    other.tapped()


def test_a_guided_call_inside_a_guided_call_of_the_same_pipeline_is_an_error(scene):
    s = scene("StableDiffusion3Pipeline")

    def again(pipe, i, t, kwargs):
        s.run()
        return {}

    with guide(s.pipe, s.rule), pytest.raises(RuntimeError, match="already being tapped"):
        s.run(callback_on_step_end=again)
    s.tapped()


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_runs_are_equal(name, scene):
    s = scene(name)
    assert torch.equal(s.tapped()[0], s.tapped()[0])


# --- hooks, adapters, compilation --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("when", ["before", "inside"])
def test_accelerate_hooks_work_whether_added_before_or_inside(name, when, scene):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    s = scene(name)
    stock = s.run()
    module = next(iter(denoisers(s.pipe).values()))

    def hook():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))

    if when == "before":
        hook()
        assert torch.equal(s.tapped()[0], stock)
        assert "wrapper" not in module.forward.__name__
    else:
        from diffgen.pipelines.guide import tap

        with tap(s.pipe, s.rule, s.row, s.arguments) as opened:
            hook()
            latents = s.run()
        assert torch.equal(latents, stock)
        assert opened.nfe == 6
    assert torch.equal(s.run(), stock)  # with the hook alone
    remove_hook_from_module(module)
    assert module.forward.__func__ is type(module).forward
    assert torch.equal(s.tapped()[0], stock)


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_model_offloading_works_also_where_the_pipeline_renews_its_hooks_at_the_end(name, scene):
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    s = scene(name)
    stock = s.run()

    def offload():
        remove_hook_from_module(s.pipe.transformer)
        _, hook = cpu_offload_with_hook(s.pipe.transformer, execution_device="cpu")
        s.pipe._all_hooks = [hook]

    offload()
    s.pipe.maybe_free_model_hooks = offload  # what enable_model_cpu_offload makes of each call's end
    for _ in range(2):
        latents, opened = s.tapped()
        assert torch.equal(latents, stock)
        assert opened.nfe == 6
    assert "wrapper" not in s.pipe.transformer.forward.__name__
    remove_hook_from_module(s.pipe.transformer)
    assert s.pipe.transformer.forward.__func__ is type(s.pipe.transformer).forward


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_lora_adapters_guide_record_and_get_gradients(name, scene, relative):
    from peft import LoraConfig

    from diffgen.samplers import log_prob

    s = scene(name)
    bare = s.run()
    s.pipe.transformer.requires_grad_(False)
    s.pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    parameters = {k: p for k, p in s.pipe.transformer.named_parameters() if p.requires_grad}
    assert parameters
    assert all("lora" in k for k in parameters)
    for k, p in parameters.items():
        if "lora_B" in k:
            torch.nn.init.constant_(p.data, 0.1)
    stock = s.run()
    assert relative(stock, bare) > 1e-3
    assert torch.equal(s.tapped()[0], stock)
    for t, recorded in s.record().values():
        logp = log_prob(t.x_next, t.remake(recorded.replay()))
        assert torch.equal(logp, t.logp)
        logp.sum().backward()
    assert any(p.grad.abs().max() > 0 for p in parameters.values())


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "CogView4Pipeline"])
@pytest.mark.parametrize("how", ["torch.compile", "in place"])
def test_compiled_denoisers_stay_compiled_and_equal(name, how, scene, dynamo):
    from diffgen.samplers import log_prob

    s = scene(name)
    if how == "in place":
        s.pipe.transformer.compile(backend="eager")
        compiled = s.pipe.transformer._compiled_call_impl
    else:
        s.pipe.transformer = torch.compile(s.pipe.transformer, backend="eager")
        compiled = s.pipe.transformer.forward
    stock = s.run()
    graphs = dynamo()
    assert graphs >= 1
    latents, opened = s.tapped()
    assert torch.equal(latents, stock)
    assert opened.nfe == 6
    assert dynamo() == graphs  # the tap isn't traced into the model
    after = s.pipe.transformer._compiled_call_impl if how == "in place" else s.pipe.transformer.forward
    assert after is compiled or after == compiled
    if name == "StableDiffusion3Pipeline":
        for t, recorded in s.record().values():
            with torch.no_grad():
                assert torch.equal(log_prob(t.x_next, t.remake(recorded.replay())), t.logp)


# --- calls of all kinds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "ZImagePipeline"]
)
def test_several_images_a_prompt_are_samples_of_their_own(name, scene, relative):
    s = scene(name)
    arguments = {**s.arguments, "num_images_per_prompt": 2}
    stock = s.run(arguments)
    assert len(stock) == 4
    latents, opened = s.tapped(arguments=arguments)
    assert relative(latents, stock) < 1e-5
    assert (opened.batch, opened.nfe) == (4, 6)
    some, opened = s.tapped(Masked(4.0, wanted=(True, False, False, True)), arguments)
    assert opened.rows_evaluated == 3 * (4 + 2)
    assert relative(some[[0, 3]], stock[[0, 3]]) < 1e-4
    assert relative(some[[1, 2]], stock[[1, 2]]) > 1e-3


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_callback_may_change_the_latents(name, scene):
    s, seen = scene(name), []

    def callback(pipe, i, t, kwargs):
        seen.append(i)
        return {"latents": kwargs["latents"] * 0.9}

    stock = s.run(callback_on_step_end=callback)
    assert torch.equal(s.tapped(callback_on_step_end=callback)[0], stock)
    assert seen == [0, 1, 2] * 2
    assert not torch.equal(s.run(), stock)


def test_a_callback_may_switch_guidance_off(scene):
    s = scene("StableDiffusionPipeline")

    def callback(pipe, i, t, kwargs):
        if i == 0:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[1]
        return kwargs

    more = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    stock = s.run(**more)
    latents, opened = s.tapped(**more)
    assert torch.equal(latents, stock)
    assert opened.nfe == 2 + 1 + 1
    assert opened.guided_steps == 1


def test_text_as_long_as_the_batch_is_not_cut(scene, relative):
    """Flux: 4 prompts of 4 tokens, with txt_ids [4, 3]; and guidance for some samples, so that arguments are cut."""
    s = scene("FluxPipeline")
    prompts = ["a red circle", "two blue squares", "a", "green on black"]
    arguments = {**s.arguments, "prompt": prompts, "negative_prompt": ["blue"] * 4, "max_sequence_length": 4}
    stock = s.run(arguments)
    plain = s.run({**s.plain, "prompt": prompts, "max_sequence_length": 4})
    latents, opened = s.tapped(Masked(4.0, wanted=(True, False, True, False)), arguments)
    assert opened.recorded == []
    assert opened.rows_evaluated == 3 * (4 + 2)
    assert relative(latents[[0, 2]], stock[[0, 2]]) < 1e-4
    assert relative(latents[[1, 3]], plain[[1, 3]]) < 1e-4


def test_lists_are_cut_by_what_they_hold_and_not_by_their_length():
    rows = torch.tensor([1])
    a, b = torch.arange(4).view(2, 2), torch.arange(4, 8).view(2, 2)
    assert take([a, b], rows, 2, per_sample=True) == [b]
    residuals = take([a, b], rows, 2)
    assert [x.tolist() for x in residuals] == [[[2, 3]], [[6, 7]]]
    assert take([[(1, 2, 3)], [(4, 5, 6)]], rows, 2, per_sample=True) == [[(4, 5, 6)]]
    assert take({"text_embeds": a, "scale": 3.0}, rows, 2)["text_embeds"].tolist() == [[2, 3]]
    assert take(torch.tensor(5), rows, 2) == 5
    assert take(None, rows, 2) is None


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_other_solvers_are_stepped_as_in_the_stock_pipeline(scheduler, scene):
    s = scene("StableDiffusionPipeline")
    s.pipe.scheduler = scheduler.from_config(s.pipe.scheduler.config)
    stock = s.run()
    latents, opened = s.tapped()
    assert torch.equal(latents, stock)
    assert opened.nfe == 2 * (3 if scheduler is EulerDiscreteScheduler else 5)


def test_the_batch_is_read_off_the_call_where_the_arguments_do_not_say(scene):
    for name in ("StableDiffusion3Pipeline", "FluxPipeline"):
        s = scene(name)
        with Tap(s.pipe, s.rule) as opened:
            latents = s.run()
        assert (opened.batch, opened.nfe) == (2, 6)
        assert torch.equal(latents, s.run())


# --- refusals ----------------------------------------------------------------------------------------------------


def test_skip_guidance_layers_of_sd3_is_refused(scene):
    s = scene("StableDiffusion3Pipeline")
    more = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    s.run(**more)
    with pytest.raises(ValueError, match="skip_guidance_layers makes a third denoiser call"):
        s.tapped(**more)


def test_three_branches_are_refused_by_name_and_where_they_show_in_a_call(scene):
    s = scene("StableDiffusionPipeline")
    with Tap(s.pipe, CFG(4.0), batch=2), pytest.raises(ValueError, match="StableDiffusionPipeline runs three branches"):
        s.pipe.unet(torch.zeros(6, 4, 8, 8), 1, encoder_hidden_states=torch.zeros(6, 16, 32))
    pipe = type("StableDiffusionInstructPix2PixPipeline", (), {"unet": s.pipe.unet})()
    with pytest.raises(
        ValueError, match=r"InstructPix2PixPipeline cannot be tapped: three branches \(text, image, none"
    ):
        row_for(pipe)


def test_a_call_with_an_unexpected_number_of_rows_says_which(scene):
    s = scene("StableDiffusionPipeline")
    with (
        Tap(s.pipe, CFG(4.0), batch=2),
        pytest.raises(RuntimeError, match="on 5 rows; expected 2 samples or 4 for CFG"),
    ):
        s.pipe.unet(torch.zeros(5, 4, 8, 8), 1, encoder_hidden_states=torch.zeros(5, 16, 32))


def test_a_pipeline_without_a_denoiser_is_refused_with_the_attributes_that_were_looked_for():
    pipe = type("AudioPipeline", (), {"components": {"vocoder": 1, "prior": 2}})()
    expected = (
        r"AudioPipeline has no denoiser: .* transformer, transformer_2, unet; found components \['prior', 'vocoder'\]"
    )
    for refused in (row_for, Tap, denoisers):
        with pytest.raises(ValueError, match=expected):
            refused(pipe)


def test_a_pipeline_without_a_guidance_argument_is_refused(scene):
    pipe = type("PlainPipeline", (), {"__call__": lambda self, prompt: None, "unet": torch.nn.Linear(1, 1)})()
    with pytest.raises(
        ValueError, match=r"PlainPipeline has no guidance_scale or true_cfg_scale .* stand in diffgen/table.py"
    ):
        row_for(pipe)


@pytest.mark.parametrize("name", ["PixArtSigmaPipeline", "Lumina2Pipeline", "ZImagePipeline"])
def test_a_row_without_what_the_pipeline_does_afterwards_is_noticed_at_the_first_step(name, scene):
    s = scene(name)
    s.row = replace(s.row, post=None, learned_variance=False)
    with pytest.raises(RuntimeError, match=f"{name} changes the guided prediction .* diffgen/table.py"):
        s.tapped()


def test_a_renorm_that_would_act_twice_is_noticed(scene):
    """Z-Image below 1: the pipeline shrinks the answer once more, whatever its norm."""
    s = scene("ZImagePipeline", call={"cfg_normalization": 0.5})
    with pytest.raises(RuntimeError, match="switch off the pipeline's own rescaling"):
        s.tapped()


# --- the table and classes that are not in it --------------------------------------------------------------------


def test_a_subclass_of_a_known_pipeline_has_its_row(scene):
    s = scene("FluxPipeline")
    s.pipe.__class__ = type("MyFlux", (type(s.pipe),), {})
    assert row_for(s.pipe) is table.TRUE_CFG


@pytest.mark.parametrize(
    ("name", "scale", "needs_negative"),
    [
        ("StableDiffusionPipeline", "guidance_scale", False),
        ("StableDiffusion3Pipeline", "guidance_scale", False),
        ("FluxPipeline", "true_cfg_scale", True),
        ("WanPipeline", "guidance_scale", False),
        ("CogView4Pipeline", "guidance_scale", False),
    ],
)
def test_a_class_that_the_table_does_not_know_is_guessed_and_guided_as_stock(
    name, scale, needs_negative, scene, monkeypatch
):
    s = scene(name)
    stock = s.run()
    monkeypatch.delitem(table.ROWS, name)
    row = row_for(s.pipe)
    assert (row.known, row.scale, row.needs_negative) == (False, scale, needs_negative)
    with pytest.warns(UserWarning, match=f"{name} is not in the pipeline table"), guide(s.pipe, s.rule) as run:
        assert torch.equal(s.run(s.call), stock)
    assert run.nfe == 6
    assert check(s.pipe, **{k: v for k, v in s.call.items() if k != "output_type"}, output_type="latent") == 0


def test_an_image_to_image_pipeline_is_guessed_and_its_rule_sees_the_trimmed_schedule(scene, relative):
    s = scene("StableDiffusionPipeline")
    pipe = StableDiffusionImg2ImgPipeline(**s.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    seen, stepped = [], []

    class Spy(CFG):
        def __call__(self, cond, uncond, step):
            seen.append((int(step.timestep), step.index, step.num_steps, step.level.sigma))
            return super().__call__(cond, uncond, step)

    def callback(pipe, i, t, kwargs):
        stepped.append(int(t))
        return {}

    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    call = {"image": image, "strength": 0.6, "output_type": "latent", "num_inference_steps": 5, "return_dict": False}
    call |= {"prompt": "a red circle"}
    stock = pipe(**call, guidance_scale=4.0, generator=torch.Generator().manual_seed(0))[0]
    with guide(pipe, Spy(4.0)):
        guided = pipe(**call, generator=torch.Generator().manual_seed(0), callback_on_step_end=callback)[0]
    assert torch.equal(guided, stock)
    assert stepped == [401, 201, 1]
    sigmas = [float(1 - s.pipe.scheduler.alphas_cumprod[t]) ** 0.5 for t in stepped]
    assert seen == [(t, i, 3, pytest.approx(sigma)) for i, (t, sigma) in enumerate(zip(stepped, sigmas))]
    del call["num_inference_steps"]
    assert check(pipe, steps=4, **call) == 0


def test_a_call_keeps_its_own_copy_of_dicts_and_slices_what_they_hold_by_name():
    """IP-Adapters: pipelines change one joint_attention_kwargs between their two calls."""
    from diffgen.tap import Call, _copied

    given = {"ip_adapter_image_embeds": [torch.arange(4.0)], "scale": torch.ones(4), "text": ["a"]}
    call = Call(
        torch.nn.Identity(), _copied({"hidden_states": torch.zeros(4, 2), "joint_attention_kwargs": given}), None
    )
    given["ip_adapter_image_embeds"] = [torch.full((4,), -1.0)]
    chosen = call.select(torch.tensor([1, 3]))["joint_attention_kwargs"]
    assert chosen["ip_adapter_image_embeds"][0].tolist() == [1.0, 3.0]
    assert len(chosen["scale"]) == 4  # not named: it isn't known to carry the batch
    call.select(None)["joint_attention_kwargs"].clear()
    assert set(call.kwargs["joint_attention_kwargs"]) == set(given)
