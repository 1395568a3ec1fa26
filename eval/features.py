"""`features(source, extractor)`: one pass over images of any origin, with a cache; and statistics as files.

Tensor legend: N images, D features.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffgen.eval.cache import Cache, Record, feature_key, image_hash, record_of
from diffgen.eval.extractors import Extractor, get_extractor
from diffgen.eval.images import ImageSource, Item, Source, open_source

SHARD_IMAGES, SHARD_BYTES = 256, 1 << 27  # a shard ends at either: memory stays bounded, a cut-off run loses one shard


@dataclass(frozen=True)
class Features:
    """x float32 [N,D], on the CPU, and where it comes from."""

    x: Tensor
    id: str  # the extractor's
    names: list[str]  # file names, or indices as text
    hashes: list[str]  # sha256 of each image's shape and RGB bytes
    # kind; counts {what happened: images}; sizes {"WxH": images}; formats; skipped {name: reason}; duplicates: images that
    # equal an earlier one; cached: rows that came from the cache; warnings
    notes: dict[str, Any] = field(default_factory=dict)
    logits: Tensor | None = None  # float32 [N, classes]

    def __len__(self) -> int:
        return len(self.x)


def features(
    source: ImageSource,
    extractor: str | nn.Module | Extractor,
    *,
    cache: Cache | str | os.PathLike | bool | None = None,
    batch_size: int = 64,
    progress: bool = True,
    logits: bool = False,
    on_nonfinite: str = "error",
    **options: Any,
) -> Features:
    """Features of every image of `source`.

    source, options: what `open_source` takes. extractor: what `get_extractor` takes.
    cache:  True for the default folder, a folder, or a Cache; None or False for none. Shards of images that were seen before,
            under whatever names, aren't computed again, so a run that was cut off goes on where it stopped. A user's module is
            never cached: its id can't see all of its state.
    logits: also the class logits, where the extractor is a classifier.
    on_nonfinite: "error" names the images with NaN or infinite features, "drop" leaves them out and counts them.
    """
    if on_nonfinite not in ("error", "drop"):
        raise ValueError(f"on_nonfinite must be 'error' or 'drop'; got {on_nonfinite!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    extract = get_extractor(extractor)
    if logits and extract.head is None:
        extract.logits(torch.empty(0))  # raises, before the pass and not after it
    opened = open_source(source, **options)
    store = _store(cache) if extract.cacheable else None
    found = _known_set(opened, extract, store)
    x, hashes, cached = found or _one_pass(opened, extract, store, batch_size, progress)
    names = list(opened.names)

    notes = notes_of(opened, hashes, cached) | {"warnings": opened.warnings()}
    for text in notes["warnings"]:
        warnings.warn(text, stacklevel=2)
    finite = torch.isfinite(x).all(1)
    if not finite.all():
        bad = [names[i] for i in (~finite).nonzero().flatten().tolist()]
        if on_nonfinite == "error":
            raise ValueError(f"{extract.id} gave NaN or infinite features for {len(bad)} images: {', '.join(bad[:10])}")
        notes["counts"]["dropped: features not finite"] = len(bad)
        keep = finite.nonzero().flatten().tolist()
        x, names, hashes = x[finite], [names[i] for i in keep], [hashes[i] for i in keep]
    return Features(x, extract.id, names, hashes, notes, extract.logits(x) if logits else None)


def duplicates(a: Features, b: Features | None = None) -> dict[str, str]:
    """{name in a: name of an identical image}: an earlier one in a, or, with b, one in b (copies of training images)."""
    first: dict[str, str] = {} if b is None else dict(zip(reversed(b.hashes), reversed(b.names)))
    found = {}
    for name, sha256 in zip(a.names, a.hashes):
        if sha256 in first:
            found[name] = first[sha256]
        elif b is None:
            first[sha256] = name
    return found


def _store(cache: Cache | str | os.PathLike | bool | None) -> Cache | None:
    if cache is None or cache is False:
        return None
    return cache if isinstance(cache, Cache) else Cache(None if cache is True else cache)


def _known_set(source: Source, extract: Extractor, store: Cache | None) -> tuple[Tensor, list[str], int] | None:
    """A folder whose files are unchanged and whose features are all there: neither decoding nor network."""
    records = store.records(source) if store else None
    if store is None or records is None:
        return None
    good = [(name, record) for name, record in zip(source.all_names, records) if record.error is None]
    skipped = {name: record.error for name, record in zip(source.all_names, records) if record.error is not None}
    if not good or (skipped and source.on_bad_image == "error"):
        return None
    hashes = [record.sha256 for _, record in good]
    x = store.load_set(extract, feature_key(extract, hashes))
    if x is None or len(x) != len(hashes):
        return None
    source.replay([(name, r.size, r.format, r.facts) for name, r in good], skipped)
    return x, hashes, len(x)


def _one_pass(
    source: Source, extract: Extractor, store: Cache | None, batch_size: int, progress: bool
) -> tuple[Tensor, list[str], int]:
    """(features, hashes, rows that came from the cache)."""
    rows: list[Tensor] = []
    hashes: list[str] = []
    keys: list[str] = []
    records: list[tuple[Any, Record]] = []
    cached = 0
    bar = tqdm(
        total=source.total, desc=f"features {extract.id}", unit="image", delay=2, leave=False, disable=not progress
    )
    try:
        with bar:
            for shard in _shards(source.stream(batch_size)):
                shard_hashes = [image_hash(item.image) for item in shard]
                key = feature_key(extract, shard_hashes)
                x = store.load(extract, key) if store else None
                if x is not None and len(x) == len(shard):
                    cached += len(x)
                else:
                    x = extract([item.image for item in shard], batch_size, progress=False)
                    if store and torch.isfinite(x).all():
                        store.save(extract, key, x)
                rows.append(x)
                keys.append(key)
                hashes += shard_hashes
                records += [(item.stamp, record_of(item, sha256)) for item, sha256 in zip(shard, shard_hashes)]
                bar.update(len(shard))
    finally:
        if store:
            records += [(stamp, Record("", (0, 0), None, (), error)) for stamp, error in source.bad_stamps]
            store.save_records(source, records)
    x = torch.cat(rows)
    if store and torch.isfinite(x).all():
        store.save_set(extract, feature_key(extract, hashes), keys, x, source.origin)
    return x, hashes, cached


def _shards(items: Iterator[Item]) -> Iterator[list[Item]]:
    shard: list[Item] = []
    size = 0
    for item in items:
        shard.append(item)
        size += item.image.numel()
        if len(shard) == SHARD_IMAGES or size >= SHARD_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def notes_of(source: Source, hashes: list[str], cached: int = 0) -> dict[str, Any]:
    """What happened to a source's images in a pass, for the report."""
    return {
        "kind": source.kind,
        "counts": {fact: n for fact, n in source.notes.items() if n},
        "sizes": {f"{w}x{h}": n for (w, h), n in source.sizes.most_common()},
        "formats": dict(source.formats),
        "skipped": dict(source.skipped),
        "duplicates": len(hashes) - len(Counter(hashes)),
        "cached": cached,
    }


# ---- statistics


@dataclass(frozen=True)
class Stats:
    """Mean and unbiased covariance of n feature rows. n is None for files that don't say it."""

    mu: Tensor  # float64 [D]
    sigma: Tensor  # float64 [D,D]
    n: int | None
    id: str


def stats(feats: Features) -> Stats:
    x = feats.x.double()
    if len(x) < 2:
        raise ValueError(f"statistics need at least 2 images; got {len(x)}")
    mu = x.mean(0)
    return Stats(mu, (x - mu).T @ (x - mu) / (len(x) - 1), len(x), feats.id)


def save_stats(path: str | os.PathLike, feats: Features | Stats) -> Path:
    """An .npz with mu and sigma, which pytorch-fid and EDM read, and n and extractor, which only diffgen does."""
    held = feats if isinstance(feats, Stats) else stats(feats)
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"statistics are written as .npz; got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"mu": held.mu.numpy(), "sigma": held.sigma.numpy(), "extractor": held.id}
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.npz")
    try:
        np.savez(temporary, **(arrays if held.n is None else arrays | {"n": held.n}))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_stats(path: str | os.PathLike, assume_extractor: str | None = None) -> Stats:
    """The statistics in an .npz. assume_extractor: the id to take for a file of another program, which has none.

    Raises ValueError for a file without mu and sigma, without an id when none is assumed, and when the two contradict.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {key: file[key] for key in ("mu", "sigma", "n", "extractor") if key in file.files}
            keys = ", ".join(file.files)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such statistics file: {path}") from None
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"can't read statistics from {path}: {error}") from error
    if not {"mu", "sigma"} <= set(held):
        raise ValueError(f"{path} has no mu and sigma; it has {keys or 'nothing'}")
    id = str(held["extractor"]) if "extractor" in held else assume_extractor
    if id is None:
        hint = "for pytorch-fid and EDM files it is 'inception-v3-compat/2048@tf1-bilinear'"
        raise ValueError(f"{path} doesn't say which extractor made it: pass assume_extractor= ({hint})")
    if assume_extractor not in (None, id):
        raise ValueError(f"{path} was made with extractor {id!r}, not with {assume_extractor!r}")
    if any(np.iscomplexobj(held[key]) for key in ("mu", "sigma")):
        raise ValueError(f"{path} must have real mu and sigma; it has complex ones")
    n = held.get("n")
    if n is not None and not (np.size(n) == 1 and np.isfinite(n).all() and float(np.ravel(n)[0]).is_integer()):
        raise ValueError(f"{path} must have a whole number n; got {n}")
    mu, sigma = (torch.from_numpy(np.atleast_1d(held[key]).astype(np.float64)) for key in ("mu", "sigma"))
    if (
        mu.ndim != 1
        or sigma.shape != (len(mu), len(mu))
        or not (torch.isfinite(mu).all() and torch.isfinite(sigma).all())
    ):
        raise ValueError(
            f"{path} must have finite mu [D] and sigma [D,D]; got {list(mu.shape)} and {list(sigma.shape)}"
        )
    if not torch.allclose(sigma, sigma.T, rtol=1e-5, atol=1e-5 * float(sigma.abs().max())):
        raise ValueError(f"{path} must have a symmetric sigma; it differs from its transpose")
    return Stats(mu, sigma, None if n is None else int(np.ravel(n)[0]), id)


def require_same_extractor(a: Features | Stats, b: Features | Stats) -> None:
    """Raises ValueError, with both ids, unless a distance between the two means something."""
    if a.id != b.id:
        raise ValueError(f"features of different extractors can't be compared: {a.id!r} and {b.id!r}")
    dims = [f.x.shape[1] if isinstance(f, Features) else len(f.mu) for f in (a, b)]
    if dims[0] != dims[1]:
        raise ValueError(f"both are features of {a.id!r}, but of {dims[0]} and {dims[1]} dimensions")
