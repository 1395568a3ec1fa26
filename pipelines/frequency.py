"""Frequency-decoupled guidance: one scale for each level of a Laplacian pyramid (arXiv 2506.19713)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from diffgen.parametrization import to_x0
from diffgen.pipelines.apg import projected_update
from diffgen.pipelines.base import Guidance, cfg, real, require
from diffgen.registry import register
from diffgen.tap import StepInfo


def blur(x: torch.Tensor) -> torch.Tensor:
    """[N, 1, H, W] through the binomial 5 x 5 filter, reflected at the borders (H, W >= 3)."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=x.dtype, device=x.device) / 16
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), torch.outer(row, row)[None, None])


def expand(x: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """A level [N, 1, h, w] on the grid of the finer one."""
    return blur(F.interpolate(x, size=size, mode="bilinear"))


def pyramid(x: torch.Tensor, levels: int) -> list[torch.Tensor]:
    """Laplacian pyramid of [N, 1, H, W], fine to coarse; level i has H // 2^i rows. The last one is what remains."""
    result = []
    for _ in range(levels - 1):
        h, w = x.shape[-2:]
        coarse = F.interpolate(blur(x), size=(h // 2, w // 2), mode="bilinear")
        result.append(x - expand(coarse, x.shape[-2:]))
        x = coarse
    return [*result, x]


def rebuild(levels: list[torch.Tensor]) -> torch.Tensor:
    """Inverse of `pyramid`."""
    x = levels[-1]
    for level in levels[-2::-1]:
        x = level + expand(x, level.shape[-2:])
    return x


@register("guidance", "fdg", paper="2506.19713")
@dataclass
class FDG(Guidance):
    """CFG with a scale of its own for each band of frequencies: detail from a high one, composition from a low one.

    g = c + rebuild((w_i - 1) U_i) over the levels i of a Laplacian pyramid; U_i is the level of c - u, with its part
    parallel to that of D_c weighted by parallel_i. scales w_i fine to coarse ((10, 5), the paper's for SDXL), parallel (1,
    off; one for all, or one a level). space "x0" projects on the denoised prediction, as in the paper; "native" on the raw
    output, as diffusers' FrequencyDecoupledGuidance(use_original_formulation=True) with scales - 1 does. Without
    projection both are the same. Frames of a video are filtered one by one. Equal scales with parallel 1: CFG, bit for bit.
    A guidance_scale in a call is the largest of the scales; the others keep their ratio to it. arXiv 2506.19713.
    """

    scale: float = field(init=False, repr=False, compare=False)
    scales: tuple[float, ...] = (10.0, 5.0)
    parallel: tuple[float, ...] | float = 1.0
    space: str = "x0"

    def __post_init__(self):
        def numbers_within(value, low, high):
            return all(real(x) and low <= x <= high for x in value)

        for name in ("scales", "parallel"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))
        valid = isinstance(self.scales, tuple) and len(self.scales) > 0 and numbers_within(self.scales, 0, 1000)
        require(self, "scales", valid, "numbers in [0, 1000], from the highest frequency to the lowest")
        n = len(self.scales)
        weights = self.parallel if isinstance(self.parallel, tuple) else (self.parallel,) * n
        valid = len(weights) == n and numbers_within(weights, float("-inf"), float("inf"))
        require(self, "parallel", valid, f"a finite number, or {n} of them: one for each of the scales")
        require(self, "space", self.space in ("x0", "native"), "'x0' or 'native'")
        self._weights = weights
        self.scale = max(self.scales)
        super().__post_init__()

    @property
    def active(self) -> bool:
        return any(w != 1 for w in self.scales)

    def with_scale(self, scale: float) -> Guidance:
        top = self.scale
        return dataclasses.replace(self, scales=tuple(scale if w == top else w * scale / top for w in self.scales))

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        if len({*self.scales}) == 1 and {*self._weights} == {1}:
            return cfg(cond, uncond, self.scale)
        levels = len(self.scales)
        self._check(cond, levels)
        c = cond.to(torch.promote_types(cond.dtype, torch.float32))
        updates = pyramid(_grid(c - uncond), levels)
        if {*self._weights} != {1}:
            base = to_x0(c, step.x.to(c.dtype), step.level, step.kind) if self.space == "x0" else c
            for i, direction in enumerate(pyramid(_grid(base), levels)):
                u, e = (x.reshape(len(cond), -1) for x in (updates[i], direction))
                updates[i] = projected_update(u, e, self._weights[i], 0.0).view_as(updates[i])
        update = rebuild([(w - 1) * u for w, u in zip(self.scales, updates)])
        return (c + update.view_as(c)).to(cond.dtype)

    @staticmethod
    def _check(cond: torch.Tensor, levels: int) -> None:
        if cond.ndim < 4:
            raise ValueError(
                f"FDG needs predictions on a spatial grid, [B, C, H, W] or [B, C, F, H, W], got {tuple(cond.shape)}: packed "
                "latents (Flux, Qwen-Image, LTX) have no grid to take frequencies from"
            )
        least = 3 << (levels - 2) if levels > 1 else 1  # the filter reflects two pixels, at every level but the last
        if min(cond.shape[-2:]) < least:
            h, w = cond.shape[-2:]
            raise ValueError(f"FDG with {levels} scales needs a grid of at least {least} x {least}, got {h} x {w}")


def _grid(x: torch.Tensor) -> torch.Tensor:
    """[B, ..., H, W] -> [N, 1, H, W]: channels and frames are filtered one by one."""
    return x.reshape(-1, 1, *x.shape[-2:])
