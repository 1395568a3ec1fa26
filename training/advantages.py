"""From rewards to advantages. All group statistics are computed here, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat

from diffgen.registry import register
from diffgen.training.rollout import Rollout


def group_mean(values: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Mean of each sample's group over its values that aren't NaN, float64 [B]."""
    values = values.double()
    total = torch.zeros(int(group.max()) + 1, dtype=torch.float64)
    count = total.clone().index_add_(0, group, (~values.isnan()).double())
    return (total.index_add_(0, group, values.nan_to_num(0.0)) / count)[group]


def group_std(values: torch.Tensor, group: torch.Tensor, std: str = "population") -> torch.Tensor:
    """Standard deviation of each sample's group, float64 [B]; std is "population" (divisor K) or "unbiased" (K - 1)."""
    if std not in ("population", "unbiased"):
        raise ValueError(f"std must be 'population' or 'unbiased', got {std!r}")
    variance = group_mean((values.double() - group_mean(values, group)).square(), group)
    if std == "unbiased":
        count = group_size(values, group)
        variance = variance * count / (count - 1).clamp_min(1)
    return variance.sqrt()


def group_size(values: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Values of each sample's group that aren't NaN, float64 [B]."""
    n = int(group.max()) + 1
    return torch.zeros(n, dtype=torch.float64).index_add_(0, group, (~values.isnan()).double())[group]


@register("advantage", "group", paper="2505.05470")
def group(
    rewards: torch.Tensor,
    group: torch.Tensor,
    rollout: Rollout | None = None,
    *,
    std: Literal["population", "unbiased"] = "population",
    global_std: bool = False,
    eps: NonNegativeFloat = 1e-4,
    clip: PositiveFloat = 5.0,
) -> torch.Tensor:
    """A = (R - mean of the group) / (std + eps), clipped to +-clip (Flow-GRPO, GRPO 2402.03300).

    rewards [B] float, group [B] int64 -> [B] float32. std "population" as flow_grpo, "unbiased" as TRL and verl; global_std
    takes the std of the whole batch (most published Flow-GRPO configs).
    """
    scale = group_std(rewards, torch.zeros_like(group) if global_std else group, std)
    return ((rewards.double() - group_mean(rewards, group)) / (scale + eps)).clamp(-clip, clip).float()


def combine(rollout: Rollout, weights: dict[str, float], function: Callable) -> torch.Tensor:
    """Advantage of a rollout's rewards: each is normalised by itself in its group, then weighted and summed -> [B].

    Whatever the function: a sample whose reward is NaN (does not apply), and a group whose rewards are equal up to float32
    rounding or that has one value only, get exactly 0.
    """
    group, total = rollout.group, torch.zeros(len(rollout.group))
    for name, values in rollout.rewards.items():
        equal = group_std(values, group) <= 4 * torch.finfo(torch.float32).eps * group_mean(values.abs(), group)
        nothing = values.isnan() | equal | (group_size(values, group) < 2)
        total = total + weights[name] * torch.where(nothing, 0.0, function(values, group, rollout))
    return total
