"""Rewards that read only the pixels."""

from __future__ import annotations

import io

import torch

from diffgen.registry import register


def _kilobytes(samples: torch.Tensor, quality: int) -> torch.Tensor:
    from PIL import Image

    sizes = []
    for image in samples:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)


@register("reward", "jpeg_compressibility", paper="2305.13301")
def jpeg_compressibility(samples: torch.Tensor, prompts: list[str], *, quality: int = 95, **columns) -> torch.Tensor:
    """Minus the size in kilobytes as JPEG (DDPO); samples uint8 [B, 3, H, W]."""
    return -_kilobytes(samples, quality)


@register("reward", "jpeg_incompressibility", paper="2305.13301")
def jpeg_incompressibility(samples: torch.Tensor, prompts: list[str], *, quality: int = 95, **columns) -> torch.Tensor:
    """Size in kilobytes as JPEG (DDPO); samples uint8 [B, 3, H, W]."""
    return _kilobytes(samples, quality)
