"""What a guidance rule is: a small dataclass, called with (cond, uncond, step). A new rule is a file beside this one."""

from __future__ import annotations

import dataclasses
import math
import numbers
from dataclasses import dataclass

import torch

from diffgen.tap import StepInfo


@dataclass
class Guidance:
    """Base of all rules. scale w: 1 is the conditional prediction alone (pipelines then run no CFG at all).

    A subclass writes __call__(cond, uncond, step) -> guided, all [B, ...] in the denoiser's own parametrisation, and may
    keep memory in step.state (tensors [B, ...]; it is emptied at the start of each pipeline call).
    """

    scale: float = 7.5

    def __post_init__(self):
        number = isinstance(self.scale, numbers.Real) and not isinstance(self.scale, bool)
        if not number or not math.isfinite(self.scale) or self.scale < 0:
            raise ValueError(f"{type(self).__name__}.scale must be a finite number >= 0, got {self.scale!r}")

    def wants_uncond(self, step: StepInfo) -> torch.Tensor | bool:
        return True

    def with_scale(self, scale: float) -> Guidance:
        return dataclasses.replace(self, scale=scale)

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        raise NotImplementedError


def per_sample(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, ...] with as many dimensions as `like`."""
    return x.view(-1, *[1] * (like.ndim - 1))
