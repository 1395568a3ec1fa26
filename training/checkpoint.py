"""Checkpoints that survive a kill at any moment: temporary folder, hashes, a commit file, rename. No pickles."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

COMMIT = "COMMIT.json"


class CheckpointError(RuntimeError):
    """A checkpoint that can't be read, with what is wrong in it."""


def save(folder: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict, keep: int) -> Path:
    """Writes folder/step-N holding NAME.safetensors of each entry of `tensors` and state.json; then drops old ones.

    Readers see either the whole checkpoint or none: everything is written and fsynced under a temporary name, the commit
    file (sizes and sha256) last, then one rename. Raises OSError (disk full, read-only) and leaves nothing behind.
    """
    final, temporary = folder / f"step-{step:06d}", folder / f"step-{step:06d}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that died; in a container its id comes back
    try:
        temporary.mkdir(parents=True)
        for name, values in tensors.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in values.items()}, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps(state))
        written = sorted(temporary.iterdir())
        hashes = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in written}
        for file in written:
            _fsync(file)
        (temporary / COMMIT).write_text(json.dumps({"step": step, "files": hashes}, indent=1))
        _fsync(temporary / COMMIT)
        _fsync(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _fsync(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):  # a full disk, which it doesn't report as an OSError
            raise OSError(str(error)) from error
        raise
    for old in _committed(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for leftover in folder.glob("step-*.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return final


def step_of(path: Path) -> int:
    """N of a folder step-N. Raises CheckpointError for any other."""
    try:
        return int(path.name.removeprefix("step-"))
    except ValueError:
        raise CheckpointError(f"{path} is no checkpoint; expected a folder named step-NUMBER") from None


def set_aside_after(folder: Path, step: int) -> None:
    """Renames checkpoints later than `step` to abandoned-*: a run goes on from an older one, on another branch."""
    for path in _committed(folder):
        if step_of(path) > step:
            aside = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)


def newest(folder: Path) -> Path | None:
    """The newest intact checkpoint in folder; None where there is none at all.

    Damaged ones are passed over with a warning; where all are, CheckpointError: starting anew would lose the run.
    """
    found = _committed(folder)
    for path in reversed(found):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            warnings.warn(f"{error}; trying the one before", stacklevel=2)
    if found:
        raise CheckpointError(f"every checkpoint in {folder} is damaged; move the folder away to start anew")
    return None


def verify(path: Path) -> None:
    """Raises CheckpointError unless every file of the commit is there with its size and hash."""
    try:
        files = json.loads((path / COMMIT).read_text())["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no committed checkpoint: {type(error).__name__}: {error}") from None
    for name, (size, sha256) in expected.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size or _sha256(file) != sha256:
            raise CheckpointError(f"{file} is missing, cut short or altered")


def load(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """(tensors by file, state) of a committed checkpoint."""
    verify(path)
    files = json.loads((path / COMMIT).read_text())["files"]
    tensors = {Path(f).stem: load_file(path / f) for f in files if f.endswith(".safetensors")}
    return tensors, json.loads((path / "state.json").read_text())


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict]:
    """Optimizer state as tensors named INDEX.KEY, and the rest as JSON."""
    state = optimizer.state_dict()
    tensors, rest = {}, {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                rest[f"{index}.{key}"] = value
    return tensors, {"rest": rest, "param_groups": state["param_groups"]}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], extra: dict) -> None:
    state: dict[int, dict] = {}
    for name, value in {**tensors, **extra["rest"]}.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": extra["param_groups"]})


def _committed(folder: Path) -> list[Path]:
    found = [(int(m[1]), p) for p in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
