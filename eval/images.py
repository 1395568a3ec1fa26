"""Where images come from: `open_source(x)` streams uint8 [3,H,W] images with their names; what is unclear is an error.

A source keeps count of what it met (sizes, container formats, conversions, bad files), because that changes metrics.
`load_images(x)` is the whole source as one tensor. Tensor legend: N images, H x W pixels.
"""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from diffgen.grid import to_uint8
from diffgen.seeding import seed_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # not all that PIL knows: EPS would start Ghostscript
LARGEST_ENTRY = 1 << 28  # bytes of one image in a zip, unpacked
GREY = {"1", "L", "LA", "La"}
ALPHA = {"white": "laid on white", "black": "laid on black", "drop": "its alpha channel dropped"}
SIXTEEN_BIT = "16-bit"
# PIL and its decoders raise any of these for a damaged file
UNREADABLE: tuple[type[Exception], ...] = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zipfile.BadZipFile, zlib.error),
    *(RuntimeError, NotImplementedError),  # of zipfile, for encrypted entries and unknown compression
    Image.DecompressionBombError,
)

ImageSource = Any  # what `open_source` takes
Stamp = tuple[str, int, int]  # (path, size in bytes, mtime_ns) of a file


class BadImage(ValueError):
    """One image that can't be used; on_bad_image="skip" passes over it."""


@dataclass(frozen=True)
class Raw:
    """An image before it is decoded. `load` gives a PIL image, tensor, array, a (image, label) tuple or a dict of these."""

    name: str
    where: str  # as error messages call it
    load: Callable[[], Any]
    stamp: Stamp | None = None


@dataclass(frozen=True)
class Item:
    """One decoded image: uint8 [3,H,W] on the CPU, its container format, and what had to be done to it."""

    name: str
    image: Tensor
    format: str | None = None
    facts: tuple[str, ...] = ()
    stamp: Stamp | None = None


class Source:
    """A stream of images. len and names are final after a whole pass, because bad images may be skipped.

    kind:    "folder", "zip", "npz", "npy", "tensor", "list", "dataset", "iterable", "callable" or "pipeline".
    formats: {container format: images}, from the file's content; empty for images that come from memory.
    sizes:   {(width, height): images}.
    notes:   {what happened: images}, for the report: "greyscale", "transparent", "16-bit", "rotated by EXIF", "skipped" ...
    skipped: {name: reason}.
    All counts are of the latest pass.
    """

    def __init__(
        self,
        kind: str,
        read: Callable[[int, int], Iterator[Raw]],  # (batch size, first index) -> images
        names: Sequence[str] | None = None,  # None: not known before the first pass
        *,
        on_bad_image: str = "error",
        alpha: str = "white",
        crop: str | None = None,
        origin: str = "",  # the path, for people
        stamps: Callable[[], list[Stamp]] | None = None,
        once: bool = False,
    ):
        _one_of("on_bad_image", on_bad_image, ("error", "skip"))
        _one_of("alpha", alpha, tuple(ALPHA))
        _one_of("crop", crop, (None, "center"))
        self.kind, self.on_bad_image, self.alpha, self.crop = kind, on_bad_image, alpha, crop
        self.origin = origin or kind
        self._read, self._known, self._stamps, self._once = read, names, stamps, once
        self._complete = self._started = False
        self._reset()

    def _reset(self) -> None:
        self._seen: list[str] = []
        self.formats: Counter[str] = Counter()
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.notes: Counter[str] = Counter()
        self.skipped: dict[str, str] = {}
        self.bad_stamps: list[tuple[Stamp, str]] = []  # of the skipped ones that lie in files

    @property
    def all_names(self) -> list[str]:
        """Also of the images that a pass skipped; empty when the length is not known."""
        return list(self._known or ())

    @property
    def names(self) -> list[str]:
        """File names, or indices as text. Before a pass over a source of unknown length: what was seen so far."""
        return self._seen if self._complete or self._known is None else list(self._known)

    def __len__(self) -> int:
        if not self._complete and self._known is None:
            raise TypeError(f"the length of this {self.kind} is not known before a pass over it")
        return len(self.names)

    @property
    def total(self) -> int | None:
        """How many images to expect, for progress bars; None when unknown."""
        return len(self._known) if self._known is not None else len(self._seen) if self._complete else None

    def batches(self, batch_size: int = 64, start: int = 0) -> Iterator[list[Tensor]]:
        """Lists of uint8 [3,H,W], sizes as they come. start: the first index, to go on where a pass was cut off."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        batch = []
        for item in self.stream(batch_size, start):
            batch.append(item.image)
            if len(batch) == batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def stream(self, batch_size: int = 64, start: int = 0) -> Iterator[Item]:
        """The images one by one. batch_size: how many a callable or a pipeline is asked for at a time."""
        if self._once and self._started:
            raise ValueError(f"this {self.kind} can be read only once, and was; pass a list or a Dataset instead")
        self._started, self._complete = True, False
        self._reset()
        for raw in self._read(batch_size, start):
            try:
                item = self._decode(raw)
            except BadImage as error:
                if self.on_bad_image == "error":
                    raise
                self.skipped[raw.name] = str(error)
                self.notes["skipped"] += 1
                cause = error.__cause__
                passing = isinstance(cause, OSError) and cause.errno is not None  # of the disk, not of the file
                if raw.stamp and not passing:
                    self.bad_stamps.append((raw.stamp, str(error)))
                continue
            self._count(item, raw.where)
            yield item
        self._finish()

    def replay(self, items: Iterable[tuple[str, tuple[int, int], str | None, Sequence[str]]], skipped: dict) -> None:
        """Set the counts of a pass from a cache's record of it: (name, (width, height), format, facts) an image."""
        self._reset()
        for name, size, container, facts in items:
            self._tally(name, size, container, facts)
        self.skipped, self.notes["skipped"] = dict(skipped), len(skipped)
        self._finish()

    def stamps(self) -> list[Stamp] | None:
        """(path, size, mtime_ns) of each file, by which a cache knows it again; None for images not in files."""
        return None if self._stamps is None else self._stamps()

    def warnings(self) -> list[str]:
        """What a reader of a metric must know about the images of the latest pass."""
        found, n = [], len(self._seen) + len(self.skipped)
        if len(self.skipped) > 0.01 * n:
            first = next(iter(self.skipped.values()))
            found.append(f"{len(self.skipped)} of {n} images were skipped; the first: {first}")
        shapes = {round(w / h, 2) for w, h in self.sizes}
        if len(shapes) > 1:
            text = f"aspect ratios (width/height) go from {min(shapes):g} to {max(shapes):g}: a resize to a square squashes"
            found.append(f"{text} images differently; crop='center' keeps proportions")
        if self.notes["missing"]:
            found.append(
                f"{self.notes['missing']} of {len(self._known or ())} images are missing: the source ended early"
            )
        return found

    def _decode(self, raw: Raw) -> Item:
        try:
            payload = raw.load()
        except UNREADABLE as error:
            raise BadImage(f"can't read {raw.where}: {error}") from error
        image, container, facts = _decode(payload, raw.where, self.alpha)
        if self.crop == "center" and image.shape[1] != image.shape[2]:
            _, h, w = image.shape
            side = min(h, w)
            top, left = (h - side) // 2, (w - side) // 2
            image = image[:, top : top + side, left : left + side]
            facts = (*facts, "cropped to a square")
        return Item(raw.name, image, container, facts, raw.stamp)

    def _count(self, item: Item, where: str) -> None:
        for fact in item.facts:
            if fact == "transparent" and not self.notes[fact]:
                warnings.warn(
                    f"{where} is transparent; {ALPHA[self.alpha]} (more such images are only counted)", stacklevel=3
                )
            if fact == SIXTEEN_BIT and not self.notes[fact]:
                text = f"{where} has 16 bits a channel; divided by 257 to 8 bits (more such images are only counted)"
                warnings.warn(text, stacklevel=3)
        _, h, w = item.image.shape
        self._tally(item.name, (w, h), item.format, item.facts)

    def _tally(self, name: str, size: tuple[int, int], container: str | None, facts: Sequence[str]) -> None:
        self._seen.append(name)
        self.sizes[size] += 1
        self.notes.update(facts)
        if container:
            self.formats[container] += 1

    def _finish(self) -> None:
        self._complete = True
        if self.skipped and not self._seen:
            raise ValueError(
                f"no image of this {self.kind} is readable; the first: {next(iter(self.skipped.values()))}"
            )
        if not self._seen:
            raise ValueError(f"this {self.kind} has no images")


def _one_of(option: str, value: Any, valid: tuple) -> None:
    if value not in valid:
        raise ValueError(f"{option} must be one of {', '.join(map(repr, valid))}; got {value!r}")


def open_source(
    source: ImageSource,
    *,
    on_bad_image: str = "error",
    alpha: str = "white",
    crop: str | None = None,
    recursive: bool = False,
    column: str = "image",
    n: int | None = None,
    seed: int = 0,
) -> Source:
    """Images of any origin as a stream.

    source: a folder (natural order: 2.png before 10.png) or zip of image files; .npz (key `images`) or .npy of
        [N,H,W,3] or [N,3,H,W]; such an array; a tensor uint8 [N,3,H,W] or float in [0,1]; a list of PIL images; a torch
        Dataset, an iterable of images or batches, with or without labels; a Hugging Face dataset with an image column; or
        fn(indices, seeds) -> images, asked for n images, whose seeds come from `seed` and the index alone.
    on_bad_image: "error" names the first unreadable image, "skip" counts them.
    alpha:  what is behind transparent images: "white", "black", or "drop" (PIL's own way: the alpha channel is ignored).
    crop:   "center" cuts the largest centred square out of each image; None leaves proportions alone.
    recursive: folders: their subfolders too.

    Raises ValueError for an empty source and floats outside [0,1]; FileNotFoundError or NotADirectoryError for the path;
    TypeError for other sources. A Source is returned as it is.
    """
    options: dict[str, Any] = {"on_bad_image": on_bad_image, "alpha": alpha, "crop": crop}
    if isinstance(source, Source):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _from_path(Path(source), recursive, options)
    if isinstance(source, Tensor):
        return _from_tensor(source, options)
    if isinstance(source, np.ndarray):
        return _from_array("npy", source, "the array", options)
    if isinstance(source, (list, tuple)):
        return _from_list(source, options)
    if getattr(source, "column_names", None) and hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return _from_columns(source, column, options)
    if not isinstance(source, torch.utils.data.IterableDataset):
        if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
            return _indexed("dataset", source.__getitem__, len(source), "image {} of the dataset", options)
        if callable(source) and not hasattr(source, "__iter__"):
            return _from_callable(source, n, seed, options)
    if hasattr(source, "__iter__"):
        return _from_iterable(source, column, options)
    kinds = "a folder, a zip, npz or npy file, a list of PIL images, a Dataset, an iterable or a callable"
    raise TypeError(f"images must be a tensor, {kinds}; got {type(source).__name__}")


def load_images(source: ImageSource, **options: Any) -> Tensor:
    """All images of `source`, uint8 [N,3,H,W]: what `open_source` takes, with its options, as long as sizes agree.

    Raises ValueError for mixed sizes, and what `open_source` raises.
    """
    if (
        isinstance(source, Tensor)
        and source.dtype == torch.uint8
        and source.ndim == 4
        and source.shape[1] == 3
        and len(source)
    ):
        return source if options.get("crop") is None else load_images(source.unbind(), **options)
    opened = open_source(source, **options)
    items = list(tqdm(opened.stream(), total=opened.total, desc=f"reading {opened.kind}", delay=2, leave=False))
    first = items[0]
    for item in items:
        if item.image.shape != first.image.shape:
            (_, h, w), (_, h0, w0) = item.image.shape, first.image.shape
            a, b = (f"image {name}" if name.isdecimal() else name for name in (item.name, first.name))
            raise ValueError(f"images must have one size: {a} is {w}x{h}, {b} is {w0}x{h0}")
    for text in opened.warnings():
        warnings.warn(text, stacklevel=2)
    return torch.stack([item.image for item in items])


def format_warning(generated: Source, reference: Source) -> str | None:
    """A warning when the two sets lie in different container formats: JPEG artefacts alone change FD (2104.11222)."""
    a, b = (sorted(s.formats) for s in (generated, reference))
    from_memory = not (a and b)
    if a == b or (from_memory and not {"JPEG", "WEBP"} & {*a, *b}):
        return None
    a_text, b_text = (", ".join(formats) or "from memory" for formats in (a, b))
    return (
        f"container formats differ: generated {a_text}, reference {b_text}; lossy compression alone changes distances"
    )


class PipelineSource(Source):
    """Images that a diffusers pipeline makes: per_prompt of each prompt, in the prompts' order.

    Image i has its own noise, a function of (seed, i) and the same as in `pipelines.draw`: so the batch size doesn't
    change it, every guidance rule meets the same noise, and a pass that was cut off goes on with batches(start=i).
    `prompts` is the text of each image. call: further arguments of the pipeline's call.

    rule: a guidance rule, put on by `guide`, which is passed in because evaluation doesn't depend on guidance:
        PipelineSource(pipe, prompts, rule=APG(scale=10), guide=diffgen.guide)
    A pipeline that is guided already needs neither.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        per_prompt: int = 4,
        seed: int = 0,
        rule: Any = None,
        *,
        guide: Callable[[Any, Any], AbstractContextManager] | None = None,
        on_bad_image: str = "error",
        **call: Any,
    ):
        if isinstance(prompts, str) or not prompts or per_prompt < 1:
            raise ValueError(
                f"prompts must be a list of at least one, and per_prompt at least 1; got {prompts!r}, {per_prompt}"
            )
        if rule is not None and guide is None:
            raise ValueError("a rule needs the function that puts it on the pipeline: pass guide=diffgen.guide too")
        self.prompts = [prompt for prompt in prompts for _ in range(per_prompt)]

        def draw(indices: list[int], seeds: list[int]) -> Tensor:
            noise = [torch.Generator().manual_seed(s) for s in seeds]
            guided = guide(pipe, rule) if rule is not None and guide is not None else nullcontext()
            with guided, torch.no_grad():
                output = pipe([self.prompts[i] for i in indices], generator=noise, output_type="pt", **call)
            frames = output.images if hasattr(output, "images") else output.frames[:, output.frames.shape[1] // 2]
            return to_uint8(frames)

        read = _asked(draw, len(self.prompts), seed, self)
        super().__init__("pipeline", read, list(map(str, range(len(self.prompts)))), on_bad_image=on_bad_image)


# ---- one function a kind of source


def _from_path(path: Path, recursive: bool, options: dict) -> Source:
    packed = path.suffix.lower() in (".zip", ".npz", ".npy")
    if not path.exists():
        raise FileNotFoundError(f"no such {'file' if packed else 'folder'}: {path}")
    if path.is_dir():
        return _from_folder(path, recursive, options)
    if not packed:
        raise NotADirectoryError(f"expected a folder of images, got a file: {path} (files may be .zip, .npz or .npy)")
    if path.suffix.lower() == ".zip":
        return _from_zip(path, options)
    return _from_array(path.suffix.lower()[1:], _load_array(path), str(path), options)


def _from_folder(folder: Path, recursive: bool, options: dict) -> Source:
    found = folder.rglob("*") if recursive else folder.iterdir()
    files = [f for f in found if f.suffix.lower() in SUFFIXES and not f.name.startswith(".") and f.is_file()]
    files.sort(key=lambda f: natural_order(f.relative_to(folder).as_posix()))
    if not files:
        hint = (
            "" if recursive or not any(f.is_dir() for f in folder.iterdir()) else "; recursive=True looks in subfolders"
        )
        raise ValueError(f"no images in {folder}: it has no file that ends in {', '.join(SUFFIXES)}{hint}")

    def read(batch_size: int, start: int) -> Iterator[Raw]:
        for file, name in zip(files[start:], names[start:]):
            try:
                stamp = _stamp(file)
            except OSError:
                stamp = None
            yield Raw(name, str(file), partial(_open, file), stamp)

    names = [f.relative_to(folder).as_posix() for f in files]
    return Source("folder", read, names, stamps=lambda: [_stamp(f) for f in files], origin=str(folder), **options)


def _from_zip(path: Path, options: dict) -> Source:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [e for e in archive.infolist() if not e.is_dir() and Path(e.filename).suffix.lower() in SUFFIXES]
    except zipfile.BadZipFile as error:
        raise ValueError(f"can't read {path}: {error}") from error
    entries = [e for e in entries if not Path(e.filename).name.startswith(".") and "__MACOSX/" not in e.filename]
    entries.sort(key=lambda e: natural_order(e.filename))
    if not entries:
        raise ValueError(f"no images in {path}: it has no entry that ends in {', '.join(SUFFIXES)}")

    def stamps() -> list[Stamp]:
        modified = path.stat().st_mtime_ns
        return [(f"{path.resolve()}!{e.filename}", e.file_size, modified) for e in entries]

    def read(batch_size: int, start: int) -> Iterator[Raw]:
        with zipfile.ZipFile(path) as archive:
            for entry, stamp in zip(entries[start:], stamps()[start:]):
                yield Raw(entry.filename, f"{path}!{entry.filename}", partial(_open_entry, archive, entry), stamp)

    return Source("zip", read, [e.filename for e in entries], stamps=stamps, origin=str(path), **options)


def _load_array(path: Path) -> np.ndarray:
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(path, allow_pickle=False) as file:
            keys = list(file.files)
            if "images" not in keys and {"mu", "sigma"} <= set(keys):
                raise KeyError(
                    f"{path} holds statistics (mu, sigma) and no images: diffgen.eval.features.load_stats reads it"
                )
            if "images" not in keys and keys != ["arr_0"]:
                raise KeyError(f"{path} has no array 'images'; it has {', '.join(keys) or 'none'}")
            return file["images" if "images" in keys else "arr_0"]
    except KeyError as error:
        raise ValueError(error.args[0]) from None
    except UNREADABLE as error:
        raise ValueError(f"can't read {path}: {error}") from error


def _from_array(kind: str, images: np.ndarray, where: str, options: dict) -> Source:
    """[N,H,W,C], [N,C,H,W] or [N,H,W]; refused when it could be both of the first."""
    shape = images.shape
    last, first = _channel_axis(shape, 3, 1) if images.ndim == 4 else (False, False)
    if images.ndim not in (3, 4) or images.size == 0 or (images.ndim == 4 and not (last or first)):
        raise ValueError(f"{where} must be [N,H,W,3] or [N,3,H,W] and not empty; got {list(shape)}")
    if last and first:
        raise ValueError(f"{where} {list(shape)} can be [N,H,W,C] or [N,C,H,W]; pass a tensor [N,3,H,W] instead")
    if first:
        images = images.transpose(0, 2, 3, 1)
    return _indexed(kind, images.__getitem__, len(images), where + " image {}", options)


def _from_tensor(images: Tensor, options: dict) -> Source:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise ValueError(f"an image tensor must be [N,3,H,W] and not empty; got {list(images.shape)}")
    if images.is_floating_point() and options["on_bad_image"] == "error":
        bad = (~torch.isfinite(images).flatten(1).all(1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"float images must be finite; NaN or infinity in images {bad[:10]}")
        _check_range(images, "")
    elif not images.is_floating_point() and images.dtype not in (torch.uint8, torch.uint16):
        raise TypeError(f"an image tensor must be uint8 or floating point; got {images.dtype}")
    return _indexed("tensor", images.__getitem__, len(images), "image {}", options)


def _from_list(images: Sequence[Any], options: dict) -> Source:
    if not images:
        raise ValueError("the list of images is empty")
    firsts = [image[0] if isinstance(image, (tuple, list)) and image else image for image in images]
    if any(isinstance(image, (Tensor, np.ndarray)) and image.ndim == 4 for image in firsts):
        return _from_iterable(images, "image", options)
    for i, image in enumerate(images):
        if not isinstance(image, (Image.Image, Tensor, np.ndarray, tuple, dict)):
            got = type(image).__name__
            raise TypeError(
                f"image {i} of the list must be a PIL image, a tensor [3,H,W] or an array [H,W,3]; got {got}"
            )
    return _indexed("list", images.__getitem__, len(images), "image {} of the list", options)


def _from_columns(dataset: Any, column: str, options: dict) -> Source:
    if column not in dataset.column_names:
        columns = ", ".join(map(str, dataset.column_names))
        raise ValueError(f"the dataset has no column {column!r} but {columns}: pass column=")
    rows = lambda i: dataset[i][column]  # noqa: E731
    return _indexed("dataset", rows, len(dataset), f"row {{}} of column {column!r}", options)


def _indexed(kind: str, get: Callable[[int], Any], n: int, where: str, options: dict) -> Source:
    if n == 0:
        raise ValueError(f"the {kind} is empty")

    def read(batch_size: int, start: int) -> Iterator[Raw]:
        for i in range(start, n):
            yield Raw(str(i), where.format(i), partial(get, i))

    return Source(kind, read, list(map(str, range(n))), **options)


def _from_iterable(batches: Iterable[Any], column: str, options: dict) -> Source:
    def read(batch_size: int, start: int) -> Iterator[Raw]:
        i = 0
        for batch in batches:
            for image in _unpack(batch, column):
                if i >= start:
                    yield Raw(str(i), f"image {i} of the iterable", partial(_same, image))
                i += 1

    return Source("iterable", read, once=iter(batches) is batches, **options)


def _from_callable(fn: Callable, n: int | None, seed: int, options: dict) -> Source:
    if n is None or n < 1:
        raise ValueError(f"a callable source needs n, the number of images to ask for; got n={n}")
    source = Source("callable", lambda batch_size, start: iter(()), list(map(str, range(n))), **options)
    source._read = _asked(fn, n, seed, source)
    return source


def _asked(fn: Callable, n: int, seed: int, source: Source) -> Callable[[int, int], Iterator[Raw]]:
    """Reader of a source that makes its images on request. It may end early: what it made is reported and used."""

    def read(batch_size: int, start: int) -> Iterator[Raw]:
        for first in range(start, n, batch_size):
            indices = list(range(first, min(first + batch_size, n)))
            try:
                made = _unpack(fn(indices, [seed_of("draw", seed, i) for i in indices]), "image")
            except StopIteration:
                made = []
            except Exception as error:
                if source.on_bad_image == "error":
                    text = f"the {source.kind} failed after {first} of {n} images ({type(error).__name__}: {error})"
                    raise RuntimeError(f"{text}; batches(start={first}) goes on from there") from error
                made = []
            if len(made) > len(indices):
                raise ValueError(f"the {source.kind} was asked for {len(indices)} images and gave {len(made)}")
            for i, image in zip(indices, made):
                yield Raw(str(i), f"image {i} of the {source.kind}", partial(_same, image))
            if len(made) < len(indices):
                source.notes["missing"] = n - first - len(made)
                return

    return read


def _unpack(batch: Any, column: str, labelled: bool = True) -> Sequence[Any]:
    """The images of a batch: [B,...] tensors and arrays, lists of images, (images, labels), {"image": images}."""
    if isinstance(batch, dict) and "bytes" not in batch:
        keys = [key for key in (column, "image", "images", "pixel_values") if key in batch]
        if not keys:
            raise ValueError(f"a batch has no key {column!r} but {', '.join(map(str, batch))}: pass column=")
        return _unpack(batch[keys[0]], column, labelled=False)
    if isinstance(batch, (Tensor, np.ndarray)):
        return list(batch) if batch.ndim == 4 else [batch]
    if isinstance(batch, (list, tuple)):
        images = all(isinstance(x, Image.Image) or getattr(x, "ndim", 0) == 3 for x in batch)
        if labelled and not images:
            return _unpack(batch[0], column, labelled=False)
        return batch
    return [batch]


def natural_order(path: str) -> list[tuple[int, int, str]]:
    """Sort key under which 2.png comes before 10.png."""
    return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", path)]


def _stamp(file: Path) -> Stamp:
    stat = file.stat()
    return str(file.resolve()), stat.st_size, stat.st_mtime_ns


# ---- from whatever is in a file or in memory to uint8 RGB


def _open(file: Path | io.BytesIO) -> Image.Image:
    """A decoded image that has forgotten its file. open() alone doesn't notice a truncated one."""
    with Image.open(file, formats=FORMATS) as image:
        rawmode = str(image.tile[0][3]) if image.tile else ""
        if image.format in ("PNG", "TIFF") and ";16" in rawmode and not image.mode.startswith("I"):
            image.info[SIXTEEN_BIT] = True  # PIL has no 16-bit colour: it keeps the high byte, which is v of 257 v
        image.info["frames"] = getattr(image, "n_frames", 1)  # before load: it seeks
        image.load()
        return image


def _open_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Image.Image:
    with archive.open(entry) as packed:  # its header may lie about the size
        content = packed.read(LARGEST_ENTRY + 1)
    if len(content) > LARGEST_ENTRY:
        raise ValueError(f"it unpacks to more than {LARGEST_ENTRY >> 20} MB")
    return _open(io.BytesIO(content))


def _same(image: Any) -> Any:
    return image


def _decode(payload: Any, where: str, alpha: str) -> tuple[Tensor, str | None, tuple[str, ...]]:
    """(uint8 [3,H,W], container format, what was done)."""
    if isinstance(payload, (tuple, list)) and payload:
        payload = payload[0]  # (image, label)
    if isinstance(payload, dict):
        if "image" in payload:
            return _decode(payload["image"], where, alpha)
        try:  # a Hugging Face image that isn't decoded
            payload = _open(io.BytesIO(payload["bytes"]) if payload.get("bytes") else Path(payload["path"]))
        except (KeyError, TypeError) as error:
            raise TypeError(f"{where} is a dict without 'image', 'bytes' or 'path': {', '.join(payload)}") from error
        except UNREADABLE as error:
            raise BadImage(f"can't read {where}: {error}") from error
    if isinstance(payload, Image.Image):
        return _from_pil(payload, where, alpha)
    if isinstance(payload, np.ndarray):
        payload = _channels_first(payload, where)
    if isinstance(payload, Tensor):
        image, facts = _from_values(payload.detach().cpu(), where, alpha)
        return image, None, facts
    raise TypeError(f"{where} must be a PIL image, a tensor or an array; got {type(payload).__name__}")


def _from_pil(image: Image.Image, where: str, alpha: str) -> tuple[Tensor, str | None, tuple[str, ...]]:
    """PIL's own convert() clips 16-bit values to white and drops alpha, so both are met before it."""
    container = image.format
    facts: list[str] = []
    try:
        if image.getexif().get(0x0112, 1) != 1:
            facts.append("rotated by EXIF")
        upright = ImageOps.exif_transpose(image)
        if image.info.get("frames", 1) > 1:
            facts.append("first frame of several")
        if image.info.get(SIXTEEN_BIT):
            facts.append(SIXTEEN_BIT)
        if upright.mode.startswith("I;16"):
            grey = torch.from_numpy((np.asarray(upright).astype(np.int64) + 128) // 257).to(torch.uint8)
            return grey.expand(3, *grey.shape).contiguous(), container, (*facts, SIXTEEN_BIT, "greyscale")
        if upright.mode in ("I", "F"):
            raise BadImage(
                f"{where} has more than 16 bits a channel (PIL mode {upright.mode!r}); convert it to 8 bits first"
            )
        mode = upright.mode
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            if np.array(upright)[..., 3].min() < 255:
                facts.append("transparent")
                if alpha != "drop":
                    upright = Image.alpha_composite(Image.new("RGBA", upright.size, alpha), upright)
        if mode not in ("RGB", "RGBA"):
            facts.append("greyscale" if mode in GREY else "palette" if mode in ("P", "PA") else mode.lower())
        return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1), container, tuple(facts)
    except BadImage:
        raise
    except UNREADABLE as error:  # a PIL image that was opened by the caller is decoded only now
        raise BadImage(f"can't read {where}: {error}") from error


def _channel_axis(shape: tuple[int, ...], last: int, first: int) -> tuple[bool, bool]:
    """Which of the two axes can hold 1, 3 or 4 channels; 3 decides when both can."""
    found = (shape[last] in (1, 3, 4), shape[first] in (1, 3, 4))
    three = (shape[last] == 3, shape[first] == 3)
    return three if all(found) and any(three) else found


def _channels_first(image: np.ndarray, where: str) -> Tensor:
    last, first = _channel_axis(image.shape, 2, 0) if image.ndim == 3 else (False, False)
    if image.ndim != 2 and last == first:
        raise ValueError(f"{where} must be an array [H,W,3] or [3,H,W]; got {list(image.shape)}")
    tensor = torch.from_numpy(np.array(image))  # a copy: memory maps are read-only
    return tensor.permute(2, 0, 1) if last else tensor


def _from_values(x: Tensor, where: str, alpha: str) -> tuple[Tensor, tuple[str, ...]]:
    """[H,W] or [C,H,W] with 1, 3 or 4 channels; uint8, uint16, or float in [0,1]."""
    facts: list[str] = []
    x = x[None] if x.ndim == 2 else x
    if x.ndim != 3 or x.shape[0] not in (1, 3, 4) or x.numel() == 0:
        raise ValueError(f"{where} must be [3,H,W] and not empty; got {list(x.shape)}")
    if x.is_floating_point():
        if not torch.isfinite(x).all():
            raise BadImage(f"float images must be finite; NaN or infinity in {where}")
        low, high = _check_range(x, f"{where}: ")
        if low < 0 or high > 1:
            facts.append("floats outside [0,1] clipped")
        x = (x.float().clamp(0, 1) * 255).round().to(torch.uint8)
    elif x.dtype == torch.uint16:
        x = ((x.int() + 128) // 257).to(torch.uint8)
        facts.append(SIXTEEN_BIT)
    elif x.dtype != torch.uint8:
        raise TypeError(f"{where} must be uint8 or floating point; got {x.dtype}")
    if x.shape[0] == 4:
        image, _, more = _from_pil(Image.fromarray(x.permute(1, 2, 0).contiguous().numpy(), "RGBA"), where, alpha)
        return image, (*facts, *more)
    if x.shape[0] == 1:
        return x.expand(3, -1, -1).contiguous(), (*facts, "greyscale")
    return x, tuple(facts)


def _check_range(x: Tensor, prefix: str) -> tuple[float, float]:
    """(min, max). A decoder's overshoot is tolerated; what looks like another range is never guessed."""
    low, high = float(x.min()), float(x.max())
    if low < -0.01 or high > 1.5:
        hint = "for images in [-1,1] pass (x + 1) / 2; for images in [0,255] pass x / 255"
        raise ValueError(f"{prefix}float images must be in [0,1]; got values from {low:.4g} to {high:.4g} ({hint})")
    return low, high
