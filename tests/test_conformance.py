"""Every tiny pipeline through the tap: CFG as the stock pipeline's, replay as the rollout, evaluations really left out."""

from dataclasses import dataclass

import pytest
import torch

from diffgen.parametrization import Level, to_x0
from diffgen.pipelines import APG, CFG, guide
from diffgen.samplers import log_prob
from diffgen.table import denoisers
from diffgen.tiny import TINY

VARIANTS = {name: (name, {}) for name in TINY} | {
    "SD v_prediction": ("StableDiffusionPipeline", {"prediction_type": "v_prediction"}),
    "SD3 without T5": ("StableDiffusion3Pipeline", {"t5": False}),
    "Flux without guidance_embeds": ("FluxPipeline", {"guidance_embeds": False}),
    "Wan two experts": ("WanPipeline", {"two_experts": True}),
    "Wan Euler": ("WanPipeline", {"scheduler": "euler"}),
    "Sana Euler": ("SanaPipeline", {"scheduler": "euler"}),
    "Z-Image normalised": ("ZImagePipeline", {"call": {"cfg_normalization": 1.0}}),
    "Lumina2 not normalised": ("Lumina2Pipeline", {"call": {"cfg_normalization": False}}),
    "Lumina2 CFG on two steps": ("Lumina2Pipeline", {"call": {"cfg_trunc_ratio": 0.7}}),
}
everywhere = pytest.mark.parametrize("variant", VARIANTS)
pytestmark = pytest.mark.filterwarnings("ignore:.*guidance-distilled")


@pytest.fixture
def build(scene):
    def build(variant, **more):
        name, options = VARIANTS[variant]
        return scene(name, **options, **more)

    return build


@dataclass
class Some(CFG):
    """CFG at the steps, and for the samples, that the table names; the rest is conditional."""

    table: dict = None

    def wants_uncond(self, step):
        return self.table.get(step.index, False)


def evaluated_rows(pipe):
    """Rows that reach the end of the denoisers, counted inside them: a list that grows with each evaluation."""
    counts = []
    for module in denoisers(pipe).values():
        last = getattr(module, "conv_out", None) or getattr(module, "proj_out", None)
        if last is None:
            last = module.all_final_layer["2-1"] if hasattr(module, "all_final_layer") else module.norm_out
        last.register_forward_hook(lambda module, args, output: counts.append(len(output)))
    return counts


# --- (a) guidance ------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cfg_is_the_stock_pipelines_own(variant, dtype, build, relative):
    s = build(variant, dtype=dtype)
    stock, unguided = s.run(), s.run(s.plain)
    assert relative(unguided.float(), stock.float()) > 1e-2  # guidance does something
    with guide(s.pipe, s.rule) as run:
        guided = s.run(s.call)
    assert guided.dtype == stock.dtype
    if s.name == "ZImagePipeline":  # c + s (c - u) is written differently
        torch.testing.assert_close(guided, stock, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 2e-2)
    else:
        assert torch.equal(guided, stock)
    assert run.nfe == (5 if "two steps" in variant else 6)
    assert torch.equal(s.run(), stock)


@everywhere
def test_without_a_rule_the_tap_leaves_the_pipeline_as_it_is(variant, build):
    s = build(variant)
    for arguments, nfe in ((s.arguments, 5 if "two steps" in variant else 6), (s.plain, 3)):
        latents, opened = s.tapped(None, arguments)
        assert torch.equal(latents, s.run(arguments))
        assert opened.nfe == nfe


class Spy(CFG):
    """Answers with the conditional prediction and keeps what it saw."""

    def __call__(self, cond, uncond, step):
        self.seen = [*getattr(self, "seen", []), (cond, step)]
        return cond


@everywhere
def test_rules_see_predictions_in_the_schedulers_sign_and_space_at_the_right_level(variant, build):
    s, rule, steps = build(variant), Spy(4.0), []
    scheduler, original = s.pipe.scheduler, s.pipe.scheduler.step

    def spy(model_output, timestep, sample, *args, **kwargs):
        sigmas = getattr(scheduler, "sigmas", None)
        steps.append(
            (model_output, timestep, sample, None if sigmas is None else float(sigmas[scheduler.step_index or 0]))
        )
        return original(model_output, timestep, sample, *args, **kwargs)

    scheduler.step = spy
    s.tapped(rule)
    del scheduler.step
    assert len(steps) == 3
    for (cond, step), (output, timestep, sample, sigma) in zip(rule.seen, steps):
        assert torch.equal(cond.flatten(), output.flatten())
        assert torch.equal(torch.as_tensor(step.timestep), torch.as_tensor(timestep))
        assert step.num_steps == 3
        if step.kind == "flow_prediction":
            clean = sample - sigma * output
        elif sigma is None:  # DDIM
            bar = float(scheduler.alphas_cumprod[int(timestep)])
            clean = to_x0(output, sample, Level(bar**0.5, (1 - bar) ** 0.5), step.kind)
        elif "XL" in variant:  # Euler's sample is x0 + sigma eps
            clean = sample - sigma * output
        else:  # DPM-Solver's is alpha (x0 + sigma eps)
            alpha = (1 + sigma**2) ** -0.5
            clean = (sample - sigma * alpha * output) / alpha
        ours = to_x0(cond, step.x, step.level, step.kind)
        torch.testing.assert_close(ours.flatten(), clean.flatten(), rtol=1e-4, atol=1e-4)


# --- (b) record and replay ---------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("guided", [True, False], ids=["CFG", "no CFG"])
def test_replaying_a_recorded_call_gives_the_rollouts_log_prob_exactly_and_gradients(variant, guided, build):
    s = build(variant)
    if guided:
        records = s.record()
        assert [r.uncond is not None for _, r in records.values()][:2] == [True, True]
    else:
        records = s.record(None, s.plain)
        assert all(r.uncond is None for _, r in records.values())
    assert len(records) >= 2
    for t, recorded in records.values():
        logp = log_prob(t.x_next, t.remake(recorded.replay()))
        assert (logp - t.logp).abs().max() == 0
        logp.sum().backward()
    for module in denoisers(s.pipe).values():
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        assert all(g.isfinite().all() for g in gradients)
        assert any(g.abs().max() > 0 for g in gradients)


@everywhere
@pytest.mark.parametrize("guided", [True, False], ids=["CFG", "no CFG"])
def test_replaying_some_samples_gives_their_rows_in_the_order_asked(variant, guided, build, relative):
    s = build(variant)
    records = s.record() if guided else s.record(None, s.plain)
    with torch.no_grad():
        for t, recorded in records.values():
            whole = recorded.replay()
            assert relative(whole[[1]], whole[[0]]) > 1e-2
            for rows in ([1], [1, 0]):
                some = recorded.replay(torch.tensor(rows))
                assert some.shape == whole[rows].shape
                assert relative(some, whole[rows]) < 1e-5
                logp = log_prob(t.x_next[rows], t.remake(some, torch.tensor(rows)))
                torch.testing.assert_close(logp, t.logp[rows], rtol=1e-4, atol=1e-4)


@everywhere
def test_replay_carries_a_rules_memory(variant, build, relative):
    s = build(variant)
    rule = APG(4.0, momentum=-0.5, norm_threshold="auto")
    for t, recorded in s.record(rule).values():
        with torch.no_grad():
            assert torch.equal(log_prob(t.x_next, t.remake(recorded.replay())), t.logp)
            assert torch.equal(log_prob(t.x_next, t.remake(recorded.replay())), t.logp)  # and leaves it as it was
            rows = torch.tensor([1])
            assert relative(recorded.replay(rows), recorded.replay()[rows]) < 1e-4


def gradients(s, output):
    for module in denoisers(s.pipe).values():
        module.zero_grad()
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return {
        f"{name}.{k}": p.grad.clone()
        for name, module in denoisers(s.pipe).items()
        for k, p in module.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize("variant", ["StableDiffusion3Pipeline", "PixArtSigmaPipeline", "FluxPipeline", "WanPipeline"])
def test_grad_uncond_false_keeps_the_value_and_only_the_conditional_branchs_gradient(variant, build, relative):
    s = build(variant)
    _, recorded = s.record()[1]
    both, half = recorded.replay(), recorded.replay(grad_uncond=False)
    assert relative(half, both) < 1e-5
    # u + 4 (c - u): the conditional branch alone, called by hand on its rows
    call = recorded.cond
    kwargs = call.kwargs
    if recorded.uncond is recorded.cond:
        kwargs = {k: v[2:] if isinstance(v, torch.Tensor) and v.ndim and len(v) == 4 else v for k, v in kwargs.items()}
    cond = call.module(**kwargs)[0]
    expected = gradients(s, 4 * (cond.chunk(2, 1)[0] if variant == "PixArtSigmaPipeline" else cond))
    got, full = gradients(s, half), gradients(s, both)
    assert got.keys() == expected.keys()
    scale = max(g.abs().max() for g in expected.values())
    assert max((got[k] - expected[k]).abs().max() for k in got) < 1e-4 * scale
    assert max((full[k] - expected[k]).abs().max() for k in got) > 1e-2 * scale


@everywhere
def test_grad_uncond_false_gives_the_same_value_everywhere_and_for_some_samples(variant, build, relative):
    s = build(variant)
    for _, recorded in s.record().values():
        whole = recorded.replay()
        assert whole.requires_grad
        half = recorded.replay(grad_uncond=False)
        assert half.requires_grad
        assert relative(half.detach(), whole.detach()) < 1e-5
        some = recorded.replay(torch.tensor([1]), grad_uncond=False)
        assert relative(some.detach(), whole[[1]].detach()) < 1e-5


def test_recording_a_step_with_cfg_needs_a_rule(build):
    for variant in ("StableDiffusion3Pipeline", "FluxPipeline"):
        s = build(variant)
        with pytest.raises(ValueError, match=r"needs a rule, for example CFG\(scale\)"):
            s.tapped(None, options={"record": lambda i: True})


def test_only_the_steps_asked_for_are_recorded(build):
    s = build("StableDiffusion3Pipeline")
    _, opened = s.tapped(options={"record": lambda i: i in (0, 2)})
    assert [r.step.index for r in opened.recorded] == [0, 2]


SKIPS = {0: True, 1: torch.tensor([True, False])}  # everyone's, sample 0's, nobody's


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "two steps" not in v])
def test_replay_leaves_out_what_the_rollout_left_out(variant, build):
    s = build(variant)
    records = s.record(Some(4.0, table=SKIPS))
    rows = evaluated_rows(s.pipe)
    for i, (t, recorded) in records.items():
        rows.clear()
        for grad_uncond in (True, False):
            logp = log_prob(t.x_next, t.remake(recorded.replay(grad_uncond=grad_uncond)))
            torch.testing.assert_close(logp, t.logp, rtol=1e-4, atol=1e-4)
        assert sum(rows) == 2 * (2, 1, 0)[i] + 2 * 2
        some = recorded.replay(torch.tensor([1]))
        torch.testing.assert_close(
            log_prob(t.x_next[[1]], t.remake(some, torch.tensor([1]))), t.logp[[1]], rtol=1e-4, atol=1e-4
        )


# --- (c) evaluations ---------------------------------------------------------------------------------------------

N, B = 3, 2
EVALUATIONS = {
    "CFG": (dict.fromkeys(range(N), True), 2 * N * B),
    "no uncond after the first step": ({0: True}, (N + 1) * B),
    "never uncond": ({}, N * B),
    "only sample 0": ({i: torch.tensor([True, False]) for i in range(N)}, N * (B + 1)),
    "sample 1 from the second step": ({1: torch.tensor([False, True]), 2: torch.tensor([False, True])}, N * B + 2),
}


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "two steps" not in v])
@pytest.mark.parametrize("case", EVALUATIONS)
def test_evaluations_that_a_rule_does_not_want_do_not_happen(variant, case, build, relative):
    table, expected = EVALUATIONS[case]
    s = build(variant)
    stock, plain = s.run(), s.run(s.plain)
    rows = evaluated_rows(s.pipe)
    latents, opened = s.tapped(Some(4.0, table=table))
    assert sum(rows) == opened.rows_evaluated == expected
    assert opened.nfe == expected / B
    # samples don't see each other, so each is what its own guidance makes of it
    if case == "CFG":
        assert relative(latents, stock) < 1e-5
    elif case == "never uncond":
        assert relative(latents, plain) < 1e-4
    elif case == "only sample 0":
        assert relative(latents[:1], stock[:1]) < 1e-4
        assert relative(latents[1:], plain[1:]) < 1e-4
    else:
        assert relative(latents, stock) > 1e-3
        assert relative(latents, plain) > 1e-3


@everywhere
def test_without_cfg_each_step_evaluates_each_sample_once(variant, build):
    s = build(variant)
    rows = evaluated_rows(s.pipe)
    _, opened = s.tapped(None, s.plain)
    assert sum(rows) == opened.rows_evaluated == N * B


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "two steps" not in v])
@pytest.mark.parametrize("guided", [True, False], ids=["CFG", "no CFG"])
def test_samples_with_equal_inputs_are_evaluated_once_until_share_until(variant, guided, build, relative):
    s = build(variant)
    prompts = ["a red circle", "a red circle", "two blue squares"]
    arguments = s.arguments if guided else s.plain
    arguments = {**arguments, "prompt": prompts}
    if guided:
        arguments["negative_prompt"] = ["green"] * 3

    def seeds():
        return [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]

    apart, _ = s.tapped(s.rule if guided else None, {**arguments, "generator": seeds()})
    rows = evaluated_rows(s.pipe)
    options = {"share": torch.tensor([0, 0, 2]), "share_until": 1}
    shared, opened = s.tapped(s.rule if guided else None, {**arguments, "generator": seeds()}, options)
    assert sum(rows) == opened.rows_evaluated == (2 + 2 + 3) * (2 if guided else 1)
    assert relative(shared, apart) < 1e-5


def test_shared_samples_are_recorded_and_replayed_as_samples_of_their_own(build, relative):
    for variant in ("StableDiffusion3Pipeline", "FluxPipeline"):
        s = build(variant)
        arguments = {**s.arguments, "prompt": ["a red circle"] * 2, "negative_prompt": ["green"] * 2}
        arguments["generator"] = [torch.Generator().manual_seed(0) for _ in range(2)]
        options = {"share": torch.tensor([0, 0]), "share_until": 0, "record": lambda i: True}
        _, opened = s.tapped("own", arguments, options)
        assert opened.rows_evaluated == 2 + 4 + 4
        with torch.no_grad():
            out = opened.recorded[0].replay()
        assert out.shape[0] == 2
        assert relative(out[:1], out[1:]) < 1e-5
