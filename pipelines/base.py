"""What a guidance rule is: a small dataclass, called with (cond, uncond, step). A new rule is a file beside this one."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from diffgen.tap import Alter, StepInfo


@dataclass
class Guidance:
    """Base of all rules. scale w: 1 is the conditional prediction alone (pipelines then run no CFG at all).

    A subclass writes __call__(cond, uncond, step) -> guided, all [B, ...] in the denoiser's own parametrisation, and may
    keep memory in step.state (tensors [B, ...]; it is emptied at the start of each pipeline call).
    """

    scale: float = 7.5

    def __post_init__(self):
        require(self, "scale", real(self.scale) and 0 <= self.scale <= 1000, "a number in [0, 1000]")
        self.scale = float(self.scale)

    @property
    def active(self) -> bool:
        """Whether the pipeline has to run CFG for this rule to have something to guide."""
        return self.scale > 1

    def wants_uncond(self, step: StepInfo) -> torch.Tensor | bool:
        """Which samples need the unconditional prediction: bool, or bool [B]. Where not, uncond is cond."""
        return True

    def extra(self, step: StepInfo) -> dict[str, Alter]:
        """Further evaluations that the rule needs at this step (see diffgen/tap.py); found in step.extra by name."""
        return {}

    def begin(self, pipe, step: StepInfo) -> None:
        """Called before the first guided step of a pipeline call. Raises ValueError where the rule doesn't fit."""

    def with_scale(self, scale: float) -> Guidance:
        return dataclasses.replace(self, scale=scale)

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        raise NotImplementedError


@dataclass
class Wrapper(Guidance):
    """Base of rules around another rule: AdaptiveGuidance(APG(10)). A number stands for CFG at that scale.

    A subclass changes what it is about, the evaluations, the predictions or the result, and leaves the rest to self.rule.
    """

    scale: float = field(init=False, repr=False, compare=False)
    rule: Guidance | float = 7.5

    def __post_init__(self):
        if isinstance(self.rule, numbers.Real) and not isinstance(self.rule, bool):
            from diffgen.pipelines.cfg import CFG

            self.rule = CFG(float(self.rule))
        if not isinstance(self.rule, Guidance):
            raise TypeError(f"{type(self).__name__}.rule must be a Guidance or a scale, got {self.rule!r}")
        self.inner: Guidance = self.rule
        self.scale = self.inner.scale

    @property
    def inside(self) -> list[Guidance]:
        """All rules that this one goes around, outermost first."""
        return [self.inner, *(self.inner.inside if isinstance(self.inner, Wrapper) else [])]

    @property
    def active(self) -> bool:
        return self.inner.active

    def wants_uncond(self, step: StepInfo) -> torch.Tensor | bool:
        return self.inner.wants_uncond(step)

    def extra(self, step: StepInfo) -> dict[str, Alter]:
        return self.inner.extra(step)

    def begin(self, pipe, step: StepInfo) -> None:
        self.inner.begin(pipe, step)

    def with_scale(self, scale: float) -> Guidance:
        return dataclasses.replace(self, rule=self.inner.with_scale(scale))

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        return self.inner(cond, uncond, step)


def require(rule: Guidance, name: str, valid: bool, expected: str) -> None:
    """Raises ValueError naming the field, its value and what was expected, unless `valid`."""
    if not valid:
        raise ValueError(f"{type(rule).__name__}.{name} must be {expected}, got {getattr(rule, name)!r}")


def real(value: object) -> bool:
    """Whether it is a finite number (True and False are not)."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond the floats
        return False


def whole(value: object) -> bool:
    """Whether it is a whole number (True and False are not)."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def batches(prompts: Sequence[str], size: int) -> list[list[str]]:
    """Prompts in batches. Raises ValueError for none, for a single string, and for a size below 1."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of texts, got the text {prompts!r}")
    if not len(prompts):
        raise ValueError("at least one prompt is needed, got none")
    if not whole(size) or size < 1:
        raise ValueError(f"batch_size must be a whole number >= 1, got {size!r}")
    return [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]


def per_sample(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, ...] with as many dimensions as `like`."""
    return x.view(-1, *[1] * (like.ndim - 1))


def wide(x: torch.Tensor) -> torch.Tensor:
    """float64, in which rules do their mathematics; float32 on MPS, which has no more."""
    return x.float() if x.device.type == "mps" else x.double()


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner product of each sample [B, ...] -> [B]."""
    return (wide(a) * wide(b)).flatten(1).sum(1)


def cfg(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """u + w (c - u), as the pipelines write it: what neutral options of other rules must be, bit for bit."""
    return uncond + scale * (cond - uncond)
