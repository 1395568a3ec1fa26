"""When a rule acts, and how strongly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffgen.pipelines.base import Guidance, Wrapper, real, require
from diffgen.pipelines.cfg import CFG
from diffgen.registry import register
from diffgen.tap import Alter, StepInfo


@register("guidance", "interval", paper="2404.07724")
@dataclass
class Interval(Wrapper):
    """Any rule inside an interval of the sampling, the conditional prediction outside, where nothing else is evaluated.

    space "steps": int(start N) <= i < int(stop N) of N steps, as diffusers' guiders. space "sigma": start < sigma / alpha
    <= stop, the paper's noise levels (EDM; for a flow sigma / (1 - sigma)): Interval(CFG(w), 0.28, 5.42, "sigma") is its
    choice for SDXL; stop may be inf. Interval(rule, 0, p) is StepAG (arXiv 2506.08351), guidance in the first steps only.
    start = 0 with stop = 1 (steps) or inf (sigma): the rule alone. arXiv 2404.07724.
    """

    start: float = 0.0
    stop: float = 1.0
    space: str = "steps"

    def __post_init__(self):
        super().__post_init__()
        require(self, "space", self.space in ("steps", "sigma"), "'steps' or 'sigma'")
        steps = self.space == "steps"
        valid = real(self.start) and 0 <= self.start < (1 if steps else math.inf)
        require(self, "start", valid, "in [0, 1), a fraction of the steps" if steps else "a noise level >= 0")
        if self.space == "steps":
            valid = real(self.stop) and self.start < self.stop <= 1
            require(self, "stop", valid, f"in ({self.start:g}, 1], a fraction of the steps")
        else:
            valid = (real(self.stop) or self.stop == math.inf) and self.start < self.stop
            require(self, "stop", valid, f"a noise level above {self.start:g}")

    def begin(self, pipe, step: StepInfo) -> None:
        n = step.num_steps
        if self.space == "steps" and int(self.start * n) >= int(self.stop * n):
            raise ValueError(
                f"Interval from {self.start:g} to {self.stop:g} holds none of {n} steps: nothing would be guided"
            )
        super().begin(pipe, step)

    def _inside(self, step: StepInfo) -> bool:
        if self.space == "steps":
            return int(self.start * step.num_steps) <= step.index < int(self.stop * step.num_steps)
        alpha, sigma = step.level
        return self.start < (float(sigma / alpha) if alpha > 0 else math.inf) <= self.stop

    def wants_uncond(self, step: StepInfo) -> torch.Tensor | bool:
        return self.inner.wants_uncond(step) if self._inside(step) else False

    def extra(self, step: StepInfo) -> dict[str, Alter]:
        return self.inner.extra(step) if self._inside(step) else {}

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        return self.inner(cond, uncond, step) if self._inside(step) else cond


_SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "constant": lambda p, a, b: 1.0,
    "linear": lambda p, a, b: 2 * p,
    "cosine": lambda p, a, b: 1 - math.cos(math.pi * p),
    "beta": lambda p, a, b: (
        p ** (a - 1) * (1 - p) ** (b - 1) * math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
    ),
}


@register("guidance", "scheduled", paper="2404.13040")
@dataclass
class Scheduled(Wrapper):
    """Any rule at a scale that changes over the steps: w_t = 1 + (w - 1) f(p), p = i / (N - 1) the progress.

    shape: "constant" f = 1 (the rule alone); "linear" 2 p and "cosine" 1 - cos(pi p), which rise from 0 to 2
    (arXiv 2404.13040); "beta" the density of Beta(a, b), for a = b = 2 0 at both ends and 1.5 in the middle (the curve of
    beta-CFG, arXiv 2502.10574, without its normalised difference); or a function of p. Each has the mean 1 over p in
    [0, 1]; a single step is at p = 1/2. Where w_t is 1, the unconditional prediction isn't evaluated, and the rule's memory
    stays as it was.
    """

    shape: str | Callable[[float], float] = "linear"
    a: float = 2.0
    b: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        valid = callable(self.shape) or (isinstance(self.shape, str) and self.shape in _SHAPES)
        require(self, "shape", valid, f"{', '.join(map(repr, _SHAPES))} or a function of the progress")
        for name in ("a", "b"):
            require(self, name, real(getattr(self, name)) and getattr(self, name) >= 1, "a number >= 1")

    def _at(self, step: StepInfo) -> Guidance:
        """The rule at this step's scale."""
        p = step.index / (step.num_steps - 1) if step.num_steps > 1 else 0.5
        f = _SHAPES[self.shape](p, self.a, self.b) if isinstance(self.shape, str) else self.shape(p)
        if not real(f):
            raise ValueError(f"Scheduled.shape must give a number, got {f!r} at progress {p:g}")
        scale = 1 + (self.scale - 1) * f
        if not 0 <= scale <= 1000:
            raise ValueError(
                f"Scheduled.shape gives {f!r} at progress {p:g}, a scale of {scale:g}; it must be in [0, 1000]"
            )
        return self.inner if f == 1 else self.inner.with_scale(scale)

    def wants_uncond(self, step: StepInfo) -> torch.Tensor | bool:
        rule = self._at(step)
        return rule.wants_uncond(step) if rule.scale != 1 else False

    def extra(self, step: StepInfo) -> dict[str, Alter]:
        return self._at(step).extra(step)

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        rule = self._at(step)
        if rule.scale == 1:  # u is c here: nothing that the rule should remember
            step = replace(step, state=dict(step.state))
        return rule(cond, uncond, step)


@dataclass
class Experts(Wrapper):
    """One rule for the first denoiser, another for the second (Wan 2.2): what guidance_scale_2 means under guide()."""

    second: Any = None

    def __post_init__(self):
        super().__post_init__()
        if real(self.second):
            self.second = CFG(self.second)
        require(self, "second", isinstance(self.second, Guidance), "a Guidance or a scale")

    @property
    def active(self) -> bool:
        return self.inner.active or (self.second is not None and self.second.active)

    def begin(self, pipe, step: StepInfo) -> None:
        self.inner.begin(pipe, step)
        assert self.second is not None
        self.second.begin(pipe, replace(step, denoiser=f"{step.denoiser.removesuffix('_2')}_2"))

    def _of(self, step: StepInfo) -> Guidance:
        return self.second if step.denoiser.endswith("_2") and self.second is not None else self.inner

    def wants_uncond(self, step: StepInfo) -> torch.Tensor | bool:
        rule = self._of(step)
        return rule.wants_uncond(step) if rule.active else False

    def extra(self, step: StepInfo) -> dict[str, Alter]:
        return self._of(step).extra(step)

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        return self._of(step)(cond, uncond, step)
