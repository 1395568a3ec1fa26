"""What is done to a guided prediction: rescale (arXiv 2305.08891), renorm, dynamic thresholding (arXiv 2205.11487)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffgen.parametrization import slope, to_x0
from diffgen.pipelines.base import Wrapper, per_sample, real, require, wide
from diffgen.registry import register
from diffgen.tap import StepInfo


def rescale(guided: torch.Tensor, cond: torch.Tensor, phi: float) -> torch.Tensor:
    """phi g std(c) / std(g) + (1 - phi) g, standard deviations per sample (unbiased). arXiv 2305.08891, section 3.4.

    A constant g (the zeros of ZeroStar) stays as it is.
    """
    std = guided.flatten(1).std(1)
    ratio = torch.where(std > 0, cond.flatten(1).std(1) / std, 1.0)
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


@register("guidance", "renorm")
@dataclass
class Renorm(Wrapper):
    """Any rule's prediction brought to the norm of the conditional one, as Lumina-Image 2.0 and Qwen-Image do.

    per "sample": g min(1, rho |c| / |g|), norms over all of a sample (CFG-Renorm of Lumina-Image 2.0; Z-Image's
    cfg_normalization). per "last": g rho |c| / |g|, norms over the last dimension, so each token of packed latents
    [B, N, C] gets the length that it had (QwenImagePipeline, which does it by itself). rho 1 in both.
    A rho that is large enough leaves "sample" as the rule alone. No paper.
    """

    rho: float = 1.0
    per: str = "sample"

    def __post_init__(self):
        super().__post_init__()
        require(self, "rho", real(self.rho) and self.rho > 0, "a number > 0")
        require(
            self, "per", self.per in ("sample", "last"), "'sample' (a cap) or 'last' (a match, over the last dimension)"
        )

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        if self.per == "last" and cond.ndim > 3:
            raise ValueError(
                f"Renorm.per='last' is for packed latents [B, N, C], got {tuple(cond.shape)}; use per='sample'"
            )
        guided = self.inner(cond, uncond, step)
        dims = -1 if self.per == "last" else tuple(range(1, cond.ndim))
        c, g = (torch.linalg.vector_norm(wide(x), dim=dims, keepdim=True) for x in (cond, guided))
        factor = self.rho * c / g.clamp_min(1e-12)
        return (guided * (factor.clamp_max(1) if self.per == "sample" else factor)).to(guided.dtype)


def quantile(x: torch.Tensor, p: float) -> torch.Tensor:
    """p-quantile of |x| for each sample [B, ...] -> [B]; one by one, as torch.quantile takes no more than 2^24 values."""
    return torch.stack([torch.quantile(row.abs().flatten(), p) for row in x])


@register("guidance", "dynamic_threshold", paper="2205.11487")
@dataclass
class DynamicThreshold(Wrapper):
    """Any rule's denoised prediction clipped to its own percentile and scaled back into a range (Imagen).

    On x0: s = max(quantile(|x0|, percentile), limit) per sample, x0 <- clamp(x0, -s, s) limit / s; brought back to the
    model's output with the slope of the parametrisation. percentile 0.995 (the paper). limit: 1 is the paper's, the range
    of pixels. None, the default, is for latents, which have no range of their own: the same percentile of the
    conditional prediction's |x0| takes its place. percentile = 1 and a limit above all values: the rule alone.
    arXiv 2205.11487, section 2.3.
    """

    percentile: float = 0.995
    limit: float | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self, "percentile", real(self.percentile) and 0 < self.percentile <= 1, "in (0, 1]")
        valid = self.limit is None or (real(self.limit) and self.limit > 0)
        require(self, "limit", valid, "a number > 0, or None for the conditional prediction's own percentile")

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        guided, x = self.inner(cond, uncond, step), wide(step.x)
        x0 = to_x0(wide(guided), x, step.level, step.kind)
        s = quantile(x0, self.percentile)
        if self.limit is None:
            limit = quantile(to_x0(wide(cond), x, step.level, step.kind), self.percentile)
        else:
            limit = torch.full_like(s, self.limit)
        s, limit = per_sample(torch.maximum(s, limit), x0), per_sample(limit, x0)
        clipped = torch.minimum(torch.maximum(x0, -s), s) * (limit / s.clamp_min(1e-12))
        k = -1.0 if step.kind == "sample" else max(slope(step.level, step.kind), 1e-4)
        return (wide(guided) - (clipped - x0) / k).to(guided.dtype)
