"""Which samples are trained on. A selection returns keep, bool [B]."""

from __future__ import annotations

import torch

from diffgen.registry import register
from diffgen.training.rollout import Rollout


@register("select", "all")
def all_samples(advantage: torch.Tensor, rollout: Rollout) -> torch.Tensor:
    """Every sample."""
    return torch.ones(len(advantage), dtype=torch.bool)


@register("select", "nonzero")
def nonzero(advantage: torch.Tensor, rollout: Rollout) -> torch.Tensor:
    """Samples whose advantage isn't 0: a group of equal rewards costs no gradient computation."""
    return advantage.reshape(len(advantage), -1).ne(0).any(1)
