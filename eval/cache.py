"""Features on disk, found again by the content of the images: `ls()` lists them, `rm()` deletes them.

    FOLDER/features/<extractor>/index.json      what is there
    FOLDER/features/<extractor>/<key>.npy       a shard: float32 [rows, D]; its key hashes extractor and images
    FOLDER/hashes/<folder of images>.json       hashes of decoded images by (path, size, mtime_ns), so that a known folder
                                                needs no decoding
FOLDER is $DIFFGEN_CACHE, or $XDG_CACHE_HOME/diffgen, or ~/.cache/diffgen. A changed pixel changes the key; new file names or
another PNG compression don't. Nothing here stops an evaluation: what can't be read is computed, what can't be written is
left out, with a warning.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import __version__ as pillow
from torch import Tensor

from diffgen.eval.extractors import Extractor
from diffgen.eval.images import Item, Source, Stamp

LOCK_SECONDS = 10
SETTLED_NS = 2_000_000_000  # a file younger than this may change again without a new mtime: its hash isn't kept


def default_folder() -> Path:
    if os.environ.get("DIFFGEN_CACHE"):
        return Path(os.environ["DIFFGEN_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffgen"


@dataclass(frozen=True)
class Entry:
    """One feature set: n images of `source` through `extractor`. An unfinished one has the key "partial"."""

    key: str
    extractor: str
    n: int
    dim: int
    bytes: int
    created: float  # seconds since 1970
    source: str


@dataclass(frozen=True)
class Record:
    """What decoding one file gave: the hash of its pixels, or the error."""

    sha256: str
    size: tuple[int, int]
    format: str | None
    facts: tuple[str, ...]
    error: str | None = None


def image_hash(image: Tensor) -> str:
    """sha256 of shape and RGB bytes of a uint8 [3,H,W]."""
    _, h, w = image.shape
    digest = hashlib.sha256(f"{h}x{w}".encode())
    digest.update(image.permute(1, 2, 0).contiguous().numpy().tobytes())
    return digest.hexdigest()


def feature_key(extractor: Extractor, hashes: Iterable[str]) -> str:
    """sha256 over extractor id, resize, dtype and the images' hashes in their order."""
    digest = hashlib.sha256(json.dumps(_slot(extractor)).encode())
    for value in hashes:
        digest.update(value.encode())
    return digest.hexdigest()


def _slot(extractor: Extractor) -> list[str]:
    return [extractor.id, f"{extractor.how}{extractor.size}", str(extractor.dtype)]


class Cache:
    """Feature shards of all extractors under one folder."""

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = Path(folder).expanduser() if folder else default_folder()
        self.writable = True

    # ---- features

    def load_set(self, extractor: Extractor, key: str) -> Tensor | None:
        """The features of a whole set, float32 [N,D], or None."""
        known = self._index(extractor)["sets"].get(key)
        if not known:
            return None
        shards = [self.load(extractor, shard) for shard in known["shards"]]
        found = [shard for shard in shards if shard is not None]
        return torch.cat(found) if len(found) == len(shards) else None

    def save_set(self, extractor: Extractor, key: str, shards: Sequence[str], x: Tensor, source: str) -> None:
        entry = {"shards": list(shards), "n": len(x), "dim": x.shape[1], "source": source, "created": time.time()}
        self._update(extractor, lambda index: index["sets"].update({key: entry}))

    def load(self, extractor: Extractor, key: str) -> Tensor | None:
        """The features of one shard, or None; a damaged file is a warning and None."""
        known = self._index(extractor)["shards"].get(key)
        file = self._place(extractor) / f"{key}.npy"
        if not known or not file.exists():
            return None
        try:
            data = file.read_bytes()
            if hashlib.sha256(data).hexdigest() != known["sha256"]:
                raise ValueError("its content is not what was written")
            return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"cached features {file} are damaged ({error}); computing them again", stacklevel=2)
            return None

    def save(self, extractor: Extractor, key: str, x: Tensor) -> None:
        stream = io.BytesIO()
        np.save(stream, x.numpy().astype(np.float32), allow_pickle=False)
        data = stream.getvalue()
        entry = {"rows": len(x), "dim": x.shape[1], "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}

        def add(index: dict) -> None:
            _write(self._place(extractor) / f"{key}.npy", data)
            index["shards"][key] = entry

        self._update(extractor, add)

    def _place(self, extractor: Extractor) -> Path:
        return self.folder / "features" / hashlib.sha256(json.dumps(_slot(extractor)).encode()).hexdigest()[:16]

    def _index(self, extractor: Extractor) -> dict[str, Any]:
        return _read_index(self._place(extractor)) or {"extractor": extractor.id, "shards": {}, "sets": {}}

    def _update(self, extractor: Extractor, change: Callable[[dict], object]) -> None:
        def write() -> None:
            index = self._index(extractor)
            change(index)
            _write(self._place(extractor) / "index.json", json.dumps(index).encode())

        self._locked(self._place(extractor), write)

    def _locked(self, place: Path, write: Callable[[], None]) -> None:
        if not self.writable:
            return
        try:
            place.mkdir(parents=True, exist_ok=True)
            with FileLock(place / ".lock", timeout=LOCK_SECONDS):
                write()
        except (OSError, Timeout) as error:
            self.writable = False
            warnings.warn(f"the feature cache {self.folder} can't be written ({error}); going on without", stacklevel=2)

    # ---- hashes of images that lie in files

    def records(self, source: Source) -> list[Record] | None:
        """A record for each file of `source`, in order; None when one is unknown or changed."""
        stamps = _stamps(source)
        if not stamps:
            return None
        known = self._known(source, stamps)
        records = []
        for path, size, modified in stamps:
            entry = known.get(path)
            if entry is None or entry[:2] != [size, modified]:
                return None
            try:
                sha256, (w, h), container, facts, error = entry[2:]
                records.append(Record(sha256, (w, h), container, tuple(facts), error))
            except (TypeError, ValueError):
                return None
        return records

    def save_records(self, source: Source, items: Iterable[tuple[Stamp | None, Record]]) -> None:
        stamps, now = _stamps(source), time.time_ns()
        fresh = {
            s[0]: [*s[1:], r.sha256, r.size, r.format, r.facts, r.error] for s, r in items if s and _settled(s, now)
        }
        if not stamps or not fresh:
            return
        file = self._records_file(source, stamps)

        def write() -> None:
            _write(file, json.dumps(self._known(source, stamps) | fresh).encode())

        self._locked(file.parent, write)

    def _known(self, source: Source, stamps: list[Stamp]) -> dict[str, list]:
        file = self._records_file(source, stamps)
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            return {path: entry for path, entry in known.items() if len(entry) == 7}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            warnings.warn(f"cached hashes {file} are damaged ({error}); reading the images again", stacklevel=2)
            return {}

    def _records_file(self, source: Source, stamps: list[Stamp]) -> Path:
        first = stamps[0][0]
        place = first.partition("!")[0] if source.kind == "zip" else str(Path(first).parent)
        text = json.dumps([place, source.alpha, source.crop, pillow])  # what changes the pixels of an unchanged file
        return self.folder / "hashes" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def record_of(item: Item, sha256: str) -> Record:
    _, h, w = item.image.shape
    return Record(sha256, (w, h), item.format, item.facts)


def _settled(stamp: Stamp, now: int) -> bool:
    return now - stamp[2] > SETTLED_NS


def _stamps(source: Source) -> list[Stamp] | None:
    try:
        return source.stamps()
    except OSError:
        return None


def _read_index(place: Path) -> dict[str, Any] | None:
    file = place / "index.json"
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        if not all(isinstance(index[part], dict) for part in ("shards", "sets")):
            raise ValueError("it has no shards and sets")
        return index
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"cache index {file} is damaged ({error}); starting a new one", stacklevel=2)
        return None


def _write(file: Path, data: bytes) -> None:
    """All or nothing: a reader sees the old file or the whole new one."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


# ---- for people


def ls(folder: str | os.PathLike | None = None) -> list[Entry]:
    """Every feature set, newest first, then what unfinished runs left behind."""
    entries, partial = [], []
    for place in _places(folder):
        index = _read_index(place)
        if index is None:
            continue
        used: set[str] = set()
        for key, s in index["sets"].items():
            used |= set(s["shards"])
            size = sum(_size(place / f"{shard}.npy") for shard in s["shards"])
            entries.append(Entry(key, index["extractor"], s["n"], s["dim"], size, s["created"], s["source"]))
        loose = {key: shard for key, shard in index["shards"].items() if key not in used}
        if loose:
            rows, dim = sum(s["rows"] for s in loose.values()), next(iter(loose.values()))["dim"]
            size = sum(_size(place / f"{key}.npy") for key in loose)
            partial.append(
                Entry("partial", index["extractor"], rows, dim, size, (place / "index.json").stat().st_mtime, "")
            )
    return sorted(entries, key=lambda e: -e.created) + partial


def rm(which: str | None = None, folder: str | os.PathLike | None = None) -> int:
    """Delete feature sets; bytes freed.

    which: the beginning of a key (8 digits or more), an extractor's id, "partial", or None: everything, image hashes too.
    Raises ValueError when nothing has that name.
    """
    freed, hit = 0, which is None
    for place in _places(folder):
        with FileLock(place / ".lock", timeout=LOCK_SECONDS):
            index = _read_index(place) or {"extractor": "", "shards": {}, "sets": {}}
            whole = which is None or index["extractor"] == which
            gone = {key for key in index["sets"] if whole or (which and len(which) >= 8 and key.startswith(which))}
            if not whole and not gone and which != "partial":
                continue
            hit = True
            before = {shard for s in index["sets"].values() for shard in s["shards"]}
            sets = {key: s for key, s in index["sets"].items() if key not in gone}
            kept = {shard for s in sets.values() for shard in s["shards"]}
            if not whole and which != "partial":  # shards that no set used belong to unfinished runs
                kept |= set(index["shards"]) - before
            for file in place.glob("*.npy"):
                if file.stem not in kept:
                    freed += _size(file)
                    file.unlink(missing_ok=True)
            if whole:
                (place / "index.json").unlink(missing_ok=True)
            else:
                shards = {key: shard for key, shard in index["shards"].items() if key in kept}
                _write(place / "index.json", json.dumps(index | {"shards": shards, "sets": sets}).encode())
    if which is None:
        for file in _root(folder).glob("hashes/*.json"):
            freed += _size(file)
            file.unlink(missing_ok=True)
    if not hit:
        there = ", ".join(sorted({e.extractor for e in ls(folder)})) or "nothing"
        raise ValueError(f"the cache {_root(folder)} has no {which!r}; it has sets of {there}")
    return freed


def _root(folder: str | os.PathLike | None) -> Path:
    return Path(folder).expanduser() if folder else default_folder()


def _places(folder: str | os.PathLike | None) -> list[Path]:
    return sorted(file.parent for file in _root(folder).glob("features/*/index.json"))


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
