"""What a denoiser predicts, and conversions between the four parametrisations.

Forward process: x_t = alpha * x0 + sigma * eps. Valid for any (alpha, sigma): VP (alpha^2 + sigma^2 = 1), VE (alpha = 1)
and flow (alpha = 1 - sigma).

| kind            | output          | denoised x0                                   |
|-----------------|-----------------|-----------------------------------------------|
| epsilon         | eps             | (x - sigma eps) / alpha                       |
| v_prediction    | alpha eps - sigma x0 | (alpha x - sigma v) / (alpha^2 + sigma^2) |
| flow_prediction | eps - x0        | (x - sigma v) / (alpha + sigma)               |
| sample          | x0              | out                                           |

All are affine in the output, x0 = base - slope * out, so linear guidance is the same in every space; projections, norms
and cosines are not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from diffgen.names import nearest

PRECONDITIONED = "preconditioned"
KINDS = ("epsilon", "v_prediction", "flow_prediction", "sample")


class Level(NamedTuple):
    """Noise level of x_t = alpha * x0 + sigma * eps; floats, or tensors that broadcast against x."""

    alpha: float | torch.Tensor
    sigma: float | torch.Tensor

    @classmethod
    def flow(cls, sigma) -> Level:
        return cls(1 - sigma, sigma)


def _check(kind: str) -> None:
    if kind == PRECONDITIONED:
        raise ValueError(
            "this scheduler preconditions its model (EDM, consistency models), so the denoised prediction is none of "
            f"{', '.join(KINDS)}; rules in x0 space cannot work with it, those in the native space can"
        )
    if kind not in KINDS:
        raise ValueError(f"parametrisation {kind!r} is unknown: {nearest(kind, KINDS)}")


def slope(level: Level, kind: str):
    """k in x0 = base - k * out (arXiv 2410.02416 works on x0; this brings an update back to the output)."""
    _check(kind)
    a, s = level
    if kind == "epsilon":
        return s / a
    if kind == "v_prediction":
        return s / (a * a + s * s)
    if kind == "flow_prediction":
        return s / (a + s)
    return -1.0


def to_x0(out: torch.Tensor, x: torch.Tensor, level: Level, kind: str) -> torch.Tensor:
    """Denoised prediction [B, ...] from the output and the model's input x_t, both [B, ...]."""
    k = slope(level, kind)
    a, s = level
    if kind == "sample":
        return out
    if kind == "epsilon":
        return x / a - k * out
    if kind == "v_prediction":
        return a / (a * a + s * s) * x - k * out
    return x / (a + s) - k * out


def from_x0(x0: torch.Tensor, x: torch.Tensor, level: Level, kind: str) -> torch.Tensor:
    """Inverse of `to_x0`. Needs sigma > 0 unless kind is 'sample'."""
    _check(kind)
    a, s = level
    if kind == "sample":
        return x0
    if kind == "epsilon":
        return (x - a * x0) / s
    if kind == "v_prediction":
        return (a * x - (a * a + s * s) * x0) / s
    return (x - (a + s) * x0) / s


def convert(out: torch.Tensor, x: torch.Tensor, level: Level, source: str, target: str) -> torch.Tensor:
    """Output in parametrisation `source` -> the same prediction in `target`."""
    if source == target:
        _check(source)
        return out
    return from_x0(to_x0(out, x, level, source), x, level, target)


def is_flow(scheduler) -> bool:
    """Whether a diffusers scheduler samples the flow x_t = (1 - sigma) x0 + sigma eps."""
    config = scheduler.config
    return (
        type(scheduler).__name__.startswith("Flow")
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas"))
    )


def prediction_kind(scheduler) -> str:
    """Parametrisation that a diffusers scheduler expects of its model."""
    if is_flow(scheduler):
        return "flow_prediction"
    if "sigma_data" in scheduler.config:
        return PRECONDITIONED
    kind = scheduler.config.get("prediction_type", "epsilon")
    _check(kind)
    return kind


def noise_level(scheduler, timestep) -> Level:
    """Level of the denoiser's input at a timestep of the scheduler's running schedule.

    The input, not the scheduler's sample: Euler-like schedulers hold x0 + sigma eps and divide by sqrt(1 + sigma^2) before
    the model sees it (`scale_model_input`), which makes it VP.
    """
    if getattr(scheduler, "sigmas", None) is None:
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{type(scheduler).__name__} has neither sigmas nor alphas_cumprod, so its noise level is unknown"
            )
        alpha_bar = float(scheduler.alphas_cumprod[int(timestep)])
        return Level(alpha_bar**0.5, (1 - alpha_bar) ** 0.5)
    index = scheduler.step_index
    if index is None:
        index = scheduler.begin_index
    if index is None:
        index = scheduler.index_for_timestep(timestep)
    sigma = float(scheduler.sigmas[index])
    if is_flow(scheduler):
        return Level.flow(1 - sigma if scheduler.config.get("invert_sigmas") else sigma)  # Mochi's run from 0 to 1
    if not getattr(scheduler, "state_in_first_order", True):  # the second evaluation of KDPM2 and DPMSolverSDE
        middle = getattr(scheduler, "sigmas_interpol", None)  # Heun's second one is an entry of its sigmas
        sigma = float(middle[index] if middle is not None else getattr(scheduler, "mid_point_sigma", sigma))
    alpha = (1 + sigma * sigma) ** -0.5
    return Level(alpha, sigma * alpha)
