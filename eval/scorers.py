"""Scorers: one number an image, by what the image shows or how it fits its prompt. They serve as rewards unchanged.

    scorer = get_scorer("clip_score", path="clip-vit-large-patch14")
    scorer(images, prompts)                       # uint8 [N,3,H,W], N prompts -> float64 [N]
    scorer.name, scorer.higher_is_better, scorer.range

A scorer is any callable (images, prompts=None, **columns) -> float64 [N] or {name: [N]} with these three attributes.
Checkpoints are local folders (or hub ids that are in the cache already): nothing is downloaded, no pickle is read.
"""

from __future__ import annotations

import importlib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffgen.names import nearest

if TYPE_CHECKING:
    import numpy as np

BATCH = 32
Scores = Tensor | dict[str, Tensor]
UNBOUNDED = (-math.inf, math.inf)


@runtime_checkable
class Scorer(Protocol):
    """images uint8 [N,3,H,W], prompts (None where the scorer needs none), the data's other columns -> float64 [N] or a dict."""

    name: str
    higher_is_better: bool | None  # None: neither
    range: tuple[float, float]

    def __call__(self, images: Tensor, prompts: list[str] | None = None, **columns: Any) -> Scores: ...


def get_scorer(name: str, **options: Any) -> Scorer:
    """The scorer of a name, with its options. Raises ValueError with the nearest name, or for a wrong option."""
    if name not in SCORERS:
        raise ValueError(f"scorer {name!r} is unknown: {nearest(name, SCORERS)}")
    try:
        return SCORERS[name](**options)
    except TypeError as error:  # an unknown option, or one that is missing: "path"
        raise ValueError(
            f"scorer {name!r}: {str(error).partition('() ')[2] or error}; options are its keywords"
        ) from error


def check_inputs(name: str, images: Any, prompts: Sequence[str] | None, needs_prompts: bool = True) -> list[str]:
    """The prompts as a list ([] if there are none). Raises TypeError or ValueError that names the scorer."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        got = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{name}: images must be a uint8 tensor [N,3,H,W]; got {got}")
    if prompts is None:
        if needs_prompts:
            raise ValueError(f"{name} needs prompts, one an image")
        return []
    if isinstance(prompts, str):
        raise TypeError(f"{name}: prompts must be a list of texts; got the text {prompts!r}")
    if len(prompts) != len(images):
        raise ValueError(f"{name}: prompts must be one an image; got {len(prompts)} prompts and {len(images)} images")
    return list(prompts)


# ------------------------------------------------------------------------------------------------------------ CLIP


class ClipEmbedder:
    """A CLIP model of a local folder: unit embeddings of images and texts, float64 on the CPU.

    path: a folder that transformers' save_pretrained wrote (CLIPModel, its processor and tokenizer), an open_clip folder
    (open_clip_config.json and open_clip_model.safetensors), an open_clip weights file together with `architecture`
    ("ViT-H-14"), or a hub id that is in the local cache.
    """

    def __init__(self, path: str, architecture: str | None = None, device: str = "cpu", needs_text: bool = True):
        folder = Path(path)
        self.device = device
        if architecture is not None or (folder / "open_clip_config.json").is_file():
            self._load_open_clip(folder, architecture, needs_text)
        else:
            self._load_transformers(path, needs_text)
        self.model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """uint8 [N,3,H,W] -> [N,D], rows of length 1."""
        batches = tqdm(images.split(BATCH), desc="CLIP images", delay=2, leave=False)
        return _units([self._images(batch) for batch in batches])

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """N texts -> [N,D], rows of length 1. Texts beyond the model's length are cut, with a warning that names one."""
        too_long = [text for text in texts if self._length(text) > self.max_length]
        if too_long:
            warnings.warn(
                f"{len(too_long)} of {len(texts)} prompts are longer than the {self.max_length} tokens CLIP reads and "
                f"were cut, e.g. {too_long[0][:80]!r}",
                stacklevel=2,
            )
        return _units([self._texts(list(texts[i : i + BATCH])) for i in range(0, len(texts), BATCH)])

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.detach().double().exp())

    def _load_transformers(self, path: str, needs_text: bool) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        try:
            model = CLIPModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
            processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True) if needs_text else None
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"no CLIP checkpoint in {path!r}: expected a folder with config.json, model.safetensors, the processor's "
                f"and the tokenizer's files, or open_clip_config.json with its weights ({error})"
            ) from error
        self.model: Any = model
        self.max_length = model.config.text_config.max_position_embeddings

        def embed_images(batch: Tensor) -> Tensor:
            inputs = processor(images=list(batch), input_data_format="channels_first", return_tensors="pt")
            pooled = model.vision_model(pixel_values=inputs["pixel_values"].to(self.device)).pooler_output
            return model.visual_projection(pooled)

        def embed_texts(batch: list[str]) -> Tensor:
            assert tokenizer is not None
            options = {"padding": True, "truncation": True, "max_length": self.max_length}
            inputs = tokenizer(batch, return_tensors="pt", **options).to(self.device)
            pooled = model.text_model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output
            return model.text_projection(pooled)

        def length(text: str) -> int:
            assert tokenizer is not None
            return len(tokenizer(text, verbose=False)["input_ids"])

        self._images, self._texts, self._length = embed_images, embed_texts, length

    def _load_open_clip(self, path: Path, architecture: str | None, needs_text: bool) -> None:
        import open_clip
        from torchvision.transforms import InterpolationMode, Normalize
        from torchvision.transforms import functional as TF

        if not path.exists():
            raise FileNotFoundError(f"no open_clip checkpoint at {str(path)!r}: expected a folder or a weights file")
        if path.is_dir():
            name = f"local-dir:{path}"
            model = open_clip.create_model(name, require_pretrained=True)
        elif architecture in open_clip.list_models():
            name = str(architecture)
            model = open_clip.create_model(name, pretrained=str(path))
        else:
            raise ValueError(
                f"architecture {architecture!r} is unknown: {nearest(str(architecture), open_clip.list_models())}"
            )
        self.model = model
        config = model.visual.preprocess_cfg
        size = config["size"] if isinstance(config["size"], (tuple, list)) else (config["size"],) * 2
        normalize = Normalize(config["mean"], config["std"])
        mode = InterpolationMode(config.get("interpolation", "bicubic"))
        squash = config.get("resize_mode") == "squash"
        tokenizer = open_clip.get_tokenizer(name) if needs_text else None
        self.max_length = model.context_length

        def embed_images(batch: Tensor) -> Tensor:  # the evaluation transform on tensors
            resized = TF.resize(batch, list(size) if squash else min(size), mode, antialias=True)
            pixels = normalize(TF.center_crop(resized, list(size)).float() / 255)
            return model.encode_image(pixels.to(self.device))

        def embed_texts(batch: list[str]) -> Tensor:
            assert tokenizer is not None
            return model.encode_text(tokenizer(batch, context_length=self.max_length).to(self.device))

        def length(text: str) -> int:
            assert tokenizer is not None
            inner: Any = getattr(tokenizer, "tokenizer", None)  # of transformers
            return len(inner(text)["input_ids"]) if inner else len(tokenizer.encode(text)) + 2  # start and end

        self._images, self._texts, self._length = embed_images, embed_texts, length


def _units(batches: list[Tensor]) -> Tensor:
    rows = torch.cat([batch.detach().cpu().double() for batch in batches])
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


@dataclass
class ClipScorer:
    """cos(image, text) of a CLIP model [N]; the subclasses differ in what they make of it."""

    path: str
    architecture: str | None = None
    device: str = "cpu"
    name: ClassVar[str] = "clip_cosine"
    higher_is_better: ClassVar[bool] = True
    range: ClassVar[tuple[float, float]] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        self.clip = ClipEmbedder(self.path, self.architecture, self.device)

    def __call__(self, images: Tensor, prompts: list[str] | None = None, **columns: Any) -> Tensor:
        texts = check_inputs(self.name, images, prompts)
        unique = list(dict.fromkeys(texts))  # groups of samples share a prompt
        rows = self.clip.texts(unique)[[unique.index(text) for text in texts]]
        return self.score((self.clip.images(images) * rows).sum(1))

    def score(self, cosine: Tensor) -> Tensor:
        return cosine


@dataclass
class ClipScore(ClipScorer):
    """CLIPScore as torchmetrics has it: 100 max(cos, 0), per image (the mean is taken after the clip). arXiv:2104.08718."""

    name: ClassVar[str] = "clip_score"
    range: ClassVar[tuple[float, float]] = (0.0, 100.0)

    def score(self, cosine: Tensor) -> Tensor:
        return 100 * cosine.clamp(min=0)


@dataclass
class PickScore(ClipScorer):
    """PickScore (arXiv:2305.01569): exp(logit_scale) cos / divide_by, of a fine-tuned CLIP-H. flow_grpo divides by 26."""

    divide_by: float = 1.0
    name: ClassVar[str] = "pick_score"
    range: ClassVar[tuple[float, float]] = UNBOUNDED

    def score(self, cosine: Tensor) -> Tensor:
        return self.clip.logit_scale * cosine / self.divide_by


@dataclass
class HPSv2(ClipScorer):
    """HPSv2 (arXiv:2306.09341): cos of a fine-tuned open_clip ViT-H-14, raw: a folder, or its weights file and architecture."""

    name: ClassVar[str] = "hps"


@dataclass
class Aesthetic:
    """LAION's aesthetic predictor: linear layers on the unit CLIP embedding of the image, about 1 (poor) to 10 [N].

    path: the CLIP model (ViT-L/14 for the published heads); head: a safetensors file whose `*.weight` and `*.bias`, in the
    order of their numbers, are the layers (the published ones have dropout between them, which does nothing here).
    """

    path: str
    head: str
    architecture: str | None = None
    device: str = "cpu"
    name: ClassVar[str] = "aesthetic"
    higher_is_better: ClassVar[bool] = True
    range: ClassVar[tuple[float, float]] = UNBOUNDED

    def __post_init__(self) -> None:
        self.clip = ClipEmbedder(self.path, self.architecture, self.device, needs_text=False)
        self.layers = _linear_layers(self.head)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str] | None = None, **columns: Any) -> Tensor:
        check_inputs(self.name, images, prompts, needs_prompts=False)
        rows = self.clip.images(images)
        width = self.layers[0].in_features
        if rows.shape[1] != width:
            raise ValueError(f"aesthetic: {self.head} takes {width} features, the CLIP model gives {rows.shape[1]}")
        return self.layers(rows).squeeze(1)


def _linear_layers(file: str) -> nn.Sequential:
    """float64 linear layers of a safetensors file, ordered by the numbers in their names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(file).is_file():
        raise FileNotFoundError(f"aesthetic: no such file: {file} (a head's weights as safetensors)")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"aesthetic: {file} is no safetensors file: {error}") from error
    names = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    layers = []
    for name in sorted(names, key=lambda n: [int(digits) for digits in re.findall(r"\d+", n)]):
        weight = tensors[f"{name}.weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=f"{name}.bias" in tensors, dtype=torch.float64)
        layer.load_state_dict({k: tensors[f"{name}.{k}"].double() for k in layer.state_dict()})
        layers.append(layer)
    shapes = [list(layer.weight.shape) for layer in layers]
    fits = all(a[0] == b[1] for a, b in pairwise(shapes))
    if not layers or not fits or shapes[-1][0] != 1:
        raise ValueError(f"aesthetic: {file} must hold linear layers that follow each other and end in 1; got {shapes}")
    return nn.Sequential(*layers).requires_grad_(False).eval()


@dataclass
class ImageReward:
    """ImageReward (arXiv:2304.05977), raw, by the authors' package. model: its name or the path of its checkpoint."""

    model: str = "ImageReward-v1.0"
    options: dict[str, Any] = field(default_factory=dict)  # of ImageReward.load: device, med_config, download_root
    name: ClassVar[str] = "image_reward"
    higher_is_better: ClassVar[bool] = True
    range: ClassVar[tuple[float, float]] = UNBOUNDED

    def __post_init__(self) -> None:
        try:
            package = importlib.import_module("ImageReward")
        except ImportError as error:
            raise ModuleNotFoundError(
                f"scorer 'image_reward' needs the authors' package: pip install image-reward ({error}). It pins old "
                "versions of transformers; an environment of its own behind an HTTP reward avoids the conflict"
            ) from error
        self._model = package.load(self.model, **self.options)

    def __call__(self, images: Tensor, prompts: list[str] | None = None, **columns: Any) -> Tensor:
        texts = check_inputs(self.name, images, prompts)
        pairs = zip(texts, _pil(images))
        scores = [float(self._model.score(text, image)) for text, image in tqdm(pairs, delay=2, leave=False)]
        return torch.tensor(scores, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------- OCR

OcrEngine = Callable[["np.ndarray"], "str | Iterable[str]"]  # uint8 [H,W,3] RGB -> the text in it
QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


@dataclass
class Ocr:
    """How well the text quoted in the prompt is rendered [N]: 1 - min(dist, L)/L, flow_grpo's rule (arXiv:2505.05470).

    dist: edit distance of the text found and the quoted one, both lower case without spaces; 0 where the quoted one is part
    of what was found. L: length of the quoted one. Of several quoted texts the first counts.
    engine: (uint8 [H,W,3]) -> text or texts; None takes RapidOCR (pip install rapidocr-onnxruntime).
    Raises ValueError, with the prompt, where nothing is quoted.
    """

    engine: OcrEngine | None = None
    name: ClassVar[str] = "ocr"
    higher_is_better: ClassVar[bool] = True
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        self._read = self.engine or _rapid_ocr()

    def __call__(self, images: Tensor, prompts: list[str] | None = None, **columns: Any) -> Tensor:
        targets = [quoted_text(prompt) for prompt in check_inputs(self.name, images, prompts)]
        scores = []
        for image, target in zip(tqdm(images, desc="ocr", delay=2, leave=False), targets):
            text = self._read(image.permute(1, 2, 0).cpu().numpy())
            scores.append(text_score(text if isinstance(text, str) else "".join(text), target))
        return torch.tensor(scores, dtype=torch.float64)


def quoted_text(prompt: str) -> str:
    """The first text in double quotes. Raises ValueError that names the prompt."""
    match = QUOTED.search(prompt)
    text = (match[1] or match[2]) if match else ""
    if not text.strip():
        raise ValueError(f'ocr: the prompt {prompt!r} names no text; quote it, as in: a sign that says "OPEN"')
    return text


def text_score(found: str, target: str) -> float:
    """1 - min(dist, L)/L of two texts, as in `Ocr`."""
    found, target = ("".join(text.lower().split()) for text in (found, target))
    distance = 0 if target in found else edit_distance(found, target)
    return 1 - min(distance, len(target)) / len(target)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: insertions, deletions and substitutions from a to b."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def _rapid_ocr() -> OcrEngine:
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:
        raise ModuleNotFoundError(
            f"scorer 'ocr' needs an engine: pip install rapidocr-onnxruntime, or pass engine=(image) -> text ({error})"
        ) from error
    engine = RapidOCR()

    def read(image: np.ndarray) -> list[str]:
        result, _ = engine(image[:, :, ::-1])  # it takes BGR
        return [text for _, text, confidence in result or [] if float(confidence) > 0]

    return read


# ----------------------------------------------------------------------------------------------- exact and plain


@dataclass
class Verifier:
    """The exact verifier of an embedded world: 1 where the image shows what the prompt names, else 0 [N].

    checks: return {check: [N]} with its partial scores as well.
    """

    world: str = "shapes"
    checks: bool = False
    name: ClassVar[str] = "verifier"
    higher_is_better: ClassVar[bool] = True
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.world not in WORLDS:
            raise ValueError(f"no image world {self.world!r} with a verifier: {nearest(self.world, WORLDS)}")
        self._world = importlib.import_module(WORLDS[self.world])

    def __call__(self, images: Tensor, prompts: list[str] | None = None, **columns: Any) -> Scores:
        texts = check_inputs(self.name, images, prompts)
        images = images.cpu()
        if not self.checks:
            return torch.as_tensor(self._world.verify(images, texts)).double()
        found = [self._world.check(image, text) for image, text in zip(images.numpy(), texts)]
        return {
            name: torch.tensor([f[name] for f in found], dtype=torch.float64) for name in (found[0] if found else ())
        }


WORLDS = {"shapes": "diffgen.worlds.shapes"}
STATISTICS: dict[str, tuple[float, float]] = {  # functions of `functional`, and their ranges
    "saturation": (0.0, 1.0),
    "contrast": (0.0, 0.5),
    "clipping": (0.0, 1.0),
    "colourfulness": (0.0, math.inf),
}


@dataclass
class Statistic:
    """One statistic of the pixels [N]: saturation, contrast, clipping or colourfulness; neither high nor low is better."""

    name: str
    higher_is_better: ClassVar[bool | None] = None

    def __post_init__(self) -> None:
        if self.name not in STATISTICS:
            raise ValueError(f"statistic {self.name!r} is unknown: {nearest(self.name, STATISTICS)}")

    @property
    def range(self) -> tuple[float, float]:
        return STATISTICS[self.name]

    def __call__(self, images: Tensor, prompts: list[str] | None = None, **columns: Any) -> Tensor:
        from diffgen.eval import functional

        check_inputs(self.name, images, prompts, needs_prompts=False)
        return getattr(functional, self.name)(images)


def _pil(images: Tensor) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]


SCORERS: dict[str, Callable[..., Any]] = {
    "clip_score": ClipScore,
    "pick_score": PickScore,
    "hps": HPSv2,
    "image_reward": ImageReward,
    "aesthetic": Aesthetic,
    "ocr": Ocr,
    "verifier": Verifier,
    **{name: partial(Statistic, name) for name in STATISTICS},
}
