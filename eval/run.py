"""`evaluate`: images in, a table of metrics with their uncertainty out. What can be measured: `metrics_table.METRICS`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffgen.eval import functional, result
from diffgen.eval.extractors import Extractor
from diffgen.eval.features import Stats
from diffgen.eval.images import ImageSource, format_warning
from diffgen.eval.metrics_table import (
    METRICS,
    SETS,
    Metric,
    Verifier,
    fd_floor_of_stats,
    too_few,
)
from diffgen.eval.passes import ImageSet, world
from diffgen.eval.result import EvalResult, Score
from diffgen.eval.work import ScorerLike, Work, prepare

__all__ = ["METRICS", "EvalResult", "Score", "evaluate"]

HALF_ROWS = 1000  # rows that "half" intervals draw at most


def evaluate(
    generated: ImageSource,
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
) -> EvalResult:
    """Measure generated images, alone or against reference images.

    generated, reference, train, test: what `open_source` takes: folders, zips, tensors, lists, datasets, pipelines ... The
                reference may also be an .npz of statistics, or `Stats`: enough for fd. test: images that were not trained on,
                for C_T and as the baseline of the other memorisation metrics.
    prompts:    the text of each generated image, in the images' order. Repeated prompts are resampled as a whole.
    groups:     one label an image, for "intra_prompt"; default: the prompts.
    metrics:    names from METRICS, "prdc" for its four, or "all": what can't be had is then left out, with the reason.
    extractor:  what `get_extractor` takes; it runs once over each source, and only when a metric needs features.
    scorers:    names or "name:option=value", or callables (images uint8 [N,3,H,W], prompts) -> [N] or {name: [N]}.
    verifier:   (images uint8 [N,3,H,W], prompts) -> [N] values in {0,1}; adds the metric "verifier".
    n:          the first n images of each source only; a callable is asked for n.
    ci_samples: resamples for the intervals of feature metrics; 0 leaves those intervals out.
    cache, batch_size, on_bad_image: as in `features`.
    k:          neighbours in precision, recall, density and coverage.
    out:        an .html, .json or .md file to write, or a folder for all three.
    assume_extractor: the extractor's id for a statistics file that has none.
    distributed: under torchrun or accelerate launch: each process takes its share of the images, all return the same result,
                and the first one writes.

    FD comes with its noise floor: the bracket in which FD would lie if both sources were samples of one distribution.
    Raises ValueError for an unknown metric, for a metric whose input is absent, and unless prompts match images.
    """
    paths = result.outputs(out)
    work = prepare(
        {"generated": generated}, reference, train, test, prompts, groups, metrics, extractor, scorers, verifier, n,
        batch_size, seed, ci_samples, cache, on_bad_image, device, k, progress, assume_extractor, distributed,
    )  # fmt: skip
    found = _evaluated(work)
    for text in found.warnings:
        warnings.warn(text, stacklevel=2)
    if not distributed or world()[0] == 0:
        result.write(found, paths)
    return found


# ---- one metric


def _evaluated(work: Work) -> EvalResult:
    own = work.generated["generated"]
    skipped, scores = dict(work.skipped), {}
    memo: dict[Any, Any] = {}
    for name in dict.fromkeys([*work.names, *(name for name in own.values if name in work.judged)]):
        if why := unfit(name, work):
            skipped[name] = why
            continue
        try:
            scores[name] = (
                _of_images(name, own, work) if name in own.values else _of_features(METRICS[name], work, memo)
            )
        except ValueError as error:
            if not work.skip:
                raise ValueError(f"metric {name!r}: {error}") from error
            skipped[name] = str(error)
    found, notes = remarks(work)
    sources = {
        key: {"n": len(images), **_facts(images)} for key, images in [*work.generated.items(), *work.others.items()]
    }
    if work.stats:
        sources["reference"] = {"n": work.stats.n, "kind": "statistics"}
    found = _rank_warnings(scores, work) + found
    return EvalResult(
        scores, work.seed, work.ci_samples, found, skipped, notes + verdicts(scores), sources,
        work.generated | work.others, work.judged,
    )  # fmt: skip


def unfit(name: str, work: Work) -> str:
    """Why this metric can't be had from these sets; "" if it can. Raises ValueError instead unless work.skip."""
    why = ""
    if name in METRICS:
        sets = {key: len(images) for key, images in work.others.items()}
        smallest = min(map(len, work.generated.values()))
        sizes = {need: smallest if title == "generated" else sets.get(title) for need, title in SETS.items()}
        known = {need: size for need, size in sizes.items() if size is not None}
        if work.stats is not None and work.stats.n is not None:
            known["y"] = work.stats.n
        why = too_few(METRICS[name], known, work.k)
    if name in work.judged and all(bool(images.values[name].isnan().all()) for images in work.generated.values()):
        return "applies to no image"
    if why and not work.skip:
        raise ValueError(f"metric {name!r} {why}")
    return why


def _of_images(name: str, own: ImageSet, work: Work) -> Score:
    """The mean over images. A scorer's NaN: the question doesn't arise for that image."""
    values = own.values[name]
    values = values[~values.isnan()] if name in work.judged else values
    better = work.judged[name] if name in work.judged else METRICS[name].higher_is_better
    low, high, kind = _interval_of_mean(values, binary=name == "verifier")
    return Score(float(values.mean()), low, high, kind, better, len(values))


def _of_features(metric: Metric, work: Work, memo: dict[Any, Any]) -> Score:
    """memo: what rows with `part` have in common is computed once."""
    fn, X, Y, m = bound(metric, work, "generated")
    own, better = len(work.generated["generated"]), metric.higher_is_better
    if metric.function not in memo:
        memo[metric.function] = answer = fn(X) if Y is None else fn(X, Y)
        spread = None
        if work.ci_samples and not isinstance(answer, Tensor):
            spread = resampled_sd(metric, fn, X, Y, work.ci_samples, work.seed, work.clusters("generated"), work.k)
        memo[metric.function, "sd"] = spread
    answer, sd = memo[metric.function], memo[metric.function, "sd"]
    if isinstance(answer, Tensor):
        return Score(float(answer.mean()), *_interval_of_mean(answer, False), better, own, m, work.extractor)
    part = 0 if metric.part is None else answer._fields.index(metric.part)
    value = float(answer if metric.part is None else answer[part])
    low = high = kind = None
    if sd is not None:
        margin = 1.96 * float(sd[part])
        low, high, kind = (
            value - margin,
            value + margin,
            {"half": "half-sampling"}.get(str(metric.interval), "bootstrap"),
        )
    score = Score(value, low, high, kind, better, own, m, work.extractor)
    return _placed(score, metric, work, X, Y)


def _placed(score: Score, metric: Metric, work: Work, X: Tensor, Y: Tensor | None) -> Score:
    """With what the value is to be held against: floor, null value, or the test set's."""
    if metric.floor is not None:
        reference = work.stats
        floor = (
            fd_floor_of_stats(X, reference) if reference else metric.floor(X, Y, work.seed) if Y is not None else None
        )
        if floor is not None and floor["plug_in"] is not None:
            excess: result.Floor = {end: None if at is None else score.value - at for end, at in floor.items()}
            upper = floor["plug_in"] if floor["split"] is None else floor["split"]
            lowest = score.value if score.low is None else score.low
            return replace(score, floor=floor, excess=excess, distinguishable=lowest > upper)
    if metric.null is not None and score.low is not None and score.high is not None:
        return replace(score, distinguishable=not score.low <= metric.null <= score.high)
    if metric.needs[:2] == ("x", "train") and "test" not in metric.needs and "test" in work.others:
        rest = [work.inputs("generated")[need] for need in metric.needs[2:]]
        return replace(score, baseline=float(metric.function(work.others["test"].x, work.others["train"].x, *rest)))
    return score


def bound(metric: Metric, work: Work, key: str) -> tuple[Callable[..., Any], Tensor, Tensor | None, int | None]:
    """(fn, X, Y, m): fn(X), or fn(X, Y), is the metric of one generated set; what isn't resampled is bound in fn."""
    inputs = work.inputs(key)
    X = inputs[metric.needs[0]]
    if work.stats is not None and "y" in metric.needs and metric.stats is not None:
        return metric.stats(work.stats), X, None, work.stats.n
    second = len(metric.needs) > 1 and metric.needs[1] in ("y", "train")
    rest = [inputs[need] for need in metric.needs[2 if second else 1 :]]
    Y = inputs[metric.needs[1]] if second else None

    @wraps(metric.function)
    def fn(*sets: Tensor) -> Any:
        return metric.function(*sets, *rest)

    return fn, X, Y, None if Y is None else len(Y)


def resampled_sd(
    metric: Metric, fn: Callable[..., Any], X: Tensor, Y: Tensor | None, samples: int, seed: int,
    clusters: Sequence[Hashable] | None, k: int,
) -> Tensor | None:  # fmt: skip
    """Standard deviation of each part of fn under resampling, [parts]; None where it isn't to be had."""
    found: list[Tensor] = []

    @wraps(fn)
    def collected(*sets: Tensor) -> float:
        found.append(torch.tensor(fn(*sets), dtype=torch.float64).flatten())
        return 0.0

    if metric.interval == "bootstrap":
        functional.bootstrap_sd(collected, X, Y, samples, seed, clusters)
        return torch.stack(found).std(dim=0)
    if metric.interval != "half":
        return None
    least = k + 1 if metric.least == "k+1" else int(metric.least)
    scale = half_samples(collected, X, Y, samples, seed, clusters, least)
    return None if scale is None else scale * torch.stack(found).std(dim=0)


def half_samples(
    fn: Callable[..., Any], X: Tensor, Y: Tensor | None, samples: int, seed: int, clusters: Sequence[Hashable] | None,
    least: int,
) -> float | None:  # fmt: skip
    """Calls fn on random subsets without replacement: a share f of the rows (or clusters) of each set, half if they are few.

    Their standard deviation times the returned sqrt(f/(1-f)) estimates that of fn on whole sets: a share f drawn from n has
    variance s^2/(fn) (1-f). No row comes twice, so nearest neighbours stay what they are. None when a subset has < least rows
    or fn fails on one.
    """
    sets = [X] if Y is None else [X, Y]
    share = min(0.5, HALF_ROWS / max(map(len, sets)))
    members = functional.uncertainty._members(clusters, len(X))
    counts = [max(1, int(share * len(A))) for A in sets]
    if min(counts) < least:
        return None
    generator = torch.Generator().manual_seed(seed)

    def drawn(n: int, count: int, groups: list[Tensor] | None) -> Tensor:
        if groups is None:
            return torch.randperm(n, generator=generator)[:count]
        chosen = torch.randperm(len(groups), generator=generator)[: max(1, int(share * len(groups)))]
        return torch.cat([groups[i] for i in chosen.tolist()])

    try:
        for _ in range(samples):
            rows = [drawn(len(A), count, members if A is X else None) for A, count in zip(sets, counts)]
            fn(*(A[chosen] for A, chosen in zip(sets, rows)))
    except ValueError:
        return None
    return math.sqrt(share / (1 - share))


def _interval_of_mean(values: Tensor, binary: bool) -> tuple[float | None, float | None, str | None]:
    if binary:
        return *functional.wilson(int(values.sum()), len(values)), "wilson"
    if len(values) < 2:
        return None, None, None
    mean, margin = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))
    return mean - margin, mean + margin, "standard error"


# ---- what a reader must know beside the numbers


def remarks(work: Work) -> tuple[list[str], list[str]]:
    """(warnings, notes) about the sets."""
    sets = work.generated | work.others
    found = [f"{key}: {text}" for key, images in sets.items() for text in images.warnings]
    notes = []
    for key, images in sets.items():
        if images.notes["duplicates"]:
            notes.append(f"{images.notes['duplicates']} of {len(images)} {key} images equal an earlier one")
        if images.notes["skipped"]:
            notes.append(f"{len(images.notes['skipped'])} {key} images were unreadable and skipped")
        if images.x is not None and len(images) > 1 and (zeros := functional.zero_rows(images.x)):
            notes.append(f"{zeros} {key} images have features 0: cosine metrics count them as one kind of their own")
    for key, images in work.generated.items():
        for other, theirs in work.others.items():
            shared = len(set(images.hashes) & set(theirs.hashes))
            if sorted(images.hashes) == sorted(theirs.hashes):
                notes.append(f"{key} and {other} are the same images")
            elif shared:
                notes.append(f"{shared} different {key} images are identical to images of {other}")
        if "reference" in work.others and (text := format_warning(images.source, work.others["reference"].source)):
            found.append(text)
    return list(dict.fromkeys(found)), notes


def verdicts(scores: dict[str, Score]) -> list[str]:
    texts = []
    for name, score in scores.items():
        if score.distinguishable is False:
            why = f"its floor is {result.bracket_text(score.floor)}" if score.floor else "its interval contains 0"
            texts.append(f"{name} {score.value:.4g}: not distinguishable from the reference ({why})")
    return texts


def _rank_warnings(scores: dict[str, Score], work: Work) -> list[str]:
    names = [name for name, score in scores.items() if score.floor is not None]
    own = work.generated["generated"]
    if not names or own.x is None:
        return []
    reference = work.others.get("reference")
    m = len(reference) if reference is not None else work.stats.n if work.stats else None
    n, d = len(own), own.x.shape[1]
    if m is None or min(n, m) > d:
        return []
    counts = f"n={n}, m={m}, d={d}"
    return [f"{', '.join(names)}: {counts}: too few images (<= d) for a full-rank covariance: biased, see noise floor"]


def _facts(images: ImageSet) -> dict[str, Any]:
    wanted = ("kind", "counts", "sizes", "formats", "skipped", "duplicates", "cached")
    return {key: images.notes[key] for key in wanted if key in images.notes}
