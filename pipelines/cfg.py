"""Classifier-free guidance (arXiv 2207.12598) and its rescale (arXiv 2305.08891)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffgen.pipelines.base import Guidance, cfg, real, require
from diffgen.pipelines.post import rescale
from diffgen.registry import register
from diffgen.tap import StepInfo


@register("guidance", "cfg", paper="2207.12598")
@dataclass
class CFG(Guidance):
    """g = u + w (c - u); with rescale phi: phi * g * std(c) / std(g) + (1 - phi) * g, stds per sample.

    scale w (7.5; 1 is conditional only), rescale phi in [0, 1] (0, off; the paper recommends 0.7 for v-prediction with
    zero terminal SNR). arXiv 2207.12598, 2305.08891.
    """

    rescale: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require(self, "rescale", real(self.rescale) and 0 <= self.rescale <= 1, "in [0, 1]")

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        guided = cfg(cond, uncond, self.scale)
        return rescale(guided, cond, self.rescale) if self.rescale else guided
