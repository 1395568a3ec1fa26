"""One way to images, and one image grid, for everyone."""

from __future__ import annotations

import math
from pathlib import Path

import torch


def grid(images: torch.Tensor, columns: int | None = None, scale: int | None = None, pad: int = 2):
    """uint8 [N, 3, H, W] -> PIL image, row by row. Small images are enlarged by whole factors, without smoothing."""
    from PIL import Image

    n, _, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    scale = scale or max(1, 96 // max(h, w))
    rows = math.ceil(n / columns)
    canvas = torch.full((3, rows * (h + pad) + pad, columns * (w + pad) + pad), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        y, x = pad + (i // columns) * (h + pad), pad + (i % columns) * (w + pad)
        canvas[:, y : y + h, x : x + w] = image
    picture = Image.fromarray(canvas.permute(1, 2, 0).numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def beside(left, right, gap: int = 24):
    """Two PIL images of equal height next to each other."""
    from PIL import Image

    canvas = Image.new("RGB", (left.width + gap + right.width, left.height), "white")
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width + gap, 0))
    return canvas


def save_grid(images: torch.Tensor, path: Path, **options) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(images, **options).save(path)
    return path


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float [0, 1] -> uint8 by rounding, on the CPU. Raises FloatingPointError for NaN, which would become black."""
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        raise FloatingPointError(
            f"the model's images {(~finite).nonzero().flatten().tolist()} are not finite: it has diverged"
        )
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
