"""Where prompts come from: an embedded world, or a file."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import torch

from diffgen.seeding import generator, seed_of
from diffgen.worlds import WORLDS, world


class DataError(ValueError):
    """A prompt file that can't be used."""


class Prompts:
    """Rows {"prompt": ..., other columns}. `draw` is endless and a function of (seed, update) alone."""

    def __init__(self, source: str, field: str = "data.prompts"):
        self.source = source
        name, _, split = source.partition(":")
        self.world = world(name).load() if name in WORLDS else None
        self.split = split or "train"
        self.rows = [] if self.world else _read(Path(source), field)
        if self.world:
            try:
                self.world.prompts(1, 0, self.split)
            except ValueError as error:
                raise DataError(f"{field}: {error}") from None

    def draw(self, n: int, seed: int, update: int) -> list[dict]:
        """n rows for an update. A file is passed through epoch by epoch, each in its own order."""
        if self.world:
            return [{"prompt": p} for p in self.world.prompts(n, seed_of(seed, "prompts", update), self.split)]
        rows = []
        for position in range(update * n, (update + 1) * n):
            epoch, index = divmod(position, len(self.rows))
            order = torch.randperm(len(self.rows), generator=generator(seed, "epoch", epoch))
            rows.append(self.rows[order[index]])
        return rows

    def first(self, n: int) -> list[dict]:
        """The n rows of evaluation, always the same."""
        if self.world:
            return [{"prompt": p} for p in self.world.prompts(n, 12345, self.split)]
        return [self.rows[i % len(self.rows)] for i in range(n)]


def columns(rows: list[dict]) -> dict[str, list]:
    """The columns other than prompt."""
    return {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}


RESERVED = ("samples", "prompts")  # arguments of every reward


def _read(path: Path, field: str) -> list[dict]:
    if not path.is_file():
        raise DataError(f"{field}: {str(path)!r} is neither 'WORLD:SPLIT' (worlds: {', '.join(WORLDS)}) nor a file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None
    if path.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, line {number}: not valid JSON: {error}") from None
    elif path.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    elif path.suffix == ".txt":
        rows = [{"prompt": line.strip()} for line in text.split("\n") if line.strip()]
    else:
        raise DataError(f"{path}: expected a .txt, .jsonl or .csv file")
    if not rows:
        raise DataError(f"{path} holds no prompts")
    keys = set(rows[0]) if isinstance(rows[0], dict) else set()
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            have = sorted(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise DataError(f"{path}, row {number}: expected a column 'prompt' with text, found {have}")
        if path.suffix == ".csv" and (None in row or None in row.values()):
            raise DataError(
                f"{path}, row {number}: expected {len(keys)} cells ({', '.join(map(str, rows[0]))}), found {row}"
            )
        if set(row) != keys:
            raise DataError(f"{path}, row {number}: columns {sorted(row)} differ from the first row's {sorted(keys)}")
    if reserved := keys.intersection(RESERVED):
        raise DataError(
            f"{path}: a column can't be named {', '.join(sorted(reserved))}, as every reward has that argument"
        )
    return rows
