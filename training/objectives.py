"""Policy-gradient losses of the ratio, [b, t] each; the trainer averages them over trained actions."""

from __future__ import annotations

import torch
from pydantic import PositiveFloat

from diffgen.registry import register
from diffgen.training.rollout import Evaluation


@register("objective", "clipped", paper="2505.05470")
def clipped(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantage: torch.Tensor,
    evaluation: Evaluation | None = None,
    *,
    clip_range: PositiveFloat = 1e-4,
    clip_range_high: PositiveFloat | None = None,
) -> torch.Tensor:
    """max(-A rho, -A clip(rho, 1 - c, 1 + c)), rho = exp(logp - old_logp) (PPO 1707.06347, Flow-GRPO).

    logp, old_logp, advantage [b, t] -> loss [b, t]. clip_range c: 1e-4 suits log-probs that are means over the latent's
    dimensions. clip_range_high: another upper bound (DAPO's clip-higher).
    """
    ratio = torch.exp(logp - old_logp)
    high = clip_range if clip_range_high is None else clip_range_high
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + high))
