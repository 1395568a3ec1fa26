import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffgen.parametrization import Level, from_x0
from diffgen.samplers import MIN_STD, Step, ddim, flow_sde, kl, log_prob, ode

# shared/methods/flow_grpo.md section 1: FlowMatchEulerDiscreteScheduler(shift=3).set_timesteps(4), a = 0.7, float64
SIGMAS = [1.0, 0.8576923013, 0.6021505594, 0.0089285718, 0.0]
X = torch.tensor([[0.5, -1, 2], [1, 0, -0.5]], dtype=torch.float64)
V = torch.tensor([[0.2, 0.4, -0.6], [-1, 0.5, 0.3]], dtype=torch.float64)
X_NEXT = torch.tensor([[0.45, -1.05, 2.1], [1.2, -0.1, -0.6]], dtype=torch.float64)
FLOW_SDE = {
    0: (0.7, [0.3490384603, -0.8119230795, 1.5953846192], [-0.6716209141, -0.6047076489]),
    1: (0.8687214069, [0.2163970222, -0.6873136193, 1.3109973449], [-0.9567892193, -0.8129790903]),
    3: (0.0062780903, [0.4966731820, -1.0022392215, 2.0022552285], [-55.10540657, -228.3936145]),
}


def step_at(i, noise_level=0.7, x=X, v=V):
    now, following = Level.flow(SIGMAS[i]), Level.flow(SIGMAS[i + 1])
    return flow_sde(v, x, now, following, noise_level=noise_level, sigma_max=SIGMAS[1])


def test_the_fixture_is_the_schedule_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.sigmas.double(), torch.tensor(SIGMAS, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("i", FLOW_SDE)
def test_flow_sde_has_the_mean_std_and_log_prob_of_the_reference(i):
    std, mean, logp = FLOW_SDE[i]
    step = step_at(i)
    assert step.std == pytest.approx(std, rel=1e-8)
    torch.testing.assert_close(step.mean[0], torch.tensor(mean, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(log_prob(X_NEXT, step), torch.tensor(logp, dtype=torch.float64), rtol=2e-8, atol=1e-8)
    assert step.dt == pytest.approx(SIGMAS[i + 1] - SIGMAS[i])


def test_flow_sde_at_sigma_one_takes_the_next_sigma_where_none_is_named():
    now, following = Level.flow(1.0), Level.flow(SIGMAS[1])
    assert flow_sde(V, X, now, following).std == step_at(0).std


@pytest.mark.parametrize("i", range(4))
def test_flow_sde_without_noise_is_the_ode(i):
    euler = ode(V, X, Level.flow(SIGMAS[i]), Level.flow(SIGMAS[i + 1]))
    torch.testing.assert_close(euler.mean, X + V * (SIGMAS[i + 1] - SIGMAS[i]), rtol=0, atol=1e-15)
    torch.testing.assert_close(step_at(i, noise_level=0.0).mean, euler.mean, rtol=0, atol=1e-15)
    torch.testing.assert_close(step_at(i, noise_level=1e-6).mean, euler.mean, rtol=0, atol=1e-10)
    assert step_at(i, noise_level=0.0).std == 0


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7])
def test_flow_sde_keeps_the_marginals_of_gaussian_data(noise_level):
    """Data N(m, c^2) have v in closed form, and each step maps a Gaussian to a Gaussian: no sampling is needed."""
    m, c, n = 1.5, 0.4, 2000
    mean, variance = 0.0, 1.0
    checked = 0
    for i in range(n):
        s, following = 1 - i / n, 1 - (i + 1) / n
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        x0 = m + (1 - s) * c**2 / ((1 - s) ** 2 * c**2 + s**2) * (x - (1 - s) * m)
        v = from_x0(x0, x, Level.flow(s), "flow_prediction")
        step = flow_sde(v, x, Level.flow(s), Level.flow(following), noise_level=noise_level, sigma_max=1 - 1 / n)
        shift, slope = float(step.mean[0]), float(step.mean[1] - step.mean[0])
        mean, variance = shift + slope * mean, slope**2 * variance + step.std**2
        if following < 0.6 and i % 100 == 0:
            checked += 1
            assert mean == pytest.approx((1 - following) * m, abs=0.01)
            assert variance == pytest.approx((1 - following) ** 2 * c**2 + following**2, rel=0.02)
    assert checked > 10
    assert (mean, variance) == (pytest.approx(m, abs=0.01), pytest.approx(c**2, rel=0.02))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("last", [False, True])
def test_ddim_is_the_step_of_diffusers(kind, eta, last):
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=kind
    )
    scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(0)
    x, out, noise = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    t = int(scheduler.timesteps[-1 if last else 1])
    bars = [scheduler.alphas_cumprod[t], scheduler.final_alpha_cumprod if last else scheduler.alphas_cumprod[t - 200]]
    step = ddim(out, x, *(Level(float(b) ** 0.5, (1 - float(b)) ** 0.5) for b in bars), eta=eta, kind=kind)

    def theirs(noise):
        return scheduler.step(out, t, x, eta=eta, variance_noise=noise).prev_sample

    quiet = theirs(torch.zeros_like(x))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if last else {"rtol": 1e-5, "atol": 1e-6}  # theirs has alphas in float32
    torch.testing.assert_close(step.mean, quiet, **tolerance)
    assert step.std == pytest.approx(float((theirs(torch.ones_like(x)) - quiet).mean()), rel=1e-4, abs=1e-7)
    assert (step.std > 0) == (eta > 0)
    torch.testing.assert_close(step.sample(noise), theirs(noise), **tolerance)


def test_log_prob_is_the_mean_log_density_of_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, x = torch.randn(2, 3, 4, 5, 5, generator=generator, dtype=torch.float64)
    expected = torch.distributions.Normal(mean, 0.3).log_prob(x).mean((1, 2, 3))
    torch.testing.assert_close(log_prob(x, Step(mean, 0.3, -0.1)), expected)


def test_kl_is_that_of_torch_distributions_and_for_equal_stds_the_penalty_of_flow_grpo():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(a, 0.3), normal(b, 0.7)).mean((1, 2))
    torch.testing.assert_close(kl(Step(a, 0.3, -0.1), Step(b, 0.7, -0.1)), expected)
    penalty = (a - b).square().mean((1, 2)) / (2 * 0.3**2)
    torch.testing.assert_close(kl(Step(a, 0.3, -0.1), Step(b, 0.3, -0.1)), penalty)
    assert kl(Step(a, 0.3, -0.1), Step(a, 0.3, -0.1)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    x, v, x_next = X.to(dtype), V.to(dtype), X_NEXT.to(dtype)
    step = step_at(1, x=x, v=v)
    vp = Level(0.6, 0.8), Level(0.8, 0.6)
    for each in (step, ode(v, x, Level.flow(0.8), Level.flow(0.6)), ddim(v, x, *vp)):
        assert each.mean.dtype == torch.float32
    assert log_prob(x_next, step).dtype == torch.float32
    # the same numbers rounded only once, on the way in
    exact = step_at(1, x=x.double(), v=v.double())
    torch.testing.assert_close(step.mean.double(), exact.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_prob(x_next, step).double(), log_prob(x_next.double(), exact), rtol=0, atol=1e-6)
    assert step.sample(torch.ones_like(x)).dtype == torch.float32


def test_the_log_prob_of_an_ode_step_is_an_error():
    with pytest.raises(ValueError, match=r"deterministic step .* has no log-prob; use flow_sde, or ddim with eta > 0"):
        log_prob(X, ode(V, X, Level.flow(0.8), Level.flow(0.6)))


def test_a_vanishing_std_is_clamped_so_that_the_log_prob_stays_finite():
    logp = log_prob(X, Step(X, 1e-12, -0.1))
    torch.testing.assert_close(logp, torch.full((2,), -math.log(MIN_STD) - 0.5 * math.log(2 * math.pi)).double())


def test_sampling_adds_std_times_the_noise_and_a_deterministic_step_ignores_it():
    noise = torch.full_like(X, 2.0)
    torch.testing.assert_close(Step(X, 0.5, -0.1).sample(noise), X + 1.0)
    assert torch.equal(Step(X, 0.5, -0.1).sample(), X)
    assert torch.equal(Step(X, 0.0, -0.1).sample(noise), X)
