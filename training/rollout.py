"""What sampling produced: the data that every later stage reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Rollout:
    """B samples and the T actions (denoising steps, or tokens) that made them."""

    prompts: list[str]  # length B
    group: torch.Tensor  # int64 [B]: which prompt of the update each sample belongs to
    samples: Any  # images uint8 [B, 3, H, W], videos uint8 [B, F, 3, H, W], or texts list[str]
    logp: torch.Tensor  # float32 [B, T] under the policy that sampled
    mask: torch.Tensor  # bool [B, T]: actions that exist and are trained
    rewards: dict[str, torch.Tensor] = field(default_factory=dict)  # raw, [B] each; NaN: does not apply
    columns: dict[str, list] = field(default_factory=dict)  # the data set's other columns, repeated per sample
    extras: dict[str, Any] = field(default_factory=dict)  # what rewards and methods declare
    replay: Any = None  # opaque to everyone but the policy

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass
class Evaluation:
    """Actions under the current policy: logp [b, t]; steps, one Gaussian an action, where the policy has them."""

    logp: torch.Tensor
    steps: list | None = None
    reference: list | None = None  # the same steps under the reference policy
