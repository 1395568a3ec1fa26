"""`diffgen compare`: every guidance rule at every scale from the same seeds, measured, on one HTML page."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import re
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffgen.compare_page import Measured, Plan, Value, listed, page, text
from diffgen.eval import evaluate
from diffgen.eval.report import write_report
from diffgen.eval.similarity import similarity
from diffgen.files import write_text
from diffgen.loading import load
from diffgen.pipelines import AdaptiveGuidance, Guidance, LinearAG, draw, specs
from diffgen.pipelines.base import Wrapper
from diffgen.worlds import WORLDS, shapes

STATISTICS = ("saturation", "contrast", "clipping")


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
    if len({f"{s:g}" for s in strengths}) < len(strengths):
        raise ValueError(f"--scales {scales!r} names a number twice")
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
    """Samples, measures, writes the page and its numbers as JSON beside it; returns the latter."""
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
                    _sample(pipe, build(scale), todo, cell, bar.update, quiet)
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
    dumped = json.dumps(numbers, indent=1, allow_nan=False)
    write_report(todo.page, *page(todo, cells, numbers))
    write_text(todo.json, dumped + "\n")
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
    try:
        spec, options = specs.parse(text)
    except ValueError as error:
        raise ValueError(f"--rules {text!r}: {error}") from None
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


def _sample(pipe, rule: Guidance, todo: Plan, cell: Measured, tick: Callable[[int], Any], quiet: bool) -> None:
    """Fills in images, nfe and seconds_per_image. Image i has its own seed, the same in every cell."""
    extra: dict[str, Any] = {"num_inference_steps": todo.steps} if todo.steps else {}
    negative = {"negative_prompt": todo.negative} if todo.negative is not None else {}
    known = set(todo.prompts)
    others = [p for p in shapes.prompts(256, seed=2, split="all") if p not in known] if todo.world else []
    others = (others or list(dict.fromkeys(todo.prompts)))[:64]
    given = rule
    rule = specs.fit(rule, pipe, others, batch_size=todo.batch, quiet=quiet, **extra, **negative)
    cell.fitted = _fitted(given, rule, others, other=todo.world)
    drawn = draw(pipe, rule, todo.prompts, todo.seed, batch_size=todo.batch, tick=tick, **extra, **negative)
    cell.images, cell.nfe, cell.seconds_per_image = drawn.images, drawn.nfe, drawn.seconds


def _fitted(given: Guidance, rule: Guidance, prompts: list[str], other: bool) -> dict[str, Any]:
    """What data decided about the rule: LinearAG's coefficients, AG's threshold."""
    found: dict[str, Any] = {}
    for before, link in zip(_links(given), _links(rule)):
        if isinstance(before, LinearAG):
            here = before.coefficients is None
            found["linear_ag"] = {"prompts": len(prompts), "other_prompts": other} if here else "coefficients given"
        if isinstance(link, AdaptiveGuidance):
            default = link.threshold == AdaptiveGuidance.threshold
            found["ag"] = {"threshold": f"{link.threshold:g}", "default": default}
    return found


def _links(rule: Guidance) -> list[Guidance]:
    return [rule, *(rule.inside if isinstance(rule, Wrapper) else [])]


def _sentences(cells: list[Measured]) -> list[str]:
    """What was fitted, once a rule."""
    found = []
    for cell in cells:
        match cell.fitted.get("linear_ag"):
            case {"prompts": n, "other_prompts": other}:
                what = f"{n} other prompts" if other else f"these prompts ({n}) with other noise"
                found.append(f"{cell.rule}: coefficients fitted on {what} at each scale, not counted in NFE or time.")
        match cell.fitted.get("ag"):
            case {"threshold": threshold, "default": True}:
                found.append(
                    f"{cell.rule}: threshold {threshold}, the default, not calibrated for this model and number of steps "
                    "(diffgen fit ag calibrates)."
                )
            case {"threshold": threshold}:
                found.append(f"{cell.rule}: threshold {threshold}, as given.")
    return list(dict.fromkeys(found))


def _measure(cell: Measured, todo: Plan, clip_score, reference: torch.Tensor | None) -> None:
    assert cell.images is not None
    verifier = None
    if todo.world:
        cell.results = answers = torch.as_tensor(shapes.verify(cell.images, todo.prompts)).double()
        verifier = lambda images, prompts: answers  # noqa: E731
    result = evaluate(cell.images, prompts=todo.prompts, metrics=STATISTICS, verifier=verifier, ci_samples=0)
    for name, score in result.scores.items():
        value = {"value": score.value, "low": score.low, "high": score.high}
        setattr(cell, "verified" if name == "verifier" else name, value)
    if clip_score:
        scores = clip_score(cell.images, todo.prompts)
        cell.clip = _mean(scores)
        if not todo.world:
            cell.results = scores
    if reference is not None:
        found = similarity(cell.images, reference)
        cell.psnr, cell.ssim = None if torch.equal(cell.images, reference) else found["psnr"], found["ssim"]


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
    key, words = todo.quality
    truth = _data_saturation(todo)
    ranking = _ranking(todo, cells)
    shown = [] if len(todo.prompts) < 2 else [i for i, cell in enumerate(cells) if cell.get(key) is not None]
    quality = [cells[i].get(key) for i in shown]
    saturation = [cells[i].get("saturation") for i in shown]
    costs = {"nfe": [cells[i].nfe for i in shown], "saturation": [abs(v - (truth or 0.0)) for v in saturation]}
    return {
        "schema_version": 1,
        "command": todo.command(),
        "model": todo.model,
        "pipeline": pipeline,
        "reference": todo.reference,
        "scales": todo.scales,
        "prompts": list(dict.fromkeys(todo.prompts)),
        "negative_prompt": todo.negative,
        "images_per_prompt": todo.per_prompt,
        "images": len(todo.prompts),
        "steps": todo.steps,
        "seed": todo.seed,
        "finding": _finding(todo, cells, ranking),
        "ranking": ranking,
        "fitted": _sentences(cells),
        "quality": {"measure": key, "name": words},
        "data_saturation": truth,
        "pareto": {
            name: [[cells[shown[k]].rule, cells[shown[k]].scale] for k in front(list(zip(cost, quality)))]
            for name, cost in costs.items()
        },
        "cells": [cell.row() for cell in cells],
        "versions": {package: version(package) for package in ("diffgen", "diffusers", "torch")},
    }


def apart(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether results of the same prompts and seeds, [N] each, differ beyond the noise, at 5%.

    McNemar's exact test where they are 0 or 1, else the paired t-test.
    """
    from scipy import stats

    difference = (a - b).double()
    if bool(((a == 0) | (a == 1)).all() and ((b == 0) | (b == 1)).all()):
        won, lost = int((difference > 0).sum()), int((difference < 0).sum())
        return won + lost > 0 and stats.binomtest(won, won + lost).pvalue < 0.05
    n = len(difference)
    margin = stats.t.ppf(0.975, n - 1) * float(difference.std()) / math.sqrt(n) if n > 1 else math.inf
    return abs(float(difference.mean())) > margin


def _ranking(todo: Plan, cells: list[Measured]) -> dict[str, Any] | None:
    """The settings of highest quality (cheapest first), those no test tells apart from them, and the best where it is one.

    None where there is no measure that looks at the prompt, or too little to rank by it.
    """
    key, _ = todo.quality
    results = {cell: cell.results for cell in cells if cell.results is not None and not cell.error}
    able = list(results)
    if key == "psnr" or len(todo.prompts) < 2 or len(able) < 2:
        return None
    top = max(cell.get(key) for cell in able)
    highest = sorted((cell for cell in able if cell.get(key) == top), key=lambda cell: cell.nfe or 0)
    near = [cell for cell in able if cell not in highest and not apart(results[highest[0]], results[cell])]
    named = {name: [[c.rule, c.scale] for c in found] for name, found in (("highest", highest), ("not_apart", near))}
    return {**named, "best": None if near or len(highest) > 1 else named["highest"][0], "of": len(able)}


def _finding(todo: Plan, cells: list[Measured], ranking: dict[str, Any] | None) -> str:
    failed = sum(bool(cell.error) for cell in cells)
    tail = f" {failed} of {len(cells)} cells failed; they say why." if failed else ""
    key, words = todo.quality
    n = len(todo.prompts)
    if ranking is None:
        start = f"{len(cells)} setting{'s' * (len(cells) > 1)} from the same seeds"
        if n < 2:
            return f"{start}, one image each: too few to rank.{tail}"
        if key == "psnr":
            return f"{start}; images are compared with those of {todo.reference}.{tail}"
        only = next(cell for cell in cells if not cell.error)
        return (
            f"{only.rule} at scale {only.scale:g}: {words} {text(only, key)}, {only.nfe:g} evaluations an image.{tail}"
        )
    top = [next(c for c in cells if [c.rule, c.scale] == pair) for pair in ranking["highest"]]
    near, others = len(ranking["not_apart"]), ranking["of"] - len(top)
    if len(top) > 1:
        named = [f"{c.rule} at scale {c.scale:g}" for c in top]
        named = named if len(named) < 5 else [*named[:3], f"{len(named) - 3} more"]
        start = f"{len(top)} settings tie at the highest {words}, {text(top[0], key)}: {listed(named)}."
        them = "them"
    else:
        c = top[0]
        start = (
            f"Highest {words}: {text(c, key)}, by {c.rule} at scale {c.scale:g} with {c.nfe:g} evaluations an image."
        )
        them = "it"
    rest = "the other one" if others == 1 else f"the other {others}"
    which = rest if near == others else f"{near} of {rest}"
    if near:
        doubt = f" With {n} images {which} cannot be told apart from {them}."
    else:
        doubt = f" {rest.capitalize()} measured lower beyond the noise of {n} images." if others else ""
    return start + doubt + tail
