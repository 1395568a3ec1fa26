"""Adaptive projected guidance (arXiv 2410.02416)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from diffgen.parametrization import slope, to_x0
from diffgen.pipelines.base import Guidance
from diffgen.registry import register
from diffgen.tap import StepInfo


def projected_update(d: torch.Tensor, direction: torch.Tensor, eta: float, norm_threshold: float) -> torch.Tensor:
    """Difference d [B, ...], clipped to norm_threshold and with its part along `direction` weighted by eta.

    d <- d * min(1, r / |d|) (r = 0: no clipping), U = perpendicular + eta * parallel. Norms and projections are per
    sample over all other dimensions, in float64.
    """
    flat, e = d.double().flatten(1), direction.double().flatten(1)
    if norm_threshold > 0:
        norm = flat.norm(dim=1, keepdim=True)
        flat = flat * (norm_threshold / norm.clamp_min(1e-12)).clamp_max(1)
    e = torch.nn.functional.normalize(e, dim=1)
    parallel = (flat * e).sum(1, keepdim=True) * e
    return (flat - (1 - eta) * parallel).view_as(d).to(d.dtype)


@register("guidance", "apg", paper="2410.02416")
@dataclass
class APG(Guidance):
    """D = D_c + (w - 1) U, on denoised predictions: less saturation at high scales.

    U is the difference D_c - D_u, with momentum m_i = d_i + beta m_{i-1} (the buffer keeps it unclipped), clipped to norm
    r, its part parallel to D_c weighted by eta. Defaults as the paper recommends for SDXL: eta 0, r 15, beta -0.5 (scale
    15 there). norm_threshold "auto" is 15 sqrt(numel / 65536), SDXL's r carried over to the latent's size.
    eta = 1, norm_threshold = 0, momentum = 0 is CFG, bit for bit. space "native" works on the raw output, as diffusers'
    AdaptiveProjectedGuidance(use_original_formulation=True) with scale - 1 does. arXiv 2410.02416.
    """

    eta: float = 0.0
    momentum: float = -0.5
    norm_threshold: float | str = 15.0
    space: str = "x0"

    def __post_init__(self):
        super().__post_init__()
        if self.norm_threshold != "auto" and not (
            isinstance(self.norm_threshold, (int, float)) and 0 <= self.norm_threshold < math.inf
        ):
            raise ValueError(
                f"APG.norm_threshold must be a number >= 0 (0: off) or 'auto', got {self.norm_threshold!r}"
            )
        if not -1 < self.momentum < 1:
            raise ValueError(f"APG.momentum must be in (-1, 1), got {self.momentum!r}")
        if not math.isfinite(self.eta):
            raise ValueError(f"APG.eta must be finite, got {self.eta!r}")
        if self.space not in ("x0", "native"):
            raise ValueError(f"APG.space must be 'x0' or 'native', got {self.space!r}")

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        if self.eta == 1 and not self.norm_threshold and not self.momentum:
            return uncond + self.scale * (cond - uncond)
        if cond.shape != uncond.shape:
            raise ValueError(f"APG: cond {tuple(cond.shape)} and uncond {tuple(uncond.shape)} must have one shape")
        k, direction = -1.0, cond
        if self.space == "x0" and step.kind != "sample":
            k = max(slope(step.level, step.kind), 1e-4)
            direction = to_x0(cond.double(), step.x.double(), step.level, step.kind)
        d = -k * (cond.double() - uncond.double())  # D_c - D_u
        if self.momentum:
            if step.order > 1:
                raise ValueError(
                    f"APG.momentum={self.momentum} with a scheduler of order {step.order} would gather every evaluation, not "
                    "every step; use momentum=0 or a first-order scheduler"
                )
            d = step.state["momentum"] = d + self.momentum * step.state.get("momentum", torch.zeros_like(d))
        r = self.norm_threshold
        r = 15 * math.sqrt(cond[0].numel() / 65536) if r == "auto" else float(r)
        update = projected_update(d, direction, self.eta, r)
        return (cond.double() - (self.scale - 1) * update / k).to(cond.dtype)
