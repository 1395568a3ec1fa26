"""`evaluate`: images in, a table of metrics with their uncertainty out.

METRICS is the list of what can be measured; a new metric is one row of it.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffgen.eval import functional
from diffgen.eval.extractors import Extractor, get_extractor
from diffgen.eval.images import ImageSource, load_images

Verifier = Callable[[Tensor, list[str]], Any]
Floor = dict[str, "float | None"]  # plug_in: usually too low; split: usually too high, None when it can't be had


def verify(images: Tensor, prompts: list[str], verifier: Verifier) -> Tensor:
    """Answers of the verifier, one 0 or 1 an image: float64 [N]."""
    answers = torch.as_tensor(verifier(images, prompts)).cpu().double()
    if answers.shape != (len(images),):
        raise ValueError(f"verifier must return [{len(images)}] values, one an image; got {list(answers.shape)}")
    if not bool(((answers == 0) | (answers == 1)).all()):
        wrong = answers[(answers != 0) & (answers != 1)][0].item()
        raise ValueError(f"verifier must return values in {{0,1}}; got {wrong}")
    return answers


def fd_floor_bracket(X: Tensor, Y: Tensor, seed: int) -> Floor:
    """What FD between two samples of Y's distribution would be; no split when Y has fewer than 4 rows."""
    plug_in = functional.fd_floor(functional.spectrum(Y), len(X), len(Y))
    split = functional.fd_floor_split(Y, len(X), seed=seed) if len(Y) >= 4 else None
    return {"plug_in": plug_in, "split": split}


@dataclass(frozen=True)
class Metric:
    """One row of METRICS. `function` takes what `needs` names and gives a float, or one value an image [N]."""

    function: Callable[..., Any]
    needs: tuple[str, ...]  # of x (generated features), y (reference features), images, prompts, verifier
    higher_is_better: bool | None  # None: neither; compare with the reference
    summary: str
    paper: str = ""  # arXiv id
    floor: Callable[[Tensor, Tensor, int], Floor] | None = None


METRICS: dict[str, Metric] = {
    "fd": Metric(functional.fd, ("x", "y"), False, "Fréchet distance", "1706.08500", fd_floor_bracket),
    "pairwise": Metric(functional.mean_pairwise, ("x",), True, "mean pairwise cosine distance", "2512.24138"),
    "vendi": Metric(functional.vendi, ("x",), True, "effective number of different images", "2210.02410"),
    "saturation": Metric(functional.saturation, ("images",), None, "mean HSV saturation"),
    "contrast": Metric(functional.contrast, ("images",), None, "standard deviation of luma"),
    "clipping": Metric(functional.clipping, ("images",), False, "share of channel values at 0 or 255"),
    "verifier": Metric(verify, ("images", "prompts", "verifier"), True, "share of images that pass the verifier"),
}

# need -> the argument of evaluate that may be absent
ARGUMENTS = {"y": "reference", "prompts": "prompts", "verifier": "verifier"}


@dataclass(frozen=True)
class Score:
    """One metric's value with its 95% interval and what it depends on."""

    value: float
    low: float | None
    high: float | None
    interval: str | None  # "bootstrap": value +- 1.96 bootstrap sd; "standard error": of a mean over images; "wilson"
    higher_is_better: bool | None
    n: int
    m: int | None = None  # reference images, where the metric uses them
    extractor: str | None = None
    floor: Floor | None = None


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` found: `value(name)`, `table()`, `to_json(path)`, and `scores` with everything."""

    scores: dict[str, Score]
    seed: int
    ci_samples: int
    warnings: list[str] = field(default_factory=list)

    def value(self, metric: str) -> float:
        if metric not in self.scores:
            raise KeyError(f"{metric!r} was not evaluated; there are {', '.join(self.scores)}")
        return self.scores[metric].value

    def table(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table("metric", "", box=box.SIMPLE)
        for column in ("value", "95% interval", "noise floor", "n", "m"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("features", no_wrap=True)
        for name, score in self.scores.items():
            better = {True: "↑", False: "↓", None: ""}[score.higher_is_better]
            counts = (str(score.n), "" if score.m is None else str(score.m))
            cells = (f"{score.value:.4g}", _interval(score), _floor(score), *counts, score.extractor or "")
            table.add_row(name, better, *cells)
        output = io.StringIO()
        console = Console(file=output, width=140, color_system=None)
        console.print(table, *(f"warning: {text}" for text in self.warnings), sep="\n", markup=False, soft_wrap=True)
        return "\n".join(line.rstrip() for line in output.getvalue().strip("\n").splitlines())

    def to_json(self, path: str | Path | None = None) -> str:
        report = {"schema_version": 1, "metrics": {name: asdict(score) for name, score in self.scores.items()}}
        report |= {"seed": self.seed, "ci_samples": self.ci_samples, "warnings": self.warnings}
        report["versions"] = {package: version(package) for package in ("diffgen", "torch", "timm")}
        text = json.dumps(report, indent=2, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text


def evaluate(
    generated: ImageSource,
    reference: ImageSource | None = None,
    *,
    prompts: Sequence[str] | None = None,
    metrics: Sequence[str] = ("fd", "pairwise", "vendi"),
    extractor: str | nn.Module | Extractor = "efficientnet-lite0",
    verifier: Verifier | None = None,
    ci_samples: int = 50,
    seed: int = 0,
) -> EvalResult:
    """Measure generated images, alone or against reference images.

    generated, reference: what `load_images` takes: a folder, a uint8 tensor [N,3,H,W], floats in [0,1], or PIL images.
    prompts:    the text of each generated image, in the images' order.
    metrics:    names from METRICS.
    extractor:  what `get_extractor` takes; it runs once over each source, and only when a metric needs features.
    verifier:   (images uint8 [N,3,H,W], prompts) -> [N] values in {0,1}; adds the metric "verifier".
    ci_samples: bootstrap resamples for the intervals of feature metrics; 0 leaves those intervals out.

    FD comes with its noise floor: the bracket in which FD would lie if both sources were samples of one distribution.
    Raises ValueError for an unknown metric, for a metric whose input is absent, and unless prompts match images.
    """
    names = _checked_names(metrics, verifier)
    if ci_samples < 0 or ci_samples == 1:
        raise ValueError(f"ci_samples must be 0 (no intervals) or at least 2; got {ci_samples}")
    _check_inputs(names, {"y": reference, "prompts": prompts, "verifier": verifier})
    needed = {need for name in names for need in METRICS[name].needs}

    images = load_images(generated)
    if prompts is not None and len(prompts) != len(images):
        raise ValueError(f"prompts must be one an image; got {len(prompts)} prompts and {len(images)} images")
    inputs: dict[str, Any] = {"images": images, "verifier": verifier}
    inputs["prompts"] = None if prompts is None else list(prompts)
    feature_id = None
    if needed & {"x", "y"}:
        extract = get_extractor(extractor)
        feature_id = extract.id
        inputs["x"] = extract(images)
        if reference is not None and "y" in needed:
            inputs["y"] = extract(load_images(reference))

    scores = {name: _score(METRICS[name], inputs, feature_id, ci_samples, seed) for name in names}
    notes = _rank_warnings(scores, inputs)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return EvalResult(scores, seed, ci_samples, notes)


def _score(metric: Metric, inputs: dict[str, Any], feature_id: str | None, ci_samples: int, seed: int) -> Score:
    arguments = [inputs[need] for need in metric.needs]
    result = metric.function(*arguments)
    better, n = metric.higher_is_better, len(inputs["images"])
    if isinstance(result, Tensor):
        low, high, kind = _interval_of_mean(result, binary="verifier" in metric.needs)
        return Score(float(result.mean()), low, high, kind, better, n)
    low = high = kind = None
    y = inputs["y"] if "y" in metric.needs else None
    if ci_samples:
        margin = 1.96 * functional.bootstrap_sd(metric.function, inputs["x"], y, ci_samples, seed)
        low, high, kind = result - margin, result + margin, "bootstrap"
    m = None if y is None else len(y)
    floor = metric.floor(inputs["x"], y, seed) if metric.floor and y is not None else None
    return Score(result, low, high, kind, better, n, m, feature_id, floor)


def _interval_of_mean(values: Tensor, binary: bool) -> tuple[float | None, float | None, str | None]:
    if binary:
        return *functional.wilson(int(values.sum()), len(values)), "wilson"
    if len(values) < 2:
        return None, None, None
    mean, margin = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))
    return mean - margin, mean + margin, "standard error"


def _checked_names(metrics: Sequence[str], verifier: Verifier | None) -> list[str]:
    if isinstance(metrics, str):
        raise TypeError(f"metrics must be a sequence of names; got the string {metrics!r}, did you mean [{metrics!r}]?")
    names = list(dict.fromkeys([*metrics, *(["verifier"] if verifier is not None else [])]))
    if not names:
        raise ValueError(f"metrics must name at least one of {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            nearest = get_close_matches(str(name), METRICS, n=1, cutoff=0)[0]
            raise ValueError(f"unknown metric {name!r}; nearest is {nearest!r} of {', '.join(METRICS)}")
    return names


def _check_inputs(names: list[str], given: dict[str, Any]) -> None:
    absent = {need for need, value in given.items() if value is None}
    for name in names:
        missing = [ARGUMENTS[need] for need in METRICS[name].needs if need in absent]
        if missing:
            possible = [name for name, metric in METRICS.items() if not absent & set(metric.needs)]
            raise ValueError(f"metric {name!r} needs {' and '.join(missing)}; without, there are {', '.join(possible)}")


def _rank_warnings(scores: dict[str, Score], inputs: dict[str, Any]) -> list[str]:
    names = [name for name, score in scores.items() if score.floor is not None]
    if not names:
        return []
    n, m, d = len(inputs["x"]), len(inputs["y"]), inputs["x"].shape[1]
    if min(n, m) > d:
        return []
    counts = f"n={n}, m={m}, d={d}"
    return [f"{', '.join(names)}: {counts}: too few images (<= d) for a full-rank covariance: biased, see noise floor"]


def _interval(score: Score) -> str:
    if score.low is None or score.high is None:
        return ""
    if score.interval == "wilson":
        return f"[{score.low:.4g}, {score.high:.4g}]"
    return f"± {(score.high - score.low) / 2:.2g}"


def _floor(score: Score) -> str:
    if score.floor is None:
        return ""
    plug_in, split = score.floor["plug_in"], score.floor["split"]
    return f"> {plug_in:.4g}" if split is None else f"[{plug_in:.4g}, {split:.4g}]"
