"""`diffgen compare`: every guidance rule at every scale from the same seeds, measured, on one HTML page."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import re
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffgen.eval import evaluate
from diffgen.eval.report import MARKERS, Cell, Matrix, Section, label_points, picture, plot, write_report, write_text
from diffgen.loading import load
from diffgen.pipelines import Guidance, draw, specs
from diffgen.worlds import WORLDS, shapes

SHOWN = 16  # pictures in a cell
STATISTICS = ("saturation", "contrast", "clipping")
Value = dict[str, float | None]  # value, low, high (95%)


@dataclass
class Measured:
    """One rule at one scale. psnr is None for the reference rule itself, and where the images are the same."""

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
    images: torch.Tensor | None = None  # uint8 [N, 3, H, W]

    def row(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "images"}


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


def plan(
    model: str = "shapes",
    rules: str = "cfg,apg",
    scales: str = "2,4,8,16",
    prompts: list[str] | None = None,
    images_per_prompt: int = 1,
    steps: int | None = None,
    seed: int = 0,
    out: Path | str = "comparison",
    clip: Path | str | None = None,
    negative_prompt: str | None = None,
    batch: int | None = None,
) -> Plan:
    """The arguments of `compare`, checked. Raises ValueError or OSError."""
    for name, value in (("images-per-prompt", images_per_prompt), ("steps", steps), ("batch", batch)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    strengths = [_scale(text) for text in _list(scales, "scales", "2,4,8")]
    builders = {text: _builder(text, strengths) for text in _list(rules, "rules", "cfg,apg")}
    given = list(prompts or [])
    if any(not prompt.strip() for prompt in given):
        raise ValueError("prompts must not be empty")
    if model == "shapes":
        for prompt in given:
            shapes.parse(prompt)  # the verifier has to understand it
    elif not given:
        raise ValueError(f"model {model!r} needs --prompt TEXT: only the world 'shapes' has prompts of its own")
    once = given or shapes.prompts(64, seed=1, split="all")
    page = _page(Path(out))
    folder = Path(clip) if clip is not None else None
    if folder is not None and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"--clip {folder}: expected a folder with a CLIP model (config.json, weights, tokenizer)"
        )
    return Plan(
        model=model,
        rules=builders,
        scales=strengths,
        prompts=once * images_per_prompt,
        given=given,
        per_prompt=images_per_prompt,
        steps=steps,
        seed=seed,
        page=page,
        clip=folder,
        negative=negative_prompt,
        batch=batch or (64 if model in WORLDS else 4),
    )


def compare(todo: Plan, *, device=None, dtype=None, quiet: bool = False) -> dict[str, Any]:
    """Samples, measures, writes the page and compare.json beside it; returns what is in the latter."""
    pipe = load(todo.model, device=device, dtype=dtype)
    if todo.negative is not None and "negative_prompt" not in inspect.signature(pipe.__call__).parameters:
        raise ValueError(f"{type(pipe).__name__} takes no negative prompt")
    clip_score = _clip_scorer(todo.clip) if todo.clip else None
    with contextlib.suppress(Exception), torch.no_grad():  # the first call of a process is slow for reasons of its own
        pipe(todo.prompts[:1], num_inference_steps=2, output_type="latent")
    cells: list[Measured] = []
    reference: dict[float, torch.Tensor] = {}
    with tqdm(total=len(todo.rules) * len(todo.scales) * len(todo.prompts), unit="image", disable=quiet) as bar:
        for r, (name, build) in enumerate(todo.rules.items()):
            for s, scale in enumerate(todo.scales):
                bar.set_description(f"{name} at {scale:g}")
                cell = Measured(name, scale)
                cells.append(cell)
                try:
                    _sample(pipe, build(scale), todo, cell, bar.update)
                    _measure(cell, todo, clip_score, reference.get(scale))
                except Exception as error:  # whatever a rule or a pipeline raises belongs to this cell alone
                    cell.error = f"{type(error).__name__}: {error}"
                if r == 0 and cell.images is not None and not cell.error:
                    reference[scale] = cell.images
                bar.n = (r * len(todo.scales) + s + 1) * len(todo.prompts)
                bar.refresh()
    if all(cell.error for cell in cells):
        raise RuntimeError(f"no rule could run on {todo.model!r}; the first error: {cells[0].error}")
    numbers = _numbers(todo, cells, type(pipe).__name__)
    text = json.dumps(numbers, indent=1, allow_nan=False)
    write_report(todo.page, *_page_of(todo, cells, numbers))
    write_text(todo.page.with_name("compare.json"), text + "\n")
    return numbers


# ------------------------------------------------------------------------------------------ checking what was asked for


def _list(text: str, name: str, example: str) -> list[str]:
    """Comma-separated words; commas inside [...] belong to a word."""
    words = [word.strip() for word in re.split(r",(?![^\[]*\])", text)]
    if not any(words):
        raise ValueError(f"--{name} is empty: expected a list such as {example}")
    for i, word in enumerate(words):
        if not word:
            raise ValueError(f"--{name} {text!r}: item {i + 1} is empty")
        if word in words[:i]:
            raise ValueError(f"--{name} {text!r} names {word!r} twice")
    return words


def _scale(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        raise ValueError(f"--scales: {text!r} is not a number") from None
    if not 1 < scale < math.inf:
        raise ValueError(f"--scales: {text} must be a finite number above 1 (at 1 there is no guidance to compare)")
    return scale


def _builder(text: str, scales: list[float]) -> Callable[[float], Guidance]:
    """Scale -> the rule; built once for every scale here, so that what it refuses is known before sampling."""
    spec, options = specs.parse(text)
    if "scale" in options:
        raise ValueError(f"--rules {text!r}: scales are given by --scales, for all rules")

    def build(scale: float) -> Guidance:
        return specs.rule(spec, options).with_scale(scale)

    for scale in scales:
        build(scale)
    return build


def _page(out: Path) -> Path:
    """The HTML file that `out` (a file or a folder) means. Raises OSError where it can't be written."""
    page = out if out.suffix.lower() in (".html", ".htm") else out / "compare.html"
    if page.is_dir():
        raise IsADirectoryError(f"--out {page} is a folder")
    there = next(folder for folder in page.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise type(error)(f"--out {out}: can't write in {there}: {error.strerror}") from None
    return page


# --------------------------------------------------------------------------------------------- sampling and measuring


def _sample(pipe, rule: Guidance, todo: Plan, cell: Measured, tick: Callable[[int], Any]) -> None:
    """Fills in images, nfe and seconds_per_image. Image i has its own seed, the same in every cell."""
    extra: dict[str, Any] = {"num_inference_steps": todo.steps} if todo.steps else {}
    steps = todo.steps or inspect.signature(pipe.__call__).parameters["num_inference_steps"].default
    extra |= {"negative_prompt": todo.negative} if todo.negative is not None else {}
    others = shapes.prompts(64, seed=2, split="all") if todo.world else list(dict.fromkeys(todo.prompts))[:64]
    rule = specs.fit(rule, pipe, others, steps)
    drawn = draw(pipe, rule, todo.prompts, todo.seed, batch_size=todo.batch, tick=tick, **extra)
    cell.images, cell.nfe, cell.seconds_per_image = drawn.images, drawn.nfe, drawn.seconds


def _measure(cell: Measured, todo: Plan, clip_score, reference: torch.Tensor | None) -> None:
    assert cell.images is not None
    verifier = shapes.verify if todo.world else None
    result = evaluate(cell.images, prompts=todo.prompts, metrics=STATISTICS, verifier=verifier, ci_samples=0)
    for name, score in result.scores.items():
        value = {"value": score.value, "low": score.low, "high": score.high}
        setattr(cell, "verified" if name == "verifier" else name, value)
    if clip_score:
        cell.clip = _mean(clip_score(cell.images, todo.prompts))
    if reference is not None:
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

        pair = (cell.images.double() / 255, reference.double() / 255)
        psnr = float(peak_signal_noise_ratio(*pair, data_range=1.0))
        cell.psnr = psnr if math.isfinite(psnr) else None
        ssim: Any = structural_similarity_index_measure(*pair, data_range=1.0)
        cell.ssim = float(ssim)


def _mean(values: torch.Tensor) -> Value:
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return {"value": mean, "low": None, "high": None}
    margin = 1.96 * float(values.std()) / math.sqrt(n)
    return {"value": mean, "low": mean - margin, "high": mean + margin}


def _clip_scorer(folder: Path) -> Callable[[torch.Tensor, list[str]], torch.Tensor]:
    """(images, prompts) -> 100 max(cos, 0) of each image and its prompt, [N]; from local files only."""
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged file raises whatever its reader does
        raise ValueError(f"--clip {folder} could not be loaded: {type(error).__name__}: {error}") from error
    limit = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def score(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        found = []
        for first in range(0, len(images), 32):
            texts = prompts[first : first + 32]
            inputs = processor(
                text=texts, images=list(images[first : first + 32]), return_tensors="pt", padding=True,
                truncation=True, max_length=limit,
            )  # fmt: skip
            out = model(**inputs)
            found.append(torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds))
        return 100 * torch.cat(found).double().clamp(min=0)

    return score


# ---------------------------------------------------------------------------------------------------------- the numbers


def _quality(todo: Plan) -> tuple[str, str]:
    """(attribute of Measured, its name in words) of what the plots call quality."""
    if todo.world:
        return "verified", "share verified"
    if todo.clip:
        return "clip", "CLIP score"
    return "psnr", f"PSNR to {next(iter(todo.rules))}, dB"


def _value(cell: Measured, name: str) -> Any:  # float or None
    found = getattr(cell, name)
    return found["value"] if isinstance(found, dict) else found


def front(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, quality) that no other one beats: none is at most as costly and at least as good."""

    def beats(a, b):
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    return [i for i, p in enumerate(points) if not any(beats(q, p) for q in points)]


def _data_saturation(todo: Plan) -> float | None:
    """Mean saturation of ground-truth renders of the same prompts, 8 each."""
    if not todo.world:
        return None
    import numpy as np

    from diffgen.eval import functional

    rng, scenes = np.random.default_rng(0), [shapes.parse(p) for p in dict.fromkeys(todo.prompts) for _ in range(8)]
    truth = torch.from_numpy(np.stack([shapes.render(scene, rng) for scene in scenes]))
    return float(functional.saturation(truth).mean())


def _numbers(todo: Plan, cells: list[Measured], pipeline: str) -> dict[str, Any]:
    key, words = _quality(todo)
    truth = _data_saturation(todo)
    shown = [i for i, cell in enumerate(cells) if _value(cell, key) is not None]
    quality = [_value(cells[i], key) for i in shown]
    saturation = [_value(cells[i], "saturation") for i in shown]
    costs = {"nfe": [cells[i].nfe for i in shown], "saturation": [abs(v - (truth or 0.0)) for v in saturation]}
    return {
        "schema_version": 1,
        "command": todo.command(),
        "model": todo.model,
        "pipeline": pipeline,
        "reference": next(iter(todo.rules)),
        "scales": todo.scales,
        "prompts": list(dict.fromkeys(todo.prompts)),
        "negative_prompt": todo.negative,
        "images_per_prompt": todo.per_prompt,
        "images": len(todo.prompts),
        "steps": todo.steps,
        "seed": todo.seed,
        "finding": _lead(todo, cells, _best(todo, cells)),
        "quality": {"measure": key, "name": words},
        "data_saturation": truth,
        "pareto": {
            name: [[cells[shown[k]].rule, cells[shown[k]].scale] for k in front(list(zip(cost, quality)))]
            for name, cost in costs.items()
        },
        "cells": [cell.row() for cell in cells],
        "versions": {package: version(package) for package in ("diffgen", "diffusers", "torch")},
    }


# ------------------------------------------------------------------------------------------------------------- the page


def _page_of(todo: Plan, cells: list[Measured], numbers: dict) -> tuple[str, list[Section], str]:
    names = list(todo.rules)
    title = f"{_and(names)} on {todo.model}" if len(names) < 5 else f"{len(names)} guidance rules on {todo.model}"
    best = _best(todo, cells)
    n = len(todo.prompts)
    per = f"{n} images a cell" + (f", {todo.per_prompt} a prompt" if todo.per_prompt > 1 else "")
    shown = list(dict.fromkeys(todo.prompts[:SHOWN]))
    order = "row by row" if len(shown) == min(SHOWN, n) else "row by row, again and again"
    grid = Section(
        "Every rule at every scale",
        f"{per}; image i has the same prompt and the same seed in every cell. Point at a cell, or press Tab, for its numbers.",
        matrix=Matrix(
            [f"scale {scale:g}" for scale in todo.scales],
            [(name, [_cell(c, c is best, todo) for c in cells if c.rule == name]) for name in names],
        ),
        note=f"Prompts of the pictures, {order}: {'; '.join(shown)}.",
    )
    sections = [Section("", commands=todo.command(100)), grid]
    if plots := _plots(todo, cells, numbers):
        sections.append(plots)
    sections.append(_table(todo, cells, numbers))
    return title, sections, numbers["finding"]


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _best(todo: Plan, cells: list[Measured]) -> Measured | None:
    """The cell of highest quality, by a measure that looks at the prompt; of equals the cheapest."""
    key, _ = _quality(todo)
    able = [cell for cell in cells if key != "psnr" and _value(cell, key) is not None]
    return max(able, key=lambda cell: (_value(cell, key), -(cell.nfe or 0)), default=None)


def _lead(todo: Plan, cells: list[Measured], best: Measured | None) -> str:
    failed = sum(bool(cell.error) for cell in cells)
    tail = f" {failed} of {len(cells)} cells failed; they say why." if failed else ""
    if best is None:
        first = next(iter(todo.rules))
        return f"{len(cells)} settings from the same seeds; images are compared with those of {first}.{tail}"
    key, words = _quality(todo)
    score = getattr(best, key)
    others = [cell for cell in cells if _value(cell, key) is not None and cell is not best]
    within = sum(_value(cell, key) >= (math.inf if score["low"] is None else score["low"]) for cell in others)
    doubt = f" {within} of the other {len(others)} settings lie within that interval." if within else ""
    return (
        f"Highest {words}: {best.rule} at scale {best.scale:g}, with {_text(best, key)} at {best.nfe:g} denoiser "
        f"evaluations an image.{doubt}{tail}"
    )


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


def _text(cell: Measured, name: str, interval: bool = True) -> str:
    value, (_, form) = _value(cell, name), FORMATS[name]
    if value is None:
        return "same images" if name == "psnr" and cell.ssim is not None else "–"
    full = getattr(cell, name)
    if interval and name in ("verified", "clip") and isinstance(full, dict) and full["low"] is not None:
        return f"{form(value)} [{form(full['low'])}, {form(full['high'])}]"
    return form(value)


def _columns(cells: list[Measured]) -> list[str]:
    """Measures that some cell has."""
    return [name for name in FORMATS if any(_value(cell, name) is not None for cell in cells)]


def _cell(cell: Measured, best: bool, todo: Plan) -> Cell:
    if cell.error:
        return Cell(error=cell.error, details=[("Error", cell.error.split(":")[0])])
    assert cell.images is not None
    key, _ = _quality(todo)
    unit = {"verified": " verified", "clip": " CLIP", "psnr": f" to {next(iter(todo.rules))}"}[key]
    first = "reference" if _value(cell, key) is None and cell.ssim is None else _text(cell, key, False) + unit
    lines = [first, f"{_text(cell, 'nfe')} NFE · {_text(cell, 'seconds_per_image')}"]
    lines.append(f"sat. {_text(cell, 'saturation')} · clip. {_text(cell, 'clipping')}")
    details = [(FORMATS[name][0], _text(cell, name)) for name in _columns([cell])]
    if cell.rule == next(iter(todo.rules)):
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
    key, words = _quality(todo)
    able = [cell for cell in cells if _value(cell, key) is not None]
    if not able:
        return None
    names = list(todo.rules)
    wide = len(names) > 4
    size = (9.4, 5.0) if wide else (4.6, 4.2)

    def draw(x: str, label: str) -> Callable:
        def on(axes) -> None:
            drawn = [name for name in names if any(c.rule == name for c in able)]
            dodge = _dodge(able, drawn) if x == "nfe" else dict.fromkeys(drawn, 0.0)
            points, texts, colors = [], [], []
            ringed = [tuple(pair) for pair in numbers["pareto"][x]]
            for name in drawn:
                mine = [c for c in able if c.rule == name]
                xy = [((_value(c, x) or 0) + dodge[name], _value(c, key) or 0) for c in mine]
                k = names.index(name)
                axes.plot(*zip(*xy), MARKERS[k % len(MARKERS)] + "-", color=f"C{k}", ms=6, lw=1.4, label=name, zorder=3)
                best = [p for c, p in zip(mine, xy) if (c.rule, c.scale) in ringed]
                if best:
                    axes.plot(*zip(*best), "o", ms=12, mfc="none", mec=f"C{k}", mew=1.5, zorder=2)
                for point in dict.fromkeys(xy):  # scales that fall on one point share its label
                    points.append(point)
                    texts.append(", ".join(f"{c.scale:g}" for c, p in zip(mine, xy) if p == point))
                    colors.append(f"C{k}")
            axes.plot([], [], "o", ms=11, mfc="none", mec=axes.xaxis.label.get_color(), mew=1.5, label="Pareto front")
            if x == "saturation" and numbers["data_saturation"] is not None:
                ink = axes.xaxis.label.get_color()
                axes.axvline(numbers["data_saturation"], ls=(0, (4, 3)), lw=1.2, color=ink, label="data", zorder=1)
            axes.margins(0.13, 0.15)
            axes.locator_params(axis="x", nbins=10 if wide else 6)
            if x == "nfe":  # at least as wide as 40% of the cost, so that equal costs look equal
                low, high = axes.get_xlim()
                short = max(0.0, 0.4 * max(c.nfe or 0.0 for c in able) - (high - low))
                axes.set_xlim(low - short / 2, high + short / 2)
            if key == "verified":
                axes.yaxis.set_major_formatter("{x:.0%}")
            axes.set(xlabel=label, ylabel=words)
            axes.figure.legend(loc="outside lower center", ncols=6 if wide else 4, columnspacing=1.4, handlelength=1.8)
            label_points(axes, points, texts, colors)

        return on

    near = "with so little saturation"
    if numbers["data_saturation"] is not None:
        near = "and as close to the saturation of the data (dashed)"
    side = " Rules at equal cost are set side by side." if any(_dodge(able, names).values()) else ""
    noun, good = ("Similarity", f"close to {names[0]}") if key == "psnr" else ("Quality", "good")
    costs = f"No other setting is as {good} at so few evaluations.{side}"
    return Section(
        f"{noun} against cost, {noun.lower()} against saturation",
        "Numbers at the points are scales. A ring marks the Pareto front: no other setting is better in both directions.",
        figures=[
            plot(draw("nfe", "denoiser evaluations an image (NFE)"), costs, size),
            plot(draw("saturation", "mean saturation"), f"No other setting is as {good} {near}.", size),
        ],
    )


def _dodge(cells: list[Measured], names: list[str]) -> dict[str, float]:
    """Shift of each rule's points in x, where rules would lie on each other for costing the same."""
    costs = {name: [c.nfe or 0.0 for c in cells if c.rule == name] for name in names}
    every = [v for values in costs.values() for v in values]
    shared = [n for n in names if any(set(costs[n]) & set(costs[m]) for m in names if m != n)]
    width = 0.025 * ((max(every) - min(every)) or max(every) or 1.0)
    return {n: (shared.index(n) - (len(shared) - 1) / 2) * width if n in shared else 0.0 for n in names}


def _table(todo: Plan, cells: list[Measured], numbers: dict) -> Section:
    columns = _columns(cells)
    rows = [["rule", "scale", *(FORMATS[name][0] for name in columns)]]
    for cell in cells:
        values = [_text(cell, name) for name in columns]
        rows.append([cell.rule, f"{cell.scale:g}", *(["failed"] + ["–"] * (len(values) - 1) if cell.error else values)])
    first = next(iter(todo.rules))
    truth = numbers["data_saturation"]
    note = "Saturation: mean HSV saturation"
    note += f" (ground-truth renders of these prompts: {truth:.3f}). " if truth is not None else ". "
    note += "Times depend on what else the machine did. "
    note += "Contrast: standard deviation of luma. Clipped values: share of channel values at 0 or 255. "
    if todo.world:
        note += "Verified: share of images that the exact verifier of the world accepts, with the 95% Wilson interval. "
    if todo.clip:
        note += f"CLIP score: 100 times the cosine of image and prompt, by {todo.clip}, with 95% intervals. "
    if len(todo.rules) > 1:
        note += f"PSNR and SSIM compare with the images of {first} at the same scale. "
    return Section("All numbers", table=rows, note=note + "The same numbers, with intervals, are in compare.json.")
