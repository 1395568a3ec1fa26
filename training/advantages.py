"""From rewards to advantages. All group statistics are computed here, in float64."""

from __future__ import annotations

from typing import Literal

import torch

from diffgen.registry import register


def group_mean(values: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Mean of each sample's group, [B]."""
    n = int(group.max()) + 1
    count = torch.bincount(group, minlength=n).double()
    return (torch.zeros(n, dtype=torch.float64).index_add_(0, group, values.double()) / count)[group]


def group_std(values: torch.Tensor, group: torch.Tensor, std: str = "population") -> torch.Tensor:
    """Standard deviation of each sample's group, [B]; std is "population" (divisor K) or "unbiased" (K - 1)."""
    if std not in ("population", "unbiased"):
        raise ValueError(f"std must be 'population' or 'unbiased', got {std!r}")
    variance = group_mean((values.double() - group_mean(values, group)).square(), group)
    if std == "unbiased":
        count = torch.bincount(group).double()[group]
        variance = variance * count / (count - 1).clamp_min(1)
    return variance.sqrt()


@register("advantage", "group", paper="2505.05470")
def group(
    rewards: torch.Tensor,
    group: torch.Tensor,
    *,
    std: Literal["population", "unbiased"] = "population",
    global_std: bool = False,
    eps: float = 1e-4,
    clip: float = 5.0,
) -> torch.Tensor:
    """A = (R - mean of the group) / (std + eps), clipped to +-clip (Flow-GRPO, GRPO 2402.03300).

    rewards [B] float, group [B] int64 -> [B] float32. std "population" as flow_grpo, "unbiased" as TRL and verl; global_std
    takes the std of the whole batch (most published Flow-GRPO configs). A group of equal rewards gets exactly 0; NaN
    (reward does not apply) gets 0 and stays out of the statistics.
    """
    valid = ~rewards.isnan()
    advantage = torch.zeros(len(rewards), dtype=torch.float64)
    if valid.any():
        r = rewards[valid].double()
        _, g = torch.unique(group[valid], return_inverse=True)
        centred = r - group_mean(r, g)
        spread = group_std(r, g, std)
        constant = spread <= 4 * torch.finfo(torch.float32).eps * group_mean(r.abs(), g)  # rewards are float32
        scale = group_std(r, torch.zeros_like(g), std) if global_std else spread
        advantage[valid] = torch.where(constant, 0.0, centred / (scale + eps))
    return advantage.clamp(-clip, clip).float()


def combine(rewards: dict[str, torch.Tensor], weights: dict[str, float], group: torch.Tensor, function) -> torch.Tensor:
    """Advantage of several rewards: each is normalised by itself in its group, then weighted and summed -> [B]."""
    return sum(weights[name] * function(values, group) for name, values in rewards.items())
