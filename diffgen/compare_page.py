"""The page of `diffgen compare`: what was asked and measured, in pictures, plots and a table."""

from __future__ import annotations

import math
import shlex
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffgen.eval.report import MARKERS, Cell, Matrix, Section, label_points, legend_below, picture, plot
from diffgen.pipelines import Guidance

SHOWN = 16  # pictures in a cell
Value = dict[str, float | None]  # value, low, high (95%)


@dataclass(eq=False)
class Measured:
    """One rule at one scale. psnr is None for the reference rule itself, and where the images are the same.

    fitted: what the rule learned or was set to by data, or should have been: {"linear_ag": ..., "ag": ...}.
    """

    rule: str
    scale: float
    error: str = ""
    nfe: float | None = None
    seconds_per_image: float | None = None
    saturation: Value | None = None
    contrast: Value | None = None
    clipping: Value | None = None
    verified: Value | None = None
    clip: Value | None = None
    psnr: float | None = None
    ssim: float | None = None
    fitted: dict[str, Any] = field(default_factory=dict)
    images: torch.Tensor | None = None  # uint8 [N, 3, H, W]
    results: torch.Tensor | None = None  # quality of each image, float64 [N]

    def row(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("images", "results")}

    def get(self, name: str) -> Any:  # float or None
        found = getattr(self, name)
        return found["value"] if isinstance(found, dict) else found


@dataclass
class Plan:
    """What is asked for, checked: nothing that can be known beforehand fails after the first picture was made."""

    model: str
    rules: dict[str, Callable[[float], Guidance]]  # by what the user wrote
    scales: list[float]
    prompts: list[str]  # one an image
    given: list[str]  # the user's own prompts, once each
    per_prompt: int
    steps: int | None
    seed: int
    page: Path
    clip: Path | None
    negative: str | None
    batch: int

    @property
    def world(self) -> bool:
        return self.model == "shapes"

    @property
    def reference(self) -> str:
        return next(iter(self.rules))

    @property
    def quality(self) -> tuple[str, str]:
        """(attribute of Measured, its name in words) of what the plots call quality."""
        if self.world:
            return "verified", "share verified"
        if self.clip:
            return "clip", "CLIP score"
        return "psnr", f"PSNR to {self.reference}, dB"

    @property
    def json(self) -> Path:
        return self.page.with_suffix(".json")

    @property
    def options(self) -> list[tuple[str, str]]:
        """The command line's options that give this plan."""
        found = [
            ("model", self.model),
            ("rules", ",".join(self.rules)),
            ("scales", ",".join(f"{s:g}" for s in self.scales)),
        ]
        found += [("prompt", prompt) for prompt in self.given]
        found += [("images-per-prompt", str(self.per_prompt)), ("seed", str(self.seed))]
        found += [("steps", str(self.steps))] if self.steps else []
        found += [("negative-prompt", self.negative)] if self.negative is not None else []
        found += [("clip", str(self.clip))] if self.clip else []
        return [*found, ("batch", str(self.batch)), ("out", str(self.page))]

    def command(self, width: float = math.inf) -> str:
        """The command, broken between options where a line would be longer than width."""
        lines = ["diffgen compare"]
        for key, value in self.options:
            words = f"--{key} {shlex.quote(value)}"
            if len(lines[-1]) + len(words) < width:
                lines[-1] += " " + words
            else:
                lines.append("  " + words)
        return " \\\n".join(lines)


def page(todo: Plan, cells: list[Measured], numbers: dict) -> tuple[str, list[Section], str]:
    """Title, sections and lead. numbers: what compare found, as in its JSON."""
    names = list(todo.rules)
    title = f"{listed(names)} on {todo.model}" if len(names) < 5 else f"{len(names)} guidance rules on {todo.model}"
    best = numbers["ranking"] and numbers["ranking"]["best"]
    n = len(todo.prompts)
    per = f"{n} image{'s' * (n > 1)} a cell" + (f", {todo.per_prompt} a prompt" if todo.per_prompt > 1 else "")
    shown = list(dict.fromkeys(todo.prompts[:SHOWN]))
    order = "row by row" if len(shown) == min(SHOWN, n) else "row by row, again and again"
    grid = Section(
        "Every rule at every scale",
        f"{per}; image i has the same prompt and the same seed in every cell. Point at a cell, or press Tab, for its numbers.",
        matrix=Matrix(
            [f"scale {scale:g}" for scale in todo.scales],
            [(name, [_cell(c, [c.rule, c.scale] == best, todo) for c in cells if c.rule == name]) for name in names],
        ),
        note=f"Prompts of the pictures, {order}: {'; '.join(shown)}.",
    )
    sections = [Section("", commands=todo.command(100)), *(Section("", note=line) for line in numbers["fitted"]), grid]
    if plots := _plots(todo, cells, numbers):
        sections.append(plots)
    sections.append(_table(todo, cells, numbers))
    return title, sections, numbers["finding"]


def listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


FORMATS: dict[str, tuple[str, Callable[[float], str]]] = {
    "nfe": ("Evaluations (NFE)", lambda v: f"{v:.4g}"),
    "seconds_per_image": ("Time an image", lambda v: f"{v:.2f} s" if v >= 1 else f"{1000 * v:.0f} ms"),
    "verified": ("Verified", lambda v: f"{v:.1%}"),
    "clip": ("CLIP score", lambda v: f"{v:.2f}"),
    "saturation": ("Saturation", lambda v: f"{v:.3f}"),
    "contrast": ("Contrast", lambda v: f"{v:.3f}"),
    "clipping": ("Clipped values", lambda v: f"{v:.1%}"),
    "psnr": ("PSNR", lambda v: f"{v:.1f} dB"),
    "ssim": ("SSIM", lambda v: f"{v:.3f}"),
}


def text(cell: Measured, name: str, interval: bool = True) -> str:
    value, (_, form) = cell.get(name), FORMATS[name]
    if value is None:
        return "same images" if name == "psnr" and cell.ssim is not None else "–"
    full = getattr(cell, name)
    if interval and name in ("verified", "clip") and isinstance(full, dict) and full["low"] is not None:
        return f"{form(value)} [{form(full['low'])}, {form(full['high'])}]"
    return form(value)


def _columns(cells: list[Measured]) -> list[str]:
    """Measures that some cell has."""
    return [name for name in FORMATS if any(cell.get(name) is not None for cell in cells)]


def _cell(cell: Measured, best: bool, todo: Plan) -> Cell:
    if cell.error:
        return Cell(error=cell.error, details=[("Error", cell.error.split(":")[0])])
    assert cell.images is not None
    key, _ = todo.quality
    unit = {"verified": " verified", "clip": " CLIP", "psnr": f" to {todo.reference}"}[key]
    first = "reference" if cell.get(key) is None and cell.ssim is None else text(cell, key, False) + unit
    lines = [first, f"{text(cell, 'nfe')} NFE · {text(cell, 'seconds_per_image')}"]
    lines.append(f"sat. {text(cell, 'saturation')} · clip. {text(cell, 'clipping')}")
    details = [(FORMATS[name][0], text(cell, name)) for name in _columns([cell])]
    if cell.rule == todo.reference:
        details.append(("PSNR, SSIM", "is the reference"))
    pictures = [picture(_thumbnail(i), p) for i, p in zip(cell.images[:SHOWN], todo.prompts)]
    return Cell(pictures, lines, details, best=best)


def _thumbnail(image: torch.Tensor):
    """uint8 [3, H, W] -> PIL image of at most 256 pixels; the browser enlarges small ones without smoothing."""
    from PIL import Image

    shown = Image.fromarray(image.permute(1, 2, 0).numpy())
    if max(shown.size) > 256:
        shown.thumbnail((256, 256), Image.Resampling.LANCZOS)
    return shown


def _plots(todo: Plan, cells: list[Measured], numbers: dict) -> Section | None:
    key, words = todo.quality
    able = [cell for cell in cells if cell.get(key) is not None]
    if not able:
        return None
    names = list(todo.rules)
    wide = len(names) > 4
    size = (9.4, 5.0) if wide else (4.6, 4.2)

    ranked = len(todo.prompts) > 1

    def draw(x: str, label: str) -> Callable:
        def on(axes) -> None:
            shift = _dodge(able) if x == "nfe" else [0.0] * len(able)
            at = {c: ((c.get(x) or 0) + moved, c.get(key) or 0) for c, moved in zip(able, shift)}
            points, texts, colors = [], [], []
            for k, name in enumerate(names):
                mine = [c for c in able if c.rule == name]
                if not mine:
                    continue
                xy = [at[c] for c in mine]
                axes.plot(*zip(*xy), MARKERS[k % len(MARKERS)] + "-", color=f"C{k}", ms=6, lw=1.4, label=name, zorder=3)
                for c in mine:
                    full: Any = getattr(c, key)
                    low, high = (full["low"], full["high"]) if isinstance(full, dict) else (None, None)
                    if low is not None and high is not None:
                        reach = [[max(0.0, at[c][1] - low)], [max(0.0, high - at[c][1])]]
                        axes.errorbar(*at[c], reach, fmt="none", ecolor=f"C{k}", elinewidth=1, alpha=0.4, zorder=1)
                best = [at[c] for c in mine if [c.rule, c.scale] in numbers["pareto"][x]]
                if best:
                    axes.plot(*zip(*best), "o", ms=12, mfc="none", mec=f"C{k}", mew=1.5, zorder=2)
                for point in dict.fromkeys(xy):  # scales that fall on one point share its label
                    points.append(point)
                    texts.append(", ".join(f"{c.scale:g}" for c in mine if at[c] == point))
                    colors.append(f"C{k}")
            ink = axes.xaxis.label.get_color()
            if ranked:
                axes.plot([], [], "o", ms=11, mfc="none", mec=ink, mew=1.5, label="Pareto front")
            if x == "saturation" and numbers["data_saturation"] is not None:
                axes.axvline(numbers["data_saturation"], ls=(0, (4, 3)), lw=1.2, color=ink, label="data", zorder=1)
            axes.margins(0.13, 0.12)
            axes.locator_params(axis="x", nbins=10 if wide else 6)
            if x == "nfe":  # equal costs look equal
                low, high = axes.get_xlim()
                short = max(0.0, _span(able) - (high - low))
                axes.set_xlim(low - short / 2, high + short / 2)
            if key == "verified":
                axes.yaxis.set_major_formatter("{x:.0%}")
            axes.set(xlabel=label, ylabel=words)
            legend_below(axes)
            label_points(axes, points, texts, colors)

        return on

    noun, better, well = ("Quality", "does better", "as well")
    if key == "psnr":
        noun, better, well = ("Similarity", f"is closer to {names[0]}", "as close")
    explained = ["Numbers at the points are scales."]
    costs, near = [], []
    if any(_dodge(able)):
        costs.append("Settings of equal cost are set side by side.")
    if ranked:
        explained.append("A ring marks the Pareto front: no other setting measured better in both directions.")
        costs.insert(0, f"Ringed: no other setting {better} at as few evaluations, or {well} at fewer.")
        where = (
            ("as close to the data (dashed)", "closer")
            if numbers["data_saturation"] is not None
            else ("at as little", "at less")
        )
        near = [f"Ringed: no other setting {better} {where[0]}, or {well} {where[1]}."]
        if key != "psnr":
            explained.append("Thin lines are 95% intervals; where they overlap, a ring may be chance.")
    return Section(
        f"{noun} against cost, {noun.lower()} against saturation",
        " ".join(explained),
        figures=[
            plot(draw("nfe", "denoiser evaluations an image (NFE)"), " ".join(costs), size),
            plot(draw("saturation", "mean saturation"), " ".join(near), size),
        ],
    )


def _span(cells: list[Measured]) -> float:
    """Width of the cost axis: at least 40% of the cost."""
    costs = [c.nfe or 0.0 for c in cells]
    return max(1.26 * (max(costs) - min(costs)), 0.4 * max(costs)) or 1.0


def _dodge(cells: list[Measured]) -> list[float]:
    """Shift in x of each point: those of equal cost would hide each other, and each other's intervals."""
    shared: dict[float, list[int]] = defaultdict(list)
    for i, cell in enumerate(cells):
        shared[cell.nfe or 0.0].append(i)
    shift = [0.0] * len(cells)
    for group in shared.values():
        step = min(0.045, 0.45 / len(group)) * _span(cells)
        for place, i in enumerate(group):
            shift[i] = (place - (len(group) - 1) / 2) * step
    return shift


def _table(todo: Plan, cells: list[Measured], numbers: dict) -> Section:
    columns = _columns(cells)
    rows = [["rule", "scale", *(FORMATS[name][0] + " (noisy)" * (name == "seconds_per_image") for name in columns)]]
    for cell in cells:
        values = [text(cell, name) for name in columns]
        rows.append([cell.rule, f"{cell.scale:g}", *(["failed"] + ["–"] * (len(values) - 1) if cell.error else values)])
    first = todo.reference
    truth = numbers["data_saturation"]
    note = "Saturation: mean HSV saturation"
    note += f" (ground-truth renders of these prompts: {truth:.3f}). " if truth is not None else ". "
    note += "Times are noisy: they depend on what else the machine did. "
    note += "Contrast: standard deviation of luma. Clipped values: share of channel values at 0 or 255. "
    if todo.world:
        note += "Verified: share of images that the exact verifier of the world accepts, with the 95% Wilson interval. "
    if todo.clip:
        note += f"CLIP score: 100 times the cosine of image and prompt, by {todo.clip}, with 95% intervals. "
    if numbers["ranking"]:
        test = "McNemar's exact test" if todo.world else "a paired t-test"
        note += f"Told apart: by {test} on images of the same prompt and seed, at 5%. "
    if len(todo.rules) > 1:
        note += f"PSNR and SSIM compare with the images of {first} at the same scale; equal ones count as 60 dB. "
    return Section("All numbers", table=rows, note=note + f"The same numbers, with intervals, are in {todo.json.name}.")
