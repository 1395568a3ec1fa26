"""When a rule acts, and how strongly."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffgen.pipelines.base import Guidance, Wrapper, require
from diffgen.tap import Alter, StepInfo


@dataclass
class Experts(Wrapper):
    """One rule for the first denoiser, another for the second (Wan 2.2): what guidance_scale_2 means under guide()."""

    second: Guidance | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self, "second", isinstance(self.second, Guidance), "a Guidance")

    def _of(self, step: StepInfo) -> Guidance:
        return self.second if step.denoiser.endswith("_2") and self.second is not None else self.inner

    def wants_uncond(self, step: StepInfo) -> torch.Tensor | bool:
        return self._of(step).wants_uncond(step)

    def extra(self, step: StepInfo) -> dict[str, Alter]:
        return self._of(step).extra(step)

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        return self._of(step)(cond, uncond, step)
