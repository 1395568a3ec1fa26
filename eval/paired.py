"""`compare(a, b)`: two generators' answers to the same prompts and seeds, as paired differences with intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffgen.eval import functional, result
from diffgen.eval.extractors import Extractor
from diffgen.eval.features import Stats
from diffgen.eval.images import ImageSource
from diffgen.eval.metrics_table import METRICS, Metric, Verifier
from diffgen.eval.passes import ImageSet, world
from diffgen.eval.run import bound, remarks, resampled_sd, unfit
from diffgen.eval.work import ScorerLike, Work, prepare


@dataclass(frozen=True)
class Difference:
    """One metric of both sets, and a - b with its 95% interval."""

    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    interval: str | None  # as in Score
    higher_is_better: bool | None
    distinguishable: bool | None  # False where the interval contains 0; None without an interval
    better: str | None  # "a" or "b", where they can be told apart and one direction is better
    n: int
    m: int | None = None
    extractor: str | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: `difference(name)`, `table()`, `to_json(path)`, `to_markdown(path)`, `to_html(path)`."""

    differences: dict[str, Difference]
    seed: int
    ci_samples: int
    labels: tuple[str, str] = ("a", "b")
    warnings: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sets: dict[str, ImageSet] = field(default_factory=dict, repr=False, compare=False)  # for to_html

    def difference(self, metric: str) -> float:
        if metric not in self.differences:
            raise KeyError(f"{metric!r} was not compared; there are {', '.join(self.differences)}")
        return self.differences[metric].difference

    def rows(self) -> list[list[str]]:
        rows = [["metric", "", "A", "B", "A − B", "95% interval", "verdict", "n", "m", "features"]]
        for name, d in self.differences.items():
            verdict = {None: "", False: "not distinguishable", True: "different"}[d.distinguishable]
            verdict = f"{d.better.upper()} is better" if d.better else verdict
            counts = [str(d.n), "" if d.m is None else str(d.m), d.extractor or ""]
            numbers = [f"{d.a:.4g}", f"{d.b:.4g}", f"{d.difference:+.4g}", result.interval_text(d)]
            rows.append([name, result.ARROWS[d.higher_is_better], *numbers, verdict, *counts])
        return rows

    def remarks(self) -> list[str]:
        return [
            f"A: {self.labels[0]}; B: {self.labels[1]}",
            *(f"warning: {text}" for text in self.warnings),
            *(f"note: {text}" for text in self.notes),
            *(f"skipped: {name}: {why}" for name, why in self.skipped.items()),
        ]

    def table(self) -> str:
        return result.text_table(self.rows(), self.remarks())

    def to_markdown(self, path: str | Path | None = None) -> str:
        return result.kept(result.markdown(self.rows(), self.remarks()), path)

    def to_json(self, path: str | Path | None = None) -> str:
        report: dict[str, Any] = {"differences": {name: asdict(d) for name, d in self.differences.items()}}
        report |= {"a": self.labels[0], "b": self.labels[1], "seed": self.seed, "ci_samples": self.ci_samples}
        report |= {"warnings": self.warnings, "notes": self.notes, "skipped": self.skipped}
        return result.kept(result.json_text(report), path)

    def to_html(self, path: str | Path) -> Path:
        from diffgen.eval.page import comparison_page

        return comparison_page(self, path)


def compare(
    a: ImageSource,
    b: ImageSource,
    reference: ImageSource | Stats | None = None,
    *,
    train: ImageSource | None = None,
    test: ImageSource | None = None,
    prompts: Sequence[str] | None = None,
    groups: Sequence[Hashable] | None = None,
    metrics: Sequence[str] | str = ("fd", "pairwise", "vendi"),
    extractor: str | nn.Module | Extractor = "efficientnet-lite0",
    scorers: Sequence[ScorerLike] = (),
    verifier: Verifier | None = None,
    n: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    ci_samples: int = 50,
    cache: Any = None,
    on_bad_image: str = "error",
    device: str = "cpu",
    k: int = 5,
    out: str | Path | None = None,
    progress: bool = True,
    assume_extractor: str | None = None,
    distributed: bool = False,
) -> Comparison:
    """Every metric of a minus that of b. All arguments but a and b are those of `evaluate`.

    a, b: two generators' images, row by row for the same prompts and seeds: both are resampled by the same rows (whole
    prompts, when prompts repeat) and meet the same resampled reference, so that what they share cancels.

    "not distinguishable" is what a metric says whose interval contains 0. Raises ValueError unless a and b have equally many
    images, and what `evaluate` raises.
    """
    paths = result.outputs(out)
    work = prepare(
        {"a": a, "b": b}, reference, train, test, prompts, groups, metrics, extractor, scorers, verifier, n, batch_size,
        seed, ci_samples, cache, on_bad_image, device, k, progress, assume_extractor, distributed,
    )  # fmt: skip
    found = _compared(work, tuple(images.source.origin for images in work.generated.values()))
    for text in found.warnings:
        warnings.warn(text, stacklevel=2)
    if not distributed or world()[0] == 0:
        result.write(found, paths)
    return found


def _compared(work: Work, labels: tuple) -> Comparison:
    A, B = work.generated["a"], work.generated["b"]
    bad = [set(images.notes["skipped"]) for images in (A, B)]
    if len(A) != len(B) or bad[0] != bad[1]:
        unreadable = f"; unreadable: {', '.join(sorted(bad[0] ^ bad[1]))}" if bad[0] != bad[1] else ""
        raise ValueError(f"a and b must be paired image by image; got {len(A)} and {len(B)} images{unreadable}")
    skipped, found = dict(work.skipped), {}
    for name in dict.fromkeys([*work.names, *(name for name in A.values if name in work.judged)]):
        if why := unfit(name, work):
            skipped[name] = why
            continue
        try:
            found[name] = _of_images(name, A, B, work) if name in A.values else _of_features(METRICS[name], work)
        except ValueError as error:
            if not work.skip:
                raise ValueError(f"metric {name!r}: {error}") from error
            skipped[name] = str(error)
    warned, notes = remarks(work)
    if sorted(A.hashes) == sorted(B.hashes):
        notes.append("a and b are the same images")
    fd = found.get("fd")
    if fd is not None and 0 < abs(fd.difference) < 0.02 * max(fd.a, fd.b):
        notes.append("fd: less than 2% apart: training one model again with another seed can move FD more than that")
    return Comparison(found, work.seed, work.ci_samples, labels, warned, skipped, notes, work.generated | work.others)


def _of_images(name: str, A: ImageSet, B: ImageSet, work: Work) -> Difference:
    """Of values an image; where either has none (NaN), the pair doesn't count."""
    both = ~(A.values[name].isnan() | B.values[name].isnan())
    a, b = A.values[name][both], B.values[name][both]
    if not len(a):
        raise ValueError("applies to no pair of images")
    better = work.judged[name] if name in work.judged else METRICS[name].higher_is_better
    labels = work.clusters("a")
    clusters = None if labels is None else [label for label, kept in zip(labels, both.tolist()) if kept]
    if clusters is not None and work.ci_samples and len(set(clusters)) > 1:
        options: dict[str, Any] = {"samples": work.ci_samples, "seed": work.seed, "clusters": clusters}
        gap, sd = functional.paired_bootstrap_difference(_mean, a[:, None], b[:, None], None, **options)
        return _told(float(a.mean()), float(b.mean()), gap, sd, "bootstrap", better, len(a))
    return _told_pairs(a, b, better, len(a))


def _mean(X: Tensor) -> float:
    return float(X.mean())


def _told_pairs(a: Tensor, b: Tensor, better: bool | None, n: int, **more: Any) -> Difference:
    sd = float((a - b).std()) / math.sqrt(len(a)) if len(a) > 1 else None
    return _told(float(a.mean()), float(b.mean()), float((a - b).mean()), sd, "standard error", better, n, **more)


def _told(
    a: float, b: float, gap: float, sd: float | None, kind: str | None, better: bool | None, n: int, **more: Any
) -> Difference:
    if sd is None:
        return Difference(a, b, gap, None, None, None, better, None, None, n, **more)
    low, high = gap - 1.96 * sd, gap + 1.96 * sd
    apart = not low <= 0 <= high
    best = None if better is None or not apart else "a" if (gap > 0) == better else "b"
    return Difference(a, b, gap, low, high, kind, better, apart, best, n, **more)


def _of_features(metric: Metric, work: Work) -> Difference:
    whole, XA, Y, m = bound(metric, work, "a")
    XB = bound(metric, work, "b")[1]
    more: dict[str, Any] = {"m": m, "extractor": work.extractor}
    sets = [] if Y is None else [Y]
    answers = whole(XA, *sets), whole(XB, *sets)
    if isinstance(answers[0], Tensor):
        return _told_pairs(*answers, metric.higher_is_better, len(XA), **more)

    def fn(*rows: Tensor) -> float:
        answer = whole(*rows)
        return float(answer if metric.part is None else getattr(answer, metric.part))

    a, b = (float(x if metric.part is None else getattr(x, metric.part)) for x in answers)
    sd, clusters = None, work.clusters("a")
    if work.ci_samples and metric.interval == "bootstrap":
        options: dict[str, Any] = {"samples": work.ci_samples, "seed": work.seed, "clusters": clusters}
        sd = functional.paired_bootstrap_difference(fn, XA, XB, Y, **options)[1]
    elif work.ci_samples:
        d = XA.shape[1]  # side by side, so that both lose the same rows

        def gap(both: Tensor, *rest: Tensor) -> float:
            return fn(both[:, :d], *rest) - fn(both[:, d:], *rest)

        spread = resampled_sd(
            metric, gap, torch.cat([XA, XB], dim=1), Y, work.ci_samples, work.seed, clusters, work.k
        )  # fmt: skip
        sd = None if spread is None else float(spread[0])
    kind = "half-sampling" if metric.interval == "half" else "bootstrap"
    return _told(a, b, a - b, sd, kind, metric.higher_is_better, len(XA), **more)
