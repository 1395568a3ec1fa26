"""One pass over a source: features, values of each image, hashes and what was noticed; by one process or by several."""

from __future__ import annotations

import copy
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffgen.eval.cache import image_hash
from diffgen.eval.extractors import Extractor
from diffgen.eval.features import features, notes_of
from diffgen.eval.images import Item, PipelineSource, Source, open_source

CHUNK_BYTES = 1 << 28  # of images that are judged at a time
KEEP_BYTES, THUMBNAIL = 1 << 27, 96  # of pictures kept for the report where a source can't be read again
MADE = ("callable", "pipeline", "iterable")  # sources whose images can't be had a second time, or only at a price

# (images uint8 [B,3,H,W], their prompts or None) -> {name: float64 [B]}
Judge = Callable[[Tensor, list[str] | None], dict[str, Tensor]]


@dataclass
class ImageSet:
    """What a pass over one source found. N images, in the source's order."""

    name: str  # "generated", "reference" ...
    source: Source
    names: list[str]
    hashes: list[str]
    x: Tensor | None = None  # features, float32 [N,D]
    logits: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)  # {judged: [N]}
    prompts: list[str] | None = None
    notes: dict[str, Any] = field(default_factory=dict)  # as Features.notes
    warnings: list[str] = field(default_factory=list)
    kept: dict[str, Tensor] = field(default_factory=dict)  # name -> thumbnail, of sources that can't be read again

    def __len__(self) -> int:
        return len(self.names)

    def picture(self, i: int) -> Tensor | None:
        """Image i, uint8 [3,H,W]: kept, or read once more; None where it's gone."""
        if self.source.kind in MADE:
            return self.kept.get(self.names[i])
        twin = copy.copy(self.source)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return next(twin.stream(1, start=twin.all_names.index(self.names[i]))).image
        except (ValueError, OSError, RuntimeError, StopIteration):
            return None


def world() -> tuple[int, int]:
    """(rank, number of processes), as torchrun and accelerate launch tell it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def opened(source: Any, n: int | None, seed: int, on_bad_image: str) -> Source:
    """`open_source`, cut after n images."""
    found = open_source(source, n=n, seed=seed, on_bad_image=on_bad_image)
    if n is None or found.kind == "callable":
        return found
    return _part(found, slice(0, n))


def _part(source: Source, rows: slice) -> Source:
    """The images of some rows. A folder's other files aren't opened."""
    part, read, stamps = copy.copy(source), source._read, source._stamps

    def some(batch_size: int, start: int) -> Iterator[Any]:
        wanted = islice(read(batch_size, 0), rows.start, rows.stop, rows.step)
        return islice(wanted, start, None)

    part._read = some
    part._known = None if source._known is None else source._known[rows]
    part._stamps = None if stamps is None else lambda: stamps()[rows]
    part._reset()
    return part


def _watched(source: Source, see: Callable[[Item], None]) -> Source:
    """The same source (it shares its state), which shows each image as it goes by."""

    class Watched(type(source)):  # type: ignore[misc]
        def stream(self, batch_size: int = 64, start: int = 0) -> Iterator[Item]:
            for item in super().stream(batch_size, start):
                see(item)
                yield item

    twin = object.__new__(Watched)
    twin.__dict__ = source.__dict__
    return twin


class _Look:
    """Judges the images that go by, in chunks of one size."""

    def __init__(self, source: Source, judge: Judge | None, prompts: list[str] | None):
        self.judge, self.prompts = judge, prompts
        self.keep = source.kind in MADE
        self.limit = float("inf") if source.kind == "tensor" else CHUNK_BYTES  # a tensor is in memory anyway
        self.row = {name: i for i, name in enumerate(source.all_names)}  # also of images that will be skipped
        self.found: dict[str, list[Tensor]] = {}
        self.kept: dict[str, Tensor] = {}
        self.texts: list[str] = []
        self.seen = self.bytes = self.kept_bytes = 0
        self.held: list[Tensor] = []

    def see(self, item: Item) -> None:
        if self.held and (item.image.shape != self.held[0].shape or self.bytes >= self.limit):
            self.flush()
        if self.prompts is not None:
            row = self.row.get(item.name, self.seen)
            if row >= len(self.prompts):
                raise ValueError(f"prompts must be one an image; got {len(self.prompts)} prompts and more images")
            self.texts.append(self.prompts[row])
        self.seen += 1
        if self.keep and self.kept_bytes < KEEP_BYTES:
            self.kept[item.name] = thumbnail(item.image)
            self.kept_bytes += self.kept[item.name].numel()
        if self.judge is not None:
            self.held.append(item.image)
            self.bytes += item.image.numel()

    def flush(self) -> None:
        if self.judge is None or not self.held:
            return
        texts = self.texts[self.seen - len(self.held) : self.seen] if self.prompts is not None else None
        for name, values in self.judge(torch.stack(self.held), texts).items():
            self.found.setdefault(name, []).append(values)
        self.held, self.bytes = [], 0


def thumbnail(image: Tensor) -> Tensor:
    """uint8 [3,H,W] at most THUMBNAIL pixels wide and high."""
    _, h, w = image.shape
    scale = THUMBNAIL / max(h, w)
    if scale >= 1:
        return image.clone()
    size = (max(1, round(h * scale)), max(1, round(w * scale)))
    small = torch.nn.functional.interpolate(image[None].float(), size=size, mode="bicubic", antialias=True)
    return small[0].round().clamp(0, 255).to(torch.uint8)


def read(
    name: str,
    source: Source,
    extract: Extractor | None = None,
    *,
    judge: Judge | None = None,
    prompts: list[str] | None = None,
    logits: bool = False,
    cache: Any = None,
    batch_size: int = 64,
    progress: bool = True,
    distributed: bool = False,
) -> ImageSet:
    """The one pass. distributed: each process takes every W-th image, and all get the whole result."""
    if prompts is None and isinstance(source, PipelineSource):
        prompts = source.prompts[: source.total]
    if prompts is not None and source.total is not None and len(prompts) != source.total:
        raise ValueError(f"prompts must be one an image; got {len(prompts)} prompts and {source.total} images")
    how: dict[str, Any] = {"cache": cache, "batch_size": batch_size, "progress": progress}
    rank, processes = world()
    if not distributed or processes == 1:
        return _checked(_read(name, source, extract, judge, prompts, logits, **how), prompts)
    if source.kind in MADE or source.total is None:
        raise ValueError(
            f"a {source.kind} can't be shared by {processes} processes: write its images to a folder first"
        )
    rows, mine, error = slice(rank, None, processes), None, None
    try:
        if source.all_names[rows]:
            shard = prompts[rows] if prompts is not None else None
            mine = _read(name, _part(source, rows), extract, judge, shard, logits, **how)
            mine.source = source
    except Exception as caught:  # the others wait for this process: it tells them first
        error = caught
    return _checked(_merged(_gathered(mine, error, source), source), prompts)


def _read(
    name: str, source: Source, extract: Extractor | None, judge: Judge | None, prompts: list[str] | None, logits: bool,
    cache: Any, batch_size: int, progress: bool,
) -> ImageSet:  # fmt: skip
    look = _Look(source, judge, prompts)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if extract is None:
            hashes = _plain_pass(source, look, batch_size, progress)
            found = ImageSet(name, source, list(source.names), hashes)
            found.notes = notes_of(source, hashes)
        else:
            options: dict[str, Any] = {"cache": cache, "batch_size": batch_size, "progress": progress, "logits": logits}
            feats = features(_watched(source, look.see), extract, **options)
            if judge is not None and not look.seen:  # all features came from the cache
                _plain_pass(source, look, batch_size, progress)
            found = ImageSet(name, source, feats.names, feats.hashes, feats.x, feats.logits, notes=feats.notes)
        look.flush()
    found.warnings = _told(caught)
    found.values = {key: torch.cat(parts) for key, parts in look.found.items()}
    if prompts is not None:
        row = {known: i for i, known in enumerate(source.all_names)}
        found.prompts = [
            prompts[row.get(image, i)] for i, image in enumerate(found.names) if row.get(image, i) < len(prompts)
        ]
    found.kept = look.kept
    return found


def _plain_pass(source: Source, look: _Look, batch_size: int, progress: bool) -> list[str]:
    hashes = []
    bar = tqdm(desc=f"reading {source.kind}", total=source.total, delay=2, leave=False, disable=not progress)
    with bar:
        for item in source.stream(batch_size):
            look.see(item)
            hashes.append(image_hash(item.image))
            bar.update()
    for text in source.warnings():
        warnings.warn(text, stacklevel=2)
    return hashes


def _told(caught: list[warnings.WarningMessage]) -> list[str]:
    """The texts of user warnings, once each; others are passed on."""
    for other in caught:
        if not issubclass(other.category, UserWarning):
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)))


def _checked(found: ImageSet, prompts: list[str] | None) -> ImageSet:
    """Prompts are one an image also where the number of images was not known before."""
    told = 0 if prompts is None else len(prompts)
    if found.prompts is not None and (
        len(found.prompts) != len(found) or (not found.source.all_names and told > len(found))
    ):
        raise ValueError(f"prompts must be one an image; got {told} prompts and {len(found)} images")
    return found


# ---- several processes


def _gathered(mine: ImageSet | None, error: Exception | None, source: Source) -> list[ImageSet]:
    """The sets of all processes, without the empty ones. An error in one is raised in all."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    group: Any = dist.new_group(backend="gloo")
    light = None if mine is None else copy.copy(mine)
    if light is not None:
        light.source = None  # type: ignore[assignment]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (light, None if error is None else f"{type(error).__name__}: {error}"), group=group)
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(parts):
        if message is not None:
            raise RuntimeError(f"process {rank} failed: {message}")
    return [part for part, _ in parts if part is not None]


def _merged(parts: list[ImageSet], source: Source) -> ImageSet:
    """One set in the source's order: image i came from process i mod W."""
    row = {name: i for i, name in enumerate(source.all_names)}
    names = [name for part in parts for name in part.names]
    order = sorted(range(len(names)), key=lambda i: row[names[i]])

    def joined(get: Callable[[ImageSet], Any]) -> Any:
        columns = [get(part) for part in parts]
        if columns[0] is None:
            return None
        if isinstance(columns[0], Tensor):
            return torch.cat(columns)[torch.tensor(order)]
        flat = [value for column in columns for value in column]
        return [flat[i] for i in order]

    whole = ImageSet(parts[0].name, source, joined(attrgetter("names")), joined(attrgetter("hashes")))
    whole.x, whole.logits, whole.prompts = (joined(attrgetter(key)) for key in ("x", "logits", "prompts"))
    whole.values = {key: joined(lambda part: part.values[key]) for key in parts[0].values}  # noqa: B023
    for key in ("counts", "sizes", "formats"):
        whole.notes[key] = dict(sum((Counter(part.notes[key]) for part in parts), Counter()))
    whole.notes["skipped"] = {name: why for part in parts for name, why in part.notes["skipped"].items()}
    whole.notes |= {"kind": source.kind, "cached": sum(part.notes["cached"] for part in parts)}
    whole.notes["duplicates"] = len(whole.hashes) - len(set(whole.hashes))
    source.formats = Counter(whole.notes["formats"])
    whole.warnings = list(dict.fromkeys(text for part in parts for text in part.warnings))
    return whole
