"""torch optimizers by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import NonNegativeFloat, PositiveFloat

from diffgen.registry import register


@register("optimizer", "adamw", paper="1711.05101")
def adamw(
    params: Iterable[torch.nn.Parameter],
    *,
    lr: PositiveFloat = 3e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: NonNegativeFloat = 1e-4,
    eps: PositiveFloat = 1e-8,
) -> torch.optim.Optimizer:
    """AdamW; lr 3e-4 is Flow-GRPO's for LoRA."""
    return torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)


@register("optimizer", "sgd")
def sgd(
    params: Iterable[torch.nn.Parameter], *, lr: PositiveFloat = 1e-2, momentum: NonNegativeFloat = 0.9
) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(params, lr=lr, momentum=momentum)
