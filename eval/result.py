"""What an evaluation found, as a table, Markdown, JSON or an HTML page."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diffgen.eval.metrics_table import Floor
from diffgen.eval.passes import ImageSet
from diffgen.files import check_writable, write_text

PACKAGES = ("diffgen", "torch", "timm", "numpy", "pillow")
ARROWS = {True: "↑", False: "↓", None: ""}


@dataclass(frozen=True)
class Score:
    """One metric's value with its 95% interval and what it depends on."""

    value: float
    low: float | None
    high: float | None
    # "bootstrap" and "half-sampling": value +- 1.96 sd of resampled values; "standard error": of a mean over images, or
    # prompts; "wilson"
    interval: str | None
    higher_is_better: bool | None
    n: int
    m: int | None = (
        None  # reference (or training) images, where the metric uses them; None also when a file doesn't say
    )
    extractor: str | None = None
    floor: Floor | None = None
    excess: Floor | None = None  # value - floor, at either end of the bracket
    distinguishable: bool | None = None  # from the reference; None: this metric can't tell
    baseline: float | None = None  # memorisation metrics: the test set's value, the one to compare with


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` found: `value(name)`, `table()`, `to_json(path)`, `to_markdown(path)`, `to_html(path)`, and `scores`.

    skipped: {metric: why it was left out}, with metrics="all". warnings: what makes numbers doubtful; notes: other facts.
    sources: {"generated": {kind, n, counts, sizes, formats, skipped files, duplicates, cached}, ...}
    """

    scores: dict[str, Score]
    seed: int
    ci_samples: int
    warnings: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    sets: dict[str, ImageSet] = field(default_factory=dict, repr=False, compare=False)  # for to_html
    judged: dict[str, bool | None] = field(default_factory=dict, repr=False)  # scorers: is higher better

    def value(self, metric: str) -> float:
        if metric not in self.scores:
            raise KeyError(f"{metric!r} was not evaluated; there are {', '.join(self.scores)}")
        return self.scores[metric].value

    def rows(self) -> list[list[str]]:
        """The table with its header. Columns that would be empty are left out."""
        scores = self.scores.values()
        excess, baseline = any(s.excess for s in scores), any(s.baseline is not None for s in scores)
        header = ["metric", "", "value", "95% interval", "noise floor"]
        header += ["excess"] * excess + ["test set"] * baseline + ["n", "m", "features"]
        rows = [header]
        for name, s in self.scores.items():
            row = [name, ARROWS[s.higher_is_better], f"{s.value:.4g}", interval_text(s), bracket_text(s.floor)]
            row += [bracket_text(s.excess, "<")] * excess
            row += ["" if s.baseline is None else f"{s.baseline:.4g}"] * baseline
            rows.append([*row, str(s.n), "" if s.m is None else str(s.m), s.extractor or ""])
        return rows

    def remarks(self) -> list[str]:
        return [
            *(f"warning: {text}" for text in self.warnings),
            *(f"note: {text}" for text in self.notes),
            *(f"skipped: {name}: {why}" for name, why in self.skipped.items()),
        ]

    def table(self) -> str:
        return text_table(self.rows(), self.remarks())

    def to_markdown(self, path: str | Path | None = None) -> str:
        return kept(markdown(self.rows(), self.remarks()), path)

    def to_json(self, path: str | Path | None = None) -> str:
        report: dict[str, Any] = {"metrics": {name: asdict(score) for name, score in self.scores.items()}}
        report |= {"seed": self.seed, "ci_samples": self.ci_samples, "warnings": self.warnings, "notes": self.notes}
        return kept(json_text(report | {"skipped": self.skipped, "sources": self.sources}), path)

    def to_html(self, path: str | Path) -> Path:
        """One file that needs no other: table, warnings, samples, best and worst, nearest training images, features."""
        from diffgen.eval.page import result_page

        return result_page(self, path)


def kept(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_text(path, text + "\n")
    return text


def json_text(report: dict[str, Any]) -> str:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return json.dumps({"schema_version": 1, **report, "versions": versions}, indent=2, allow_nan=False)


def outputs(out: str | Path | None) -> list[Path]:
    """The files that `out` names: itself, or report.html, .json and .md in a folder. OSError where one can't be written."""
    if out is None:
        return []
    out = Path(out)
    one = out.suffix in (".html", ".json", ".md")
    return [check_writable(p, "out") for p in ([out] if one else [out / f"report.{s}" for s in ("html", "json", "md")])]


def write(result: Any, paths: list[Path]) -> None:
    for path in paths:
        {".html": result.to_html, ".json": result.to_json, ".md": result.to_markdown}[path.suffix](path)


def interval_text(score: Any) -> str:
    if score.low is None or score.high is None:
        return ""
    if score.interval == "wilson":
        return f"[{score.low:.4g}, {score.high:.4g}]"
    return f"± {(score.high - score.low) / 2:.2g}"


def bracket_text(bracket: Floor | None, side: str = ">") -> str:
    """[low, high] of a floor or an excess; where there is no split, one end: the floor is higher (>), the excess lower (<)."""
    if bracket is None or bracket["plug_in"] is None:
        return ""
    plug_in, split = bracket["plug_in"], bracket["split"]
    if split is None:
        return f"{side} {plug_in:.4g}"
    return f"[{min(plug_in, split):.4g}, {max(plug_in, split):.4g}]"


def text_table(rows: list[list[str]], remarks: Sequence[str]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for column in rows[0]:
        right = column not in ("metric", "", "features", "verdict")
        table.add_column(column, justify="right" if right else "left", no_wrap=column not in ("metric", ""))
    for row in rows[1:]:
        table.add_row(*row)
    output = io.StringIO()
    console = Console(file=output, width=170, color_system=None)
    console.print(table, *remarks, sep="\n", markup=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in output.getvalue().strip("\n").splitlines())


def markdown(rows: list[list[str]], remarks: Sequence[str]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    table = [line(rows[0]), line(["---"] * len(rows[0])), *map(line, rows[1:])]
    return "\n".join([*table, *([""] if remarks else []), *(f"- {text}" for text in remarks)])
