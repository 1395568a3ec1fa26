import math

import pytest
import torch

from diffgen.parametrization import Level
from diffgen.pipelines import (
    APG,
    CFG,
    PAG,
    AdaptiveGuidance,
    AutoGuidance,
    Interval,
    LinearAG,
    Scheduled,
    ZeroStar,
    guide,
)
from diffgen.pipelines.adaptive import cosine
from diffgen.seeding import generator
from diffgen.tap import StepInfo
from diffgen.tiny import TINY

C, U = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])


def step(x, index=0, steps=4, level=0.5, state=None):
    return StepInfo(index, steps, 0, Level.flow(level), "flow_prediction", x, {} if state is None else state)


def test_gamma_is_the_cosine_per_sample():
    assert cosine(C, U).tolist() == pytest.approx([0.6])  # (3, 4) . (1, 0) / 5
    both = torch.cat([C, -C]), torch.cat([U, U])
    assert cosine(*both).tolist() == pytest.approx([0.6, -0.6])
    assert cosine(C, torch.zeros_like(C)).tolist() == [1.0]  # nothing to guide


def test_gamma_in_x0_and_epsilon_space():
    """flow at sigma 0.8, x = (2, 1): D = x - 0.8 v, eps = x + 0.2 v."""
    x = torch.tensor([[2.0, 1.0]])
    info = step(x, level=0.8)
    d_c, d_u, e_c, e_u = x - 0.8 * C, x - 0.8 * U, x + 0.2 * C, x + 0.2 * U
    assert AdaptiveGuidance(3.0, space="x0").gamma(C, U, info).tolist() == pytest.approx(cosine(d_c, d_u).tolist())
    assert AdaptiveGuidance(3.0, space="epsilon").gamma(C, U, info).tolist() == pytest.approx(cosine(e_c, e_u).tolist())


def test_a_sample_is_guided_at_the_step_where_it_passes_and_conditional_ever_after():
    rule, state = AdaptiveGuidance(3.0, threshold=0.7), {}
    c, u = torch.cat([C, C]), torch.cat([U, C])  # the second sample agrees at once
    first = rule(c, u, step(c, 0, state=state))
    assert first.tolist() == [[7.0, 12.0], [3.0, 4.0]]
    assert state["ag_stop"].tolist() == [-1, 0]
    assert rule.wants_uncond(step(c, 1, state=state)).tolist() == [True, False]
    u = torch.cat([U, U])  # it would disagree again, but the decision holds
    assert rule(c, u, step(c, 1, state=state)).tolist() == [[7.0, 12.0], [3.0, 4.0]]
    assert rule(c, torch.cat([C, C]), step(c, 2, state=state)).tolist() == [[3.0, 4.0], [3.0, 4.0]]
    assert state["ag_stop"].tolist() == [2, 0]
    assert not rule.wants_uncond(step(c, 3, state=state)).any()


def test_nobody_stops_during_the_warmup():
    rule, state = AdaptiveGuidance(3.0, threshold=-1.0, warmup=2), {}
    for index in range(3):
        rule(C, U, step(C, index, state=state))
        assert state["ag_stop"].tolist() == [2 if index == 2 else -1]


def test_hold_keeps_the_last_difference():
    rule, state = AdaptiveGuidance(3.0, threshold=-1.0, after="hold"), {}
    assert rule(C, U, step(C, 0, state=state)).tolist() == [[7.0, 12.0]]  # c + (4, 8)
    other = torch.tensor([[1.0, 1.0]])
    assert rule(other, other, step(C, 1, state=state)).tolist() == [[5.0, 9.0]]


def test_the_inner_rules_skipped_steps_are_no_agreement():
    """Where the inner rule wants no unconditional prediction, u is c and gamma 1: that must not stop anything."""

    class Late(CFG):
        def wants_uncond(self, info):
            return info.index > 0

    rule, state = AdaptiveGuidance(Late(3.0), threshold=0.9), {}
    rule(C, C, step(C, 0, state=state))
    assert state["ag_stop"].tolist() == [-1]


@pytest.mark.parametrize("name", TINY)
def test_it_is_cfg_where_it_never_stops_and_one_cfg_step_where_it_stops_at_once(name, scene):
    s = scene(name)
    stock = s.run()
    with guide(s.pipe, CFG(4.0)):
        cfg = s.run(s.call)
    with guide(s.pipe, AdaptiveGuidance(4.0, threshold=math.inf)) as run:
        assert torch.equal(s.run(s.call), cfg)
        assert run.nfe == 6
        assert run.state["ag_stop"].tolist() == [-1, -1]
    with guide(s.pipe, AdaptiveGuidance(4.0, threshold=-1.0)) as run:
        stopped = s.run(s.call)
    assert run.nfe == 4
    assert run.state["ag_stop"].tolist() == [0, 0]
    assert not torch.equal(stopped, stock)


def test_stopped_samples_leave_the_batch_one_by_one(scene):
    s = scene("StableDiffusion3Pipeline")

    class Odd(AdaptiveGuidance):
        def gamma(self, cond, uncond, info):
            return torch.tensor([1.0, -1.0])

    with guide(s.pipe, Odd(4.0, threshold=0.5)) as run:
        mixed = s.run(s.call)
    assert run.nfe == (4 + 3 + 3) / 2
    with guide(s.pipe, CFG(4.0)):
        full = s.run(s.call)
    torch.testing.assert_close(mixed[1], full[1], rtol=1e-4, atol=1e-4)  # the other sample doesn't notice
    assert not torch.allclose(mixed[0], full[0], rtol=1e-2, atol=1e-2)


def test_it_composes_with_apg_and_is_the_same_twice(scene):
    s = scene("StableDiffusion3Pipeline")
    with guide(s.pipe, APG(8.0)):
        apg = s.run(s.call)
    with guide(s.pipe, AdaptiveGuidance(APG(8.0), threshold=math.inf)):
        assert torch.equal(s.run(s.call), apg)
    with guide(s.pipe, AdaptiveGuidance(APG(8.0), threshold=-1.0, warmup=1)) as run:
        once = s.run(s.call)
        assert torch.equal(s.run(s.call), once)
    assert run.nfe == 5


def test_a_call_with_another_scale_reaches_the_inner_rule(scene):
    s = scene("StableDiffusion3Pipeline")
    with guide(s.pipe, CFG(2.0)):
        want = s.run(s.call)
    with guide(s.pipe, AdaptiveGuidance(9.0, threshold=math.inf)):
        assert torch.equal(s.run({**s.call, "guidance_scale": 2.0}), want)


def test_calibration_hits_the_saving_on_its_own_prompts(scene):
    s = scene("StableDiffusion3Pipeline")
    call = {k: v for k, v in s.call.items() if k not in ("prompt", "negative_prompt", "output_type")}
    prompts = [
        f"{n} {colour} {shape}" for n in ("a", "two") for colour in ("red", "blue") for shape in ("cross", "circle")
    ]
    call["num_inference_steps"] = 8
    rule = AdaptiveGuidance(4.0, space="x0", warmup=1).calibrated(s.pipe, prompts, saving=0.3, batch_size=8, **call)
    assert 0 < rule.threshold < 1
    generators = [generator("fit", 0, i) for i in range(8)]
    with guide(s.pipe, rule) as run:
        s.pipe(prompts, generator=generators, output_type="latent", **call)
    assert 1 - run.nfe / 16 >= 0.3
    assert 1 - run.nfe / 16 < 0.3 + 1 / 16  # half a step's worth of one sample and rounding
    with pytest.raises(ValueError, match=r"saving=0.49: .* AG saves at most"):
        rule.calibrated(s.pipe, prompts[:2], saving=0.49, **call)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"threshold": 99.1},
            r"AdaptiveGuidance.threshold must be a cosine in \[-1, 1\], or inf \(never stop\), got 99.1",
        ),
        ({"threshold": math.nan}, "AdaptiveGuidance.threshold .* got nan"),
        ({"threshold": "0.9"}, "AdaptiveGuidance.threshold"),
        ({"space": "x"}, "AdaptiveGuidance.space must be one of native, x0, epsilon, got 'x'"),
        ({"warmup": -1}, "AdaptiveGuidance.warmup must be a whole number of steps >= 0, got -1"),
        ({"warmup": 0.5}, "AdaptiveGuidance.warmup"),
        ({"after": "stop"}, "AdaptiveGuidance.after must be 'cond' or 'hold', got 'stop'"),
    ],
)
def test_a_bad_option_is_an_error_that_names_it(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveGuidance(4.0, **options)


@pytest.mark.parametrize("rule", ["cfg", None, CFG, True])
def test_only_a_rule_or_a_scale_can_be_wrapped(rule):
    with pytest.raises(TypeError, match=r"AdaptiveGuidance.rule must be a Guidance or a scale, got"):
        AdaptiveGuidance(rule)


@pytest.mark.parametrize("saving", [0.0, 0.5, math.nan, "a quarter"])
def test_a_saving_that_cannot_be_is_refused(saving, scene):
    with pytest.raises(ValueError, match=r"saving must be in \(0, 0.5\)"):
        AdaptiveGuidance(4.0).calibrated(None, ["a"], saving=saving)


@pytest.mark.parametrize("inner", [lambda: ZeroStar(4.0), lambda: Interval(4.0, 0.2, 1.0), lambda: Scheduled(4.0)])
def test_calibration_counts_what_the_inner_rule_really_evaluates(inner, scene):
    s = scene("StableDiffusion3Pipeline")
    call = {k: v for k, v in s.call.items() if k not in ("prompt", "negative_prompt", "output_type")}
    call["num_inference_steps"] = 8
    prompts = ["a red circle", "two blue squares", "a green cross", "three yellow circles"]
    nfe = []
    for rule in (inner(), AdaptiveGuidance(inner(), space="x0").calibrated(s.pipe, prompts, saving=0.2, **call)):
        with guide(s.pipe, rule) as run:
            s.pipe(prompts, generator=[generator("fit", 0, i) for i in range(4)], output_type="latent", **call)
        nfe.append(run.nfe)
    assert 0.2 - 1e-9 <= 1 - nfe[1] / nfe[0] < 0.3


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda: AdaptiveGuidance(AutoGuidance(4.0)), "AutoGuidance inside it makes none"),
        (lambda: AdaptiveGuidance(Interval(AdaptiveGuidance(4.0))), "AdaptiveGuidance inside AdaptiveGuidance"),
        (lambda: AutoGuidance(AutoGuidance(4.0)), "AutoGuidance inside AutoGuidance"),
        (lambda: ZeroStar(AutoGuidance(4.0)), r"AutoGuidance\(ZeroStar\(...\)\) works"),
        (lambda: LinearAG(Interval(LinearAG(4.0))), "LinearAG inside LinearAG"),
    ],
)
def test_chains_in_which_a_rule_could_do_nothing_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        rule()


def test_around_a_rule_at_scale_1_there_is_nothing_to_leave_out(scene):
    s = scene("StableDiffusion3Pipeline")
    with guide(s.pipe, AdaptiveGuidance(PAG(1.0))), pytest.raises(ValueError, match="AdaptiveGuidance at scale 1: PAG"):
        s.run(s.call)
