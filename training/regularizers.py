"""What is added to the loss: [b, t] each, weighted by `coef`."""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat

from diffgen import samplers
from diffgen.registry import register
from diffgen.training.rollout import Evaluation, Rollout


@register("regularizer", "kl", paper="2505.05470", needs={"gaussian", "reference"})
def kl(
    evaluation: Evaluation,
    rollout: Rollout | None = None,
    rows: torch.Tensor | None = None,
    *,
    coef: NonNegativeFloat = 0.04,
) -> torch.Tensor:
    """KL to the reference policy, mean(|mu - mu_ref|^2) / (2 std^2), of each denoising step [b, t].

    coef beta: 0.04 (Flow-GRPO on GenEval and OCR); published configs go down to 0.001.
    """
    assert evaluation.steps is not None  # what `needs` asks for
    assert evaluation.reference is not None
    terms = [samplers.kl(step, reference) for step, reference in zip(evaluation.steps, evaluation.reference)]
    return coef * torch.stack(terms, 1)
