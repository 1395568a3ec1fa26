"""Images from a folder, a tensor or PIL images, as one uint8 tensor [N,3,H,W]; what is unclear is an error."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

SUFFIXES = (".png", ".jpg", ".jpeg")

ImageSource = str | os.PathLike | Tensor | Sequence[Image.Image]


def load_images(source: ImageSource) -> Tensor:
    """All images of `source`, uint8 [N,3,H,W].

    source: a folder of PNG and JPEG files (in natural order: 2.png before 10.png), a uint8 tensor [N,3,H,W], a float
    tensor [N,3,H,W] in [0,1] (converted by rounding), or a list of PIL images. Greyscale and palette images become RGB,
    and transparent ones are laid on white, with a warning.

    Raises ValueError for an empty source, an unreadable file, mixed sizes, 16-bit images and floats outside [0,1],
    naming the file or row; FileNotFoundError or NotADirectoryError for the path; TypeError for other sources.
    """
    if isinstance(source, (str, os.PathLike)):
        return _from_folder(Path(source))
    if isinstance(source, Tensor):
        return _from_tensor(source)
    if isinstance(source, (list, tuple)):
        return _from_pil(source)
    raise TypeError(f"images must be a folder, a tensor or a list of PIL images; got {type(source).__name__}")


def _from_folder(folder: Path) -> Tensor:
    if not folder.exists():
        raise FileNotFoundError(f"no such folder: {folder}")
    if not folder.is_dir():
        raise NotADirectoryError(f"expected a folder of images, got a file: {folder}")
    files = sorted((f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES), key=_natural_order)
    if not files:
        raise ValueError(f"no images in {folder}: it has no file that ends in {', '.join(SUFFIXES)}")
    return _stack([(str(f), _read(f)) for f in tqdm(files, desc=f"reading {folder}", delay=2, leave=False)])


def _natural_order(file: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", file.name)
    return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in parts]


def _read(file: Path) -> Tensor:
    try:
        with Image.open(file) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), str(file))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"can't read {file}: {error}") from error


def _from_pil(images: Sequence[Image.Image]) -> Tensor:
    if not images:
        raise ValueError("the list of images is empty")
    for i, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise TypeError(f"image {i} of the list must be a PIL image; got {type(image).__name__}")
    return _stack(
        [(f"image {i} of the list", _to_rgb(image, f"image {i} of the list")) for i, image in enumerate(images)]
    )


def _to_rgb(image: Image.Image, name: str) -> Tensor:
    """uint8 [3,H,W]. PIL's own convert() clips 16-bit values to white and drops alpha, so both are met before it."""
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(f"{name} has more than 8 bits a channel (PIL mode {image.mode!r}); convert it to 8 bits first")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if np.array(rgba)[..., 3].min() < 255:
            warnings.warn(f"{name} is transparent; laid on white", stacklevel=2)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _stack(named_images: list[tuple[str, Tensor]]) -> Tensor:
    first_name, first = named_images[0]
    for name, image in named_images:
        if image.shape != first.shape:
            (_, h, w), (_, h0, w0) = image.shape, first.shape
            raise ValueError(f"images must have one size: {name} is {w}x{h}, {first_name} is {w0}x{h0}")
    return torch.stack([image for _, image in named_images])


def _from_tensor(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"an image tensor must be [N,3,H,W] and not empty; got {list(images.shape)}")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise TypeError(f"an image tensor must be uint8 or floating point; got {images.dtype}")
    bad = (~torch.isfinite(images).flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"float images must be finite; NaN or infinity in images {bad[:10]}")
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        hint = "for images in [-1,1] pass (x + 1) / 2; for images in [0,255] pass x / 255"
        raise ValueError(f"float images must be in [0,1]; got values from {low:.4g} to {high:.4g} ({hint})")
    return (images.float() * 255).round().to(torch.uint8)
