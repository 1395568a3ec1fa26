"""The HTML pages of `EvalResult` and `Comparison`: what the numbers say, and the pictures to judge them by."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffgen.eval import functional
from diffgen.eval.passes import ImageSet, thumbnail
from diffgen.eval.report import MARKERS, Figure, Section, legend_below, picture, plot, write_report
from diffgen.grid import grid

SAMPLES, EXTREMES, PAIRS, POINTS = 24, 8, 8, 1500
ORDER = ("reference", "train", "test", "generated", "a", "b")


def result_page(result: Any, path: str | Path) -> Path:
    own = result.sets.get("generated")
    sections: list[Any] = [_numbers(result, "Metrics", RESULT_NOTE)]
    if own is not None:
        sections += [
            _samples(result.sets),
            *_extremes(own, result),
            *_memorisation(result.sets),
            *_features(result.sets),
        ]
        sections.append(_sources(result.sources))
    n = f"{len(own)} images" if own is not None else "Images"
    source = f" of {own.source.origin}" if own is not None else ""
    lead = "; ".join(text for text in result.notes if "not distinguishable" in text)
    return write_report(path, "Evaluation", [s for s in sections if s], f"{n}{source}. {lead}".strip())


def comparison_page(comparison: Any, path: str | Path) -> Path:
    told = [f"{name}: {d.better.upper()} is better" for name, d in comparison.differences.items() if d.better]
    same = [name for name, d in comparison.differences.items() if d.distinguishable is False]
    said = [*told, *([f"not distinguishable: {', '.join(same)}"] if same else [])]
    lead = f"A: {comparison.labels[0]}, B: {comparison.labels[1]}. {'; '.join(said)}."
    sections = [_numbers(comparison, "A − B", COMPARISON_NOTE), _samples(comparison.sets), *_features(comparison.sets)]
    return write_report(path, "Comparison", [s for s in sections if s], lead)


RESULT_NOTE = (
    "↑ higher is better, ↓ lower is better. ± is 1.96 standard deviations of resampled images (of the mean for values of "
    "single images); [low, high] of the verifier is Wilson's interval. The noise floor is where the distance of two samples of "
    "one distribution would lie at these n and m: between its plug-in estimate, usually too low, and the mean over random "
    "halves of the reference, usually too high. Excess is the value minus either. Compare values only at equal n, m and "
    "features."
)
COMPARISON_NOTE = (
    "Paired: A and B are resampled by the same rows and meet the same resampled reference. A metric whose 95% interval "
    "contains 0 can't tell them apart."
)


def _numbers(result: Any, heading: str, note: str) -> Section:
    remarks = result.remarks()
    return Section(heading, table=result.rows(), commands="\n".join(remarks), note=note)


def _tiles(images: ImageSet, rows: Iterable[int]) -> Tensor | None:
    """Pictures of some images, padded to one size: [n,3,h,w]."""
    found = [p if max(p.shape[1:]) <= 128 else thumbnail(p) for i in rows if (p := images.picture(i)) is not None]
    if not found:
        return None
    h, w = (max(p.shape[axis] for p in found) for axis in (1, 2))
    tiles = torch.full((len(found), 3, h, w), 255, dtype=torch.uint8)
    for tile, p in zip(tiles, found):
        tile[:, : p.shape[1], : p.shape[2]] = p
    return tiles


def _figure(images: ImageSet, rows: Iterable[int], caption: str, columns: int = 8) -> list[Figure]:
    tiles = _tiles(images, rows)
    if tiles is None:
        return []
    drawn = grid(tiles, columns=min(columns, len(tiles)), scale=max(1, 64 // max(tiles.shape[2:])))
    return [picture(drawn, caption)]


def _spaced(n: int, count: int) -> list[int]:
    """Up to count of n row numbers, evenly spaced: the sources' order is no reason to show the first ones only."""
    return sorted({i * n // min(n, count) for i in range(min(n, count))})


def _samples(sets: dict[str, ImageSet]) -> Section | None:
    figures: list[Figure] = []
    paired = {"a", "b"} <= set(sets)
    for key in [key for key in ("generated", "a", "b", "reference") if key in sets]:
        images = sets[key]
        what = {"generated": "generated", "a": "A", "b": "B", "reference": "reference"}[key]
        caption = f"{what}: {min(SAMPLES, len(images))} of {len(images)}, evenly spaced"
        figures += _figure(images, _spaced(len(images), SAMPLES), caption)
    text = "The same rows of A and B, in the same places." if paired else ""
    return Section("Samples", text, figures=figures) if figures else None


def _extremes(own: ImageSet, result: Any) -> list[Section]:
    """Best and worst images of each scorer and of the verifier."""
    figures = []
    judged = {**result.judged, **({"verifier": True} if "verifier" in own.values else {})}
    for name, better in judged.items():
        values = own.values.get(name)
        if values is None:
            continue
        order = [i for i in values.argsort(stable=True, descending=True).tolist() if not math.isnan(float(values[i]))]
        high, low = order[:EXTREMES], order[::-1][: min(EXTREMES, len(order) // 2)]
        words = {True: ("best", "worst"), False: ("worst", "best"), None: ("highest", "lowest")}[better]
        for word, rows in zip(words, (high, low)):
            if rows:
                ends = f"{float(values[rows[0]]):.3g} to {float(values[rows[-1]]):.3g}"
                figures += _figure(own, rows, f"{name}, {word}: {ends}")
    return [Section("Best and worst", figures=figures)] if figures else []


def _memorisation(sets: dict[str, ImageSet]) -> list[Section]:
    """The generated images that come closest to training images, beside them; distances against the test set's."""
    own, train, test = (sets.get(key) for key in ("generated", "train", "test"))
    if own is None or train is None or own.x is None or train.x is None:
        return []
    distance, nearest = functional.nearest(own.x, train.x)
    closest = distance[:, 0].argsort()[:PAIRS].tolist()
    ends = f"distances {float(distance[closest[0], 0]):.3g} to {float(distance[closest[-1], 0]):.3g}"
    figures = _figure(own, closest, f"generated: the {len(closest)} closest to a training image, {ends}")
    figures += _figure(train, [int(nearest[i, 0]) for i in closest], "the training image of each, in the same place")

    def histogram(axes: Any) -> None:
        columns = {"generated": distance[:, 0]}
        if test is not None and test.x is not None and train.x is not None:
            columns["test"] = functional.nearest(test.x, train.x)[0][:, 0]
        edges = torch.linspace(0, max(float(c.max()) for c in columns.values()) or 1.0, 31).tolist()
        for label, column in columns.items():
            weights = [1 / len(column)] * len(column)
            axes.hist(column.tolist(), bins=edges, weights=weights, histtype="step", linewidth=1.8, label=label)
        axes.set(xlabel="distance to the nearest training image", ylabel="share of images")
        legend_below(axes)

    figures.append(plot(histogram, "Copies stand at the left; how near fresh images come, the test set tells."))
    return [Section("Nearest training images", figures=figures)]


def _features(sets: dict[str, ImageSet]) -> list[Section]:
    """All sets on the first two principal components of their features."""
    shown: dict[str, Tensor] = {}
    for key in ORDER:
        if key in sets and (x := sets[key].x) is not None:
            shown[key] = x[_spaced(len(x), POINTS)].double()
    rows = torch.cat(list(shown.values())) if shown else torch.empty(0, 0)
    if len(rows) < 3 or rows.shape[1] < 2:
        return []
    centre = rows.mean(0)
    _, singular, axes_DD = torch.linalg.svd(rows - centre, full_matrices=False)
    share = singular[:2].square() / singular.square().sum().clamp(min=1e-30)

    def scatter(axes: Any) -> None:
        for i, (key, x) in enumerate(shown.items()):
            at = ((x - centre) @ axes_DD[:2].T).T.tolist()
            label = key.upper() if key in ("a", "b") else key
            axes.scatter(*at, s=14, alpha=0.6, linewidths=0, marker=MARKERS[i % len(MARKERS)], label=label)
        axes.set(xlabel=f"component 1 ({share[0]:.0%} of the variance)", ylabel=f"component 2 ({share[1]:.0%})")
        legend_below(axes)

    caption = "Features of every set on their common first two principal components."
    return [Section("Features", figures=[plot(scatter, caption, (6.4, 4.6))])]


def _sources(sources: dict[str, dict[str, Any]]) -> Section:
    rows = [["images", "n", "kind", "formats", "sizes", "duplicates", "from the cache", "what was met"]]
    for key, facts in sources.items():
        texts = [
            ", ".join(f"{k} {v}" for k, v in list(facts.get(f, {}).items())[:4]) for f in ("formats", "sizes", "counts")
        ]
        numbers = [str(facts.get(f, "")) for f in ("duplicates", "cached")]
        rows.append([key, str(facts["n"] or "?"), facts["kind"], texts[0], texts[1], *numbers, texts[2]])
    return Section("Sources", table=rows)
