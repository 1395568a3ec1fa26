"""What is done to a guided prediction: rescale (arXiv 2305.08891)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffgen.pipelines.base import Wrapper, per_sample, real, require
from diffgen.registry import register
from diffgen.tap import StepInfo


def rescale(guided: torch.Tensor, cond: torch.Tensor, phi: float) -> torch.Tensor:
    """phi g std(c) / std(g) + (1 - phi) g, standard deviations per sample (unbiased). arXiv 2305.08891, section 3.4."""
    ratio = cond.flatten(1).std(1) / guided.flatten(1).std(1)
    return phi * (guided * per_sample(ratio, guided)) + (1 - phi) * guided


@register("guidance", "rescale", paper="2305.08891")
@dataclass
class Rescale(Wrapper):
    """Any rule's prediction brought towards the standard deviation of the conditional one: pipelines' guidance_rescale.

    phi in [0, 1]: 0 leaves the rule as it is; the paper recommends 0.7 (v-prediction, zero terminal SNR).
    """

    phi: float = 0.7

    def __post_init__(self):
        super().__post_init__()
        require(self, "phi", real(self.phi) and 0 <= self.phi <= 1, "in [0, 1]")

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        guided = self.inner(cond, uncond, step)
        return rescale(guided, cond, self.phi) if self.phi else guided
