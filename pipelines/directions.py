"""Rules that change the unconditional prediction before another rule combines it with the conditional one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffgen.pipelines.base import Wrapper, dot, per_sample, require, whole
from diffgen.pipelines.perturbed import AutoGuidance
from diffgen.registry import register
from diffgen.tap import Alter, StepInfo


def _refuse_autoguidance(rule: Wrapper) -> None:
    if any(isinstance(r, AutoGuidance) for r in rule.inside):
        name = type(rule).__name__
        raise ValueError(f"{name} changes u, which AutoGuidance inside it discards: AutoGuidance({name}(...)) works")


@register("guidance", "zero_star", paper="2503.18886")
@dataclass
class ZeroStar(Wrapper):
    """CFG-Zero*: the unconditional prediction scaled to fit the conditional one, and no movement in the first steps.

    u <- s u with s = <c, u> / (|u|^2 + 1e-8) per sample, then the rule (CFG: s u + w (c - s u), the paper). The first
    zero_steps (1, the paper's zero-init) return 0 and evaluate no u. For flow models, where a zero velocity leaves the
    latent where it is; elsewhere use zero_steps=0. k here is the number of zeroed steps, as diffusers' zero_init_steps;
    the authors' code zeroes zero_steps + 1. zero_steps = 0 and u parallel to c: c. arXiv 2503.18886.
    """

    zero_steps: int = 1

    def __post_init__(self):
        super().__post_init__()
        require(self, "zero_steps", whole(self.zero_steps) and self.zero_steps >= 0, "a whole number >= 0")

        _refuse_autoguidance(self)

    def begin(self, pipe, step: StepInfo) -> None:
        if self.zero_steps and step.kind != "flow_prediction":
            raise ValueError(
                f"ZeroStar.zero_steps={self.zero_steps}: a prediction of 0 means standing still for flow models only, and this "
                f"one predicts {step.kind}; use zero_steps=0"
            )
        super().begin(pipe, step)

    def wants_uncond(self, step: StepInfo) -> torch.Tensor | bool:
        return False if step.index < self.zero_steps else self.inner.wants_uncond(step)

    def extra(self, step: StepInfo) -> dict[str, Alter]:
        return {} if step.index < self.zero_steps else self.inner.extra(step)

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        if step.index < self.zero_steps:
            return cond * 0  # with a gradient, of 0, so that training can replay the step
        s = dot(cond, uncond) / (dot(uncond, uncond) + 1e-8)
        return self.inner(cond, (per_sample(s, uncond) * uncond).to(uncond.dtype), step)


def tangential(cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    """Projection of u on the first right singular vector of the 2 x n matrix [c; u], per sample; float64.

    With the first eigenvector a of the 2 x 2 Gram matrix it is a_2 (a_1 c + a_2 u), and a = (cos t, sin t) with
    tan 2t = 2 <c,u> / (|c|^2 - |u|^2). Where that is 0 / 0 (orthogonal and of equal norm: any direction is first), u / 2.
    """
    cc, cu, uu = dot(cond, cond), dot(cond, uncond), dot(uncond, uncond)
    r = torch.hypot(cc - uu, 2 * cu).clamp_min(torch.finfo(cc.dtype).tiny)
    on_c, on_u = cu / r, (1 - (cc - uu) / r) / 2
    return per_sample(on_c, cond) * cond + per_sample(on_u, uncond) * uncond


@register("guidance", "tcfg", paper="2503.18137")
@dataclass
class TCFG(Wrapper):
    """Tangential CFG: only that part of the unconditional prediction which lies along the main direction of both.

    u <- <u, v> v, v the first right singular vector of [c; u] (2 x n) per sample, then the rule (CFG: the paper).
    u parallel to c: the rule alone. arXiv 2503.18137.
    """

    def __post_init__(self):
        super().__post_init__()
        _refuse_autoguidance(self)

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        return self.inner(cond, tangential(cond, uncond).to(uncond.dtype), step)
