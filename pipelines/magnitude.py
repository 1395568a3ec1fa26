"""MAMBO-G: a scale that falls where the two predictions are far apart (arXiv 2508.03442)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffgen.pipelines.base import Guidance, cfg, per_sample, real, require, wide
from diffgen.registry import register
from diffgen.tap import StepInfo


@register("guidance", "mag", paper="2508.03442")
@dataclass
class MaG(Guidance):
    """g = u + w_t (c - u) with w_t = 1 + (w - 1) exp(-alpha |c - u| / |u|), per sample: weak where CFG would overshoot.

    scale w (10) and alpha (8) as in diffusers' MagnitudeAwareGuidance. u = 0: w_t = 1; alpha = 0: CFG, bit for bit.
    arXiv 2508.03442 (MAMBO-G).
    """

    scale: float = 10.0
    alpha: float = 8.0

    def __post_init__(self):
        super().__post_init__()
        require(self, "alpha", real(self.alpha) and self.alpha >= 0, "a number >= 0")

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        if not self.alpha:
            return cfg(cond, uncond, self.scale)
        d, u = wide(cond) - wide(uncond), wide(uncond)
        ratio = d.flatten(1).norm(dim=1) / u.flatten(1).norm(dim=1).clamp_min(1e-12)
        w = 1 + (self.scale - 1) * torch.exp(-self.alpha * ratio)
        return (u + per_sample(w, u) * d).to(cond.dtype)
