"""Statistics of the pixels: one number an image, no network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffgen.eval.functional._check import float64


def saturation(images: Tensor) -> Tensor:
    """Mean HSV saturation (max - min)/max of each image, 0 for black pixels. uint8 [N,3,H,W] -> float64 [N]."""

    def hsv_saturation(x_BCHW: Tensor) -> Tensor:
        low, high = x_BCHW.amin(1), x_BCHW.amax(1)
        return ((high - low) / high.where(high > 0, 1.0)).mean((1, 2))

    return _per_image(hsv_saturation, images)


def contrast(images: Tensor) -> Tensor:
    """Standard deviation (divisor HW) of the luma 0.299 R + 0.587 G + 0.114 B in [0,1]. uint8 [N,3,H,W] -> [N]."""

    def luma_sd(x_BCHW: Tensor) -> Tensor:
        luma = torch.einsum("bchw,c->bhw", x_BCHW, x_BCHW.new_tensor([0.299, 0.587, 0.114]))
        return luma.flatten(1).std(dim=1, correction=0)

    return _per_image(luma_sd, images)


def colourfulness(images: Tensor) -> Tensor:
    """Hasler & Süsstrunk (2003), in units of 0..255: 0 for grey, about 109 for "extremely colourful" photographs.

    sqrt(sd_rg^2 + sd_yb^2) + 0.3 sqrt(mean_rg^2 + mean_yb^2), rg = R - G, yb = (R + G)/2 - B; uint8 [N,3,H,W] -> [N].
    """

    def hasler(x_BCHW: Tensor) -> Tensor:
        R, G, B = (255 * x_BCHW.flatten(2)).unbind(1)
        opponents = torch.stack([R - G, (R + G) / 2 - B])  # [2,B,HW]
        return opponents.std(dim=2, correction=0).norm(dim=0) + 0.3 * opponents.mean(2).norm(dim=0)

    return _per_image(hasler, images)


def clipping(images: Tensor) -> Tensor:
    """Share of channel values that are 0 or 255, the plainest sign of oversaturation. uint8 [N,3,H,W] -> [N]."""
    return _per_image(lambda x_BCHW: ((x_BCHW == 0) | (x_BCHW == 1)).double().mean((1, 2, 3)), images)


def _per_image(statistic: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Apply statistic ([B,3,H,W] float64 in [0,1] -> [B]) in batches."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(
            f"images must be a uint8 tensor [N,3,H,W]; got {got} (diffgen.eval.images.load_images converts)"
        )
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"images must be [N,3,H,W] and not empty; got {list(images.shape)}")
    return torch.cat([statistic(float64(batch) / 255) for batch in images.split(64)])
