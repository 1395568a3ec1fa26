"""How alike two sets of images are, pair by pair."""

from __future__ import annotations

from typing import Any

import torch


def similarity(images: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """PSNR (dB) and SSIM of uint8 [N, 3, H, W] to uint8 [N, 3, H, W], means over the N pairs.

    PSNR is clamped at 60 dB, where images are the same to the eye, so that equal ones, at infinity, have a mean too.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    ours, theirs = images.float(), reference.float()
    psnr = peak_signal_noise_ratio(ours, theirs, data_range=255.0, reduction="none", dim=(1, 2, 3))
    ssim: Any = structural_similarity_index_measure(ours, theirs, data_range=255.0)
    return {"psnr": float(psnr.clamp_max(60).mean()), "ssim": float(ssim)}
