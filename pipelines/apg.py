"""Adaptive projected guidance (arXiv 2410.02416)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from diffgen.parametrization import slope, to_x0
from diffgen.pipelines.base import Guidance, cfg, real, require, whole, wide
from diffgen.registry import register
from diffgen.tap import StepInfo


def projected_update(d: torch.Tensor, direction: torch.Tensor, eta: float, norm_threshold: float) -> torch.Tensor:
    """Difference d [B, ...], clipped to norm_threshold and with its part along `direction` weighted by eta.

    d <- d * min(1, r / |d|) (r = 0: no clipping), U = perpendicular + eta * parallel. Norms and projections are per
    sample over all other dimensions, in float64.
    """
    flat, e = wide(d).flatten(1), wide(direction).flatten(1)
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
    r, its part parallel to D_c weighted by eta. Defaults as the paper recommends for SDXL: eta 0, beta -0.5 (scale 15
    there), and r 15, carried over to other latents: norm_threshold "auto" is 15 sqrt(numel / 65536), 7.5 for SD 1.5.
    eta = 1, norm_threshold = 0, momentum = 0 is CFG, bit for bit. space "native" works on the raw output, as diffusers'
    AdaptiveProjectedGuidance(use_original_formulation=True) with scale - 1 does. arXiv 2410.02416.

    form "diffusers" is D = D_u + w U, that guider's default in the native space: another method where eta isn't 1 or the
    clip acts, and not D_c at w = 1. The first cfg_steps steps are CFG at cfg_scale while the momentum gathers
    (HunyuanImage 2.1, of 50 steps: APG(10, norm_threshold=10, space="native", form="diffusers", cfg_steps=6); diffusers'
    AdaptiveProjectedMixGuidance counts them from 0, its start_step is cfg_steps - 1).
    """

    eta: float = 0.0
    momentum: float = -0.5
    norm_threshold: float | str = "auto"
    space: str = "x0"
    form: str = "paper"
    cfg_steps: int = 0
    cfg_scale: float = 3.5

    def __post_init__(self):
        super().__post_init__()
        r = self.norm_threshold
        valid = r == "auto" if isinstance(r, str) else real(r) and r >= 0
        require(self, "norm_threshold", valid, "a number >= 0 (0: off) or 'auto'")
        require(self, "momentum", real(self.momentum) and -1 < self.momentum < 1, "in (-1, 1)")
        require(self, "eta", real(self.eta), "finite")
        require(self, "space", self.space in ("x0", "native"), "'x0' or 'native'")
        require(self, "form", self.form in ("paper", "diffusers"), "'paper' or 'diffusers'")
        require(self, "cfg_steps", whole(self.cfg_steps) and self.cfg_steps >= 0, "a whole number >= 0")
        require(self, "cfg_scale", real(self.cfg_scale) and 0 <= self.cfg_scale <= 1000, "a number in [0, 1000]")

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        if self.eta == 1 and not self.norm_threshold and not self.momentum:
            return self._cfg(cond, uncond, step)
        if cond.shape != uncond.shape:
            raise ValueError(f"APG: cond {tuple(cond.shape)} and uncond {tuple(uncond.shape)} must have one shape")
        k, direction = -1.0, cond
        if self.space == "x0" and step.kind != "sample":
            k = max(slope(step.level, step.kind), 1e-4)
            direction = to_x0(wide(cond), wide(step.x), step.level, step.kind)
        d = -k * (wide(cond) - wide(uncond))  # D_c - D_u
        if self.momentum:
            if step.order > 1:
                raise ValueError(
                    f"APG.momentum={self.momentum} with a scheduler of order {step.order} would gather every evaluation, not "
                    "every step; use momentum=0 or a first-order scheduler"
                )
            d = step.state["momentum"] = d + self.momentum * step.state.get("momentum", torch.zeros_like(d))
        if step.index < self.cfg_steps:
            return self._cfg(cond, uncond, step)
        r = self.norm_threshold
        r = 15 * math.sqrt(cond[0].numel() / 65536) if r == "auto" else float(r)
        update = projected_update(d, direction, self.eta, r)
        base, w = (cond, self.scale - 1) if self.form == "paper" else (uncond, self.scale)
        return (wide(base) - w * update / k).to(cond.dtype)

    def _cfg(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        w = self.cfg_scale if step.index < self.cfg_steps else self.scale
        return cfg(cond, uncond, w)
