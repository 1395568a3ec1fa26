"""Sampler steps as pure functions: (model output, x_t, level now, level next) -> Gaussian of x_next.

Levels are (alpha, sigma) of x = alpha * x0 + sigma * eps. Everything is computed in float32 or better, whatever the
dtype of the inputs: log-probs in half precision make on-policy ratios differ from 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from diffgen.parametrization import Level, convert, to_x0


@dataclass(frozen=True)
class Step:
    """x_next ~ N(mean, std^2): mean [B, ...] float32 or float64, std a number; dt = sigma_next - sigma (< 0)."""

    mean: torch.Tensor
    std: float
    dt: float

    def sample(self, noise: torch.Tensor | None = None) -> torch.Tensor:
        return self.mean if noise is None or self.std == 0 else self.mean + self.std * noise.to(self.mean.dtype)


def _full(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def ode(out: torch.Tensor, x: torch.Tensor, now: Level, next: Level) -> Step:
    """Euler step of the probability-flow ODE of a flow model: x + v * dt."""
    dt = float(next.sigma) - float(now.sigma)
    return Step(_full(x) + _full(out) * dt, 0.0, dt)


def flow_sde(
    out: torch.Tensor,
    x: torch.Tensor,
    now: Level,
    next: Level,
    *,
    noise_level: float = 0.7,
    sigma_max: float | None = None,
) -> Step:
    """Flow-SDE (Flow-GRPO, arXiv 2505.05470): the ODE's marginals with noise sigma~ = noise_level * sqrt(s / (1 - s)).

    mean = x (1 + sigma~^2 dt / (2 s)) + v (1 + sigma~^2 (1 - s) / (2 s)) dt, std = sigma~ sqrt(-dt).
    At s = 1 the denominator 1 - s uses sigma_max, the schedule's second sigma. noise_level -> 0 is the ODE.
    """
    x, v = _full(x), _full(out)
    s, dt = float(now.sigma), float(next.sigma) - float(now.sigma)
    top = float(next.sigma) if sigma_max is None else sigma_max
    variance = noise_level**2 * s / (1 - (top if s >= 1 else s))
    mean = x * (1 + variance * dt / (2 * s)) + v * (1 + variance * (1 - s) / (2 * s)) * dt
    return Step(mean, math.sqrt(variance * -dt), dt)


def ddim(
    out: torch.Tensor, x: torch.Tensor, now: Level, next: Level, *, eta: float = 1.0, kind: str = "epsilon"
) -> Step:
    """DDIM with eta (arXiv 2010.02502), the policy of DDPO (arXiv 2305.13301); VP levels, any parametrisation.

    std = eta * (s' / s) * sqrt(1 - (alpha / alpha')^2), mean = alpha' x0 + sqrt(s'^2 - std^2) eps.
    eta = 0 is the ODE, eta = 1 ancestral (DDPM) sampling.
    """
    x, out = _full(x), _full(out)
    x0 = to_x0(out, x, now, kind)
    eps = convert(out, x, now, kind, "epsilon")
    ratio = float(next.sigma) / float(now.sigma)
    std = eta * ratio * math.sqrt(max(0.0, 1 - (float(now.alpha) / float(next.alpha)) ** 2))
    direction = math.sqrt(max(0.0, float(next.sigma) ** 2 - std**2))
    return Step(next.alpha * x0 + direction * eps, std, float(next.sigma) - float(now.sigma))


MIN_STD = 1e-6


def log_prob(x_next: torch.Tensor, step: Step) -> torch.Tensor:
    """Gaussian log-density of x_next [B, ...], **mean** over all non-batch dimensions, constants included -> [B].

    The mean, not the sum: the published clip ranges (1e-4 ... 1e-5) are set for it. Raises ValueError for an ODE step.
    """
    if step.std == 0:
        raise ValueError("a deterministic step (std 0) has no log-prob; use flow_sde, or ddim with eta > 0")
    std = max(step.std, MIN_STD)
    z = (_full(x_next) - step.mean) / std
    return (-0.5 * z.square() - math.log(std) - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def kl(step: Step, reference: Step) -> torch.Tensor:
    """KL(step || reference) of two Gaussian steps, mean over non-batch dimensions -> [B].

    Equal stds: mean(|mu - mu_ref|^2) / (2 std^2), the penalty of Flow-GRPO.
    """
    p, q = max(step.std, MIN_STD), max(reference.std, MIN_STD)
    distance = (step.mean - reference.mean).square().flatten(1).mean(1)
    return math.log(q / p) + (p * p + distance) / (2 * q * q) - 0.5
