"""Rewards of the world "shapes", exact."""

from __future__ import annotations

import torch

from diffgen.registry import register


@register("reward", "shapes_verifier")
def shapes_verifier(samples: torch.Tensor, prompts: list[str], **columns) -> torch.Tensor:
    """1 if exactly the named objects are there, each overlapping its template (IoU >= 0.7), relation right; else 0."""
    from diffgen.worlds import shapes

    return torch.from_numpy(shapes.verify(samples, prompts)).float()


@register("reward", "shapes_dense")
def shapes_dense(samples: torch.Tensor, prompts: list[str], **columns) -> torch.Tensor:
    """Mean of the verifier's partial scores in [0, 1]: objects, colours, count, overlap. Keeps gradients where all fail."""
    from diffgen.worlds import shapes

    checks = [shapes.check(image, prompt) for image, prompt in zip(samples.numpy(), prompts)]
    return torch.tensor([(c["objects"] + c["colors"] + c["count"] + c["iou"]) / 4 for c in checks])
