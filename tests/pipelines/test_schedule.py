import math

import pytest
import torch

from diffgen.parametrization import Level
from diffgen.pipelines import APG, CFG, PAG, AdaptiveGuidance, Interval, Rescale, Scheduled, ZeroStar, guide
from diffgen.tap import StepInfo

C = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
U = torch.tensor([[1.0, 0.0]], dtype=torch.float64)


def step(index=0, n=10, x=C, level=None, state=None):
    return StepInfo(index, n, 0, level or Level.flow(0.5), "flow_prediction", x, {} if state is None else state)


def random(*shape, seed=0):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).unbind()


# --- interval ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "start", "stop", "guided"),
    [
        (10, 0.2, 0.8, range(2, 8)),
        (5, 0.0, 1.0, range(5)),
        (5, 0.5, 1.0, range(2, 5)),
        (3, 0.0, 0.7, range(2)),  # int(2.1)
        (3, 0.0, 0.3, range(0)),  # int(0.9): no step is inside
        (1, 0.0, 1.0, range(1)),
    ],
)
def test_an_interval_of_steps_is_counted_as_diffusers_guiders_do(n, start, stop, guided):
    from diffusers.guiders import ClassifierFreeGuidance

    rule, guider = Interval(3.0, start, stop), ClassifierFreeGuidance(3.0, start=start, stop=stop)
    for i in range(n):
        guider.set_state(i, n, None)
        inside = i in guided
        assert guider._is_cfg_enabled() is inside
        assert rule.wants_uncond(step(i, n)) is inside
        assert torch.equal(rule(C, U, step(i, n)), CFG(3.0)(C, U, step()) if inside else C)


@pytest.mark.parametrize(
    ("level", "inside"),
    [
        (Level.flow(0.5), False),  # sigma / alpha = 1: the lower bound doesn't belong to it
        (Level.flow(0.6), True),  # 1.5
        (Level.flow(0.75), True),  # 3: the upper bound belongs to it
        (Level.flow(0.8), False),  # 4
        (Level.flow(1.0), False),  # pure noise: inf
        (Level.flow(0.0), False),
        (Level(0.6, 0.8), True),  # 4 / 3
        (Level(1.0, 2.0), True),
    ],
)
def test_an_interval_of_noise_levels_is_in_sigma_over_alpha(level, inside):
    rule = Interval(3.0, 1.0, 3.0, "sigma")
    assert rule.wants_uncond(step(level=level)) is inside
    assert torch.equal(rule(C, U, step(level=level)), CFG(3.0)(C, U, step()) if inside else C)


@pytest.mark.parametrize("inner", [CFG(7.5), APG(7.5), Rescale(7.5, 0.7)])
def test_the_whole_interval_is_the_rule_alone(inner):
    c, u = random(2, 4, 8, 8)
    for rule in (Interval(inner), Interval(inner, 0.0, math.inf, "sigma")):
        for i, level in enumerate((Level.flow(1.0), Level.flow(0.4))):
            a, b = (r(c, u, step(i, 2, c, level)) for r in (rule, inner))
            assert torch.equal(a, b)
            assert rule.wants_uncond(step(i, 2, level=level)) is True


def test_outside_the_interval_no_further_evaluation_is_asked_for_and_no_memory_kept():
    rule, state = Interval(PAG(APG(3.0), layers=(0,)), 0.5, 1.0), {}
    assert [bool(rule.extra(step(i))) for i in range(10)] == [i >= 5 for i in range(10)]
    assert torch.equal(rule(C, U, step(0, state=state)), C)
    assert not state


def test_an_interval_passes_on_what_its_rule_does_not_want():
    done = {"ag_stop": torch.tensor([3, -1])}
    rule = Interval(AdaptiveGuidance(4.0), 0.0, 0.5)
    assert rule.wants_uncond(step(4, state=done)).tolist() == [False, True]
    assert rule.wants_uncond(step(5, state=done)) is False


def test_step_ag_saves_the_evaluations_of_the_later_steps_in_a_pipeline(scene):
    for name in ("StableDiffusion3Pipeline", "WanPipeline"):
        s = scene(name)
        stock = s.run()
        with guide(s.pipe, Interval(4.0, 0.0, 0.7)) as run:
            part = s.run(s.call)
        assert run.nfe == 2 + 2 + 1
        assert not torch.equal(part, stock)
        with guide(s.pipe, Interval(4.0)) as run:
            assert torch.equal(s.run(s.call), stock)
        assert run.nfe == 2 * s.STEPS
        with guide(s.pipe, Interval(4.0, 0.0, 0.3)), pytest.raises(ValueError, match="holds none of 3 steps"):
            s.run(s.call)


def test_an_interval_in_sigma_follows_the_schedulers_noise_levels_in_a_pipeline(scene):
    s = scene("StableDiffusion3Pipeline")
    with guide(s.pipe, Interval(4.0, 0.0, 1e6, "sigma")) as run:
        s.run(s.call)
    assert run.nfe == 2 * s.STEPS - 1  # the first step is pure noise
    middle = float(s.pipe.scheduler.sigmas[1])
    with guide(s.pipe, Interval(4.0, 0.0, middle / (1 - middle) * (1 + 1e-6), "sigma")) as run:
        s.run(s.call)
    assert run.nfe == 2 * s.STEPS - 1
    with guide(s.pipe, Interval(4.0, 0.0, middle / (1 - middle) * (1 - 1e-3), "sigma")) as run:
        s.run(s.call)
    assert run.nfe == 2 * s.STEPS - 2


# --- scheduled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({"shape": "constant"}, (1, 1, 1, 1, 1)),
        ({"shape": "linear"}, (0, 0.5, 1, 1.5, 2)),
        ({"shape": "cosine"}, (0, 1 - 0.5**0.5, 1, 1 + 0.5**0.5, 2)),
        ({"shape": "beta"}, (0, 9 / 8, 3 / 2, 9 / 8, 0)),  # 6 p (1 - p)
        ({"shape": "beta", "a": 1, "b": 1}, (1, 1, 1, 1, 1)),
        ({"shape": "beta", "a": 1, "b": 2}, (2, 1.5, 1, 0.5, 0)),  # 2 (1 - p)
        ({"shape": "beta", "a": 3, "b": 2}, (0, 12 * 3 / 64, 1.5, 12 * 9 / 64, 0)),  # 12 p^2 (1 - p)
        ({"shape": lambda p: p * p}, (0, 1 / 16, 1 / 4, 9 / 16, 1)),
    ],
)
def test_the_scale_follows_its_shape_over_five_steps(options, factors):
    rule = Scheduled(4.0, **options)
    for i, f in enumerate(factors):
        expected = CFG(1 + 3 * f)(C, U, step())
        torch.testing.assert_close(rule(C, U, step(i, 5)), expected, rtol=1e-12, atol=1e-12)
        assert rule.wants_uncond(step(i, 5)) is (f != 0)


@pytest.mark.parametrize(
    "options", [{"shape": s} for s in ("constant", "linear", "cosine", "beta")] + [{"shape": "beta", "a": 3}]
)
def test_the_mean_over_many_steps_is_the_scale(options):
    rule, n = Scheduled(4.0, **options), 2001
    mean = sum(rule._at(step(i, n)).scale for i in range(n)) / n
    assert mean == pytest.approx(4.0, rel=1e-3)
    if options["shape"] != "beta":
        assert Scheduled(4.0, **options)._at(step(0, 1)).scale == pytest.approx(4.0)  # a single step


@pytest.mark.parametrize("inner", [CFG(7.3), CFG(0.1), APG(7.3), Rescale(7.3, 0.7)])
def test_a_constant_schedule_is_the_rule_alone_bit_for_bit(inner):
    c, u = random(2, 4, 8, 8)
    for i in range(3):
        assert torch.equal(Scheduled(inner, "constant")(c, u, step(i, 3, c)), inner(c, u, step(i, 3, c)))


def test_the_rule_keeps_its_other_options_and_its_memory():
    inner = Rescale(APG(5.0, eta=0.3, space="native", norm_threshold=2.0), 0.4)
    state, expected_state = {}, {}
    for i in range(1, 4):
        c, u = random(2, 4, 8, 8, seed=i)
        guided = Scheduled(inner)(c, u, step(i, 4, c, state=state))
        expected = inner.with_scale(1 + 4 * 2 * i / 3)(c, u, step(i, 4, c, state=expected_state))
        torch.testing.assert_close(guided, expected)
    assert torch.equal(state["momentum"], expected_state["momentum"])


def test_where_the_scale_is_1_the_condition_is_returned_and_the_rule_remembers_nothing():
    """Without an unconditional prediction both are the same: adaptive guidance must not take that for agreement."""
    for inner in (APG(4.0), AdaptiveGuidance(4.0)):
        state = {}
        assert torch.equal(Scheduled(inner)(C, C, step(0, 5, state=state)), C)
        assert not state
        Scheduled(inner)(C, U, step(1, 5, state=state))
        assert state
    assert not Scheduled(ZeroStar(4.0))(C, C, step(0, 5)).any()


def test_further_evaluations_go_on_where_the_scale_is_1():
    assert Scheduled(PAG(4.0, layers=(0,))).extra(step(0, 5))


def test_a_schedule_leaves_out_the_first_unconditional_evaluation_in_a_pipeline(scene, relative):
    s = scene("StableDiffusion3Pipeline")
    stock = s.run()
    with guide(s.pipe, Scheduled(4.0, "linear")) as run:
        assert relative(s.run(s.call), stock) > 1e-3
    assert run.nfe == 2 * s.STEPS - 1
    with guide(s.pipe, Scheduled(4.0, "constant")) as run:
        assert torch.equal(s.run(s.call), stock)
    assert run.nfe == 2 * s.STEPS


def test_a_schedule_takes_its_scale_from_its_rule_and_from_a_call():
    rule = Scheduled(Interval(4.0, 0.0, 0.5), "cosine")
    assert rule.scale == 4.0
    assert rule.with_scale(6.0) == Scheduled(Interval(6.0, 0.0, 0.5), "cosine")


# --- bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (Interval, {"start": -0.1}, "Interval.start must be in \\[0, 1\\), a fraction of the steps, got -0.1"),
        (Interval, {"start": float("nan")}, "Interval.start"),
        (
            Interval,
            {"start": 0.8, "stop": 0.2},
            r"Interval.stop must be in \(0.8, 1\], a fraction of the steps, got 0.2",
        ),
        (Interval, {"start": 0.5, "stop": 0.5}, "Interval.stop"),
        (Interval, {"stop": 1.5}, r"Interval.stop must be in \(0, 1\], .* got 1.5"),
        (Interval, {"stop": float("inf")}, "Interval.stop"),
        (Interval, {"start": 2.0, "space": "sigma"}, "Interval.stop must be a noise level above 2, got 1.0"),
        (Interval, {"stop": float("nan"), "space": "sigma"}, "Interval.stop"),
        (Interval, {"space": "time"}, "Interval.space must be 'steps' or 'sigma', got 'time'"),
        (Scheduled, {"shape": "sine"}, "Scheduled.shape must be 'constant', 'linear', .* or a function .*, got 'sine'"),
        (Scheduled, {"shape": 3}, "Scheduled.shape"),
        (Scheduled, {"a": 0.5}, "Scheduled.a must be a number >= 1, got 0.5"),
        (Scheduled, {"b": float("inf")}, "Scheduled.b"),
    ],
)
def test_a_bad_argument_is_an_error_that_names_the_field(rule, options, message):
    with pytest.raises(ValueError, match=message):
        rule(4.0, **options)


def test_a_shape_that_gives_no_scale_is_an_error_at_its_step():
    with pytest.raises(ValueError, match=r"Scheduled.shape must give a number, got nan at progress 0"):
        Scheduled(4.0, lambda p: float("nan"))(C, U, step())
