import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from diffgen.parametrization import (
    KINDS,
    Level,
    convert,
    from_x0,
    is_flow,
    noise_level,
    prediction_kind,
    slope,
    to_x0,
)

levels = st.one_of(
    st.floats(0.02, math.pi / 2 - 0.02).map(lambda angle: Level(math.cos(angle), math.sin(angle))),  # VP
    st.floats(0.01, 100).map(lambda sigma: Level(1.0, sigma)),  # VE
    st.floats(0.01, 0.99).map(Level.flow),
)
kinds = st.sampled_from(KINDS)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def draw(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64).unbind()


def outputs(x0, eps, level):
    """The definition of each kind."""
    a, s = level
    return {"epsilon": eps, "v_prediction": a * eps - s * x0, "flow_prediction": eps - x0, "sample": x0}


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(levels, kinds, st.integers(0, 1000))
def test_to_x0_recovers_the_clean_sample_and_from_x0_the_output_in_every_kind(level, kind, seed):
    x0, eps = draw(seed)
    x = level.alpha * x0 + level.sigma * eps
    out = outputs(x0, eps, level)[kind]
    close(to_x0(out, x, level, kind), x0, 1e-7)
    close(from_x0(x0, x, level, kind), out, 1e-7)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(levels, kinds, kinds, st.integers(0, 1000))
def test_convert_agrees_with_the_definitions_and_converts_back(level, source, target, seed):
    x0, eps = draw(seed)
    x = level.alpha * x0 + level.sigma * eps
    outs = outputs(x0, eps, level)
    close(convert(outs[source], x, level, source, target), outs[target], 1e-6)
    there = convert(outs[source], x, level, source, target)
    close(convert(there, x, level, target, source), outs[source], 1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(levels, kinds, st.integers(0, 1000))
def test_slope_is_minus_the_derivative_of_x0_by_the_output(level, kind, seed):
    out, x = draw(seed)
    moved = to_x0(out + 1, x, level, kind) - to_x0(out, x, level, kind)
    k = slope(level, kind)
    close(moved, torch.full_like(out, -k), 1e-9 * max(1, abs(k)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(levels, kinds, kinds, st.integers(0, 1000))
def test_cfg_is_the_same_in_every_space(level, source, target, seed):
    c, u = draw(seed)
    x, _ = draw(seed + 5000)

    def cfg(c, u):
        return u + 7.5 * (c - u)

    there = cfg(*(convert(out, x, level, source, target) for out in (c, u)))
    close(convert(there, x, level, target, source), cfg(c, u), 1e-5)


def test_levels_may_be_tensors_that_broadcast():
    x0, eps = draw(3)
    s = torch.tensor([[0.2], [0.4], [0.9]], dtype=torch.float64)
    x = (1 - s) * x0 + s * eps
    close(to_x0(eps - x0, x, Level.flow(s), "flow_prediction"), x0)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, kind: slope(Level.flow(0.5), kind),
        lambda x, kind: to_x0(x, x, Level.flow(0.5), kind),
        lambda x, kind: from_x0(x, x, Level.flow(0.5), kind),
        lambda x, kind: convert(x, x, Level.flow(0.5), kind, kind),
    ],
)
def test_an_unknown_kind_is_an_error_that_names_the_nearest(function):
    with pytest.raises(ValueError, match=r"'epsillon' is unknown: did you mean 'epsilon'\? \(valid: epsilon, flow"):
        function(torch.zeros(1, 2), "epsillon")


SCHEDULERS = {
    "flow euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "ddim": lambda: DDIMScheduler(**SD),
    "euler": lambda: EulerDiscreteScheduler(**SD),
    "dpm": lambda: DPMSolverMultistepScheduler(**SD),
    "dpm flow": lambda: DPMSolverMultistepScheduler(**FLOW),
    "unipc flow": lambda: UniPCMultistepScheduler(**FLOW),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("stepped", [False, True], ids=["before the run", "in the run"])
def test_noise_level_is_that_of_the_schedulers_own_noising_as_the_model_sees_it(name, stepped):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps[:4]:
        fresh = SCHEDULERS[name]()
        fresh.set_timesteps(5)
        one, zero, when = torch.ones(1, 1), torch.zeros(1, 1), t[None]
        if name == "flow euler":  # it feeds the model its sample as it is
            alpha, sigma = float(fresh.scale_noise(one, when, zero)), float(fresh.scale_noise(zero, when, one))
        else:
            noised = fresh.add_noise(one, zero, when), fresh.add_noise(zero, one, when)
            alpha, sigma = (float(fresh.scale_model_input(sample, t)) for sample in noised)
        level = noise_level(scheduler if stepped else fresh, t)
        assert level.alpha == pytest.approx(alpha, rel=2e-5, abs=1e-7)
        assert level.sigma == pytest.approx(sigma, rel=2e-5)
        if stepped:
            if name == "euler":
                scheduler.scale_model_input(zero, t)
            scheduler.step(zero, t, zero)


def test_two_steps_at_one_rounded_timestep_have_levels_of_their_own():
    scheduler = UniPCMultistepScheduler(**FLOW | {"flow_shift": 12.0})
    scheduler.set_timesteps(100)
    scheduler.set_begin_index(0)
    assert len(set(scheduler.timesteps[:10].tolist())) < 10
    for i, t in enumerate(scheduler.timesteps[:10]):
        assert noise_level(scheduler, t).sigma == float(scheduler.sigmas[i])
        scheduler.step(torch.zeros(1, 1), t, torch.zeros(1, 1))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddim", "epsilon"),
        ("ddim", "v_prediction"),
        ("ddim", "sample"),
        ("euler", "epsilon"),
        ("euler", "v_prediction"),
    ],
)
def test_x0_is_the_schedulers_pred_original_sample(name, kind):
    scheduler = type(SCHEDULERS[name]())(
        **SD, prediction_type=kind, **({"clip_sample": False} if name == "ddim" else {})
    )
    scheduler.set_timesteps(5)
    assert prediction_kind(scheduler) == kind
    generator = torch.Generator().manual_seed(0)
    for t in scheduler.timesteps:
        sample, out = torch.randn(2, 2, 3, generator=generator) * torch.tensor([[[14.0]], [[1.0]]])
        x = scheduler.scale_model_input(sample, t)
        level = noise_level(scheduler, t)
        theirs = scheduler.step(out, t, sample).pred_original_sample
        torch.testing.assert_close(to_x0(out, x, level, kind), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dpm", "dpm flow", "unipc flow"])
def test_x0_is_what_a_multistep_solver_makes_of_the_output(name):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(0)
    for t in scheduler.timesteps:
        x, out = torch.randn(2, 2, 3, generator=generator)
        if scheduler.step_index is None:
            scheduler._init_step_index(t)
        theirs = scheduler.convert_model_output(out, sample=x)
        ours = to_x0(out, x, noise_level(scheduler, t), prediction_kind(scheduler))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        scheduler.step(out, t, x)


def test_flow_schedulers_are_told_from_the_others_and_a_strange_prediction_type_is_refused():
    flows = {name: is_flow(make()) for name, make in SCHEDULERS.items()}
    assert flows == {name: "flow" in name for name in SCHEDULERS}
    assert {prediction_kind(SCHEDULERS[name]()) for name in SCHEDULERS if "flow" in name} == {"flow_prediction"}
    with pytest.raises(ValueError, match="did you mean 'v_prediction'"):
        prediction_kind(DDIMScheduler(prediction_type="v_predictions"))


def test_mochis_inverted_sigmas_and_the_second_stage_of_kdpm2_are_seen():
    from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, KDPM2DiscreteScheduler

    inverted = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    inverted.set_timesteps(4)
    assert noise_level(inverted, inverted.timesteps[0]) == Level.flow(1.0)  # it starts from pure noise
    kdpm = KDPM2DiscreteScheduler()
    kdpm.set_timesteps(4)
    x = torch.ones(1, 1, 2, 2)
    for t in kdpm.timesteps:
        alpha = float(kdpm.scale_model_input(torch.ones(()), t))
        assert noise_level(kdpm, t).alpha == pytest.approx(alpha)
        x = kdpm.step(x, t, x).prev_sample
    with pytest.raises(ValueError, match="preconditions its model"):
        to_x0(x, x, Level(1.0, 1.0), prediction_kind(EDMEulerScheduler()))
