"""Whether the measures of `diffgen.eval` say what they should, on sets of "shapes" that are spoilt in known ways."""

from __future__ import annotations

import functools
import itertools
import statistics
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffgen.claims import Check, Claim

N, M = 400, 1200  # images of a set, of the reference
EXTRACTORS = ("efficientnet-lite0", "random-conv/seed0", "pixels/16")
NOISE, KINDS, DIFFERENT, SIZES = (0, 10, 20, 40, 80), (4, 3, 2, 1), (400, 200, 100, 40), (50, 100, 200, 400)
PAIRS = 16  # of disjoint sets of each size, drawn at random from all images of the world


def _images(n: int, seed: int, kinds: list[str] | None = None) -> Tensor:
    """n images, uint8 [n,3,32,32]; kinds: whose objects all have one of these shapes. Families keep their shares."""
    from diffgen.worlds import shapes

    rng = np.random.default_rng(seed)
    able = {
        family: [
            s for s in shapes.scenes("all", family) if {shape for _, shape in s.objects} <= {*(kinds or shapes.SHAPES)}
        ]
        for family in shapes.FAMILIES
    }
    families = rng.choice(list(able), size=n, p=list(shapes.FAMILIES.values()))
    drawn = [able[family][rng.integers(len(able[family]))] for family in families]
    return torch.from_numpy(np.stack([shapes.render(scene, rng) for scene in drawn]))


@functools.cache
def _sets(seed: int) -> dict[str, Tensor]:
    """ "reference" and "fresh" images of the world (M each), and N images under each noise and with each kind missing."""
    from diffgen.worlds import shapes

    draw, order = itertools.count(10_000 * (seed + 1)), list(shapes.SHAPES)
    order = order[seed % 4 :] + order[: seed % 4]  # which kinds go first
    sets = {"reference": _images(M, next(draw)), "fresh": _images(M, next(draw))}
    pattern = 2 * torch.rand(N, *sets["fresh"].shape[1:], generator=torch.Generator().manual_seed(seed)) - 1
    for level in NOISE[1:]:
        sets[f"noise {level}"] = (sets["fresh"][:N] + level * pattern).round().clamp(0, 255).to(torch.uint8)
    for kept in KINDS[1:]:
        sets[f"kinds {kept}"] = _images(N, next(draw), order[:kept])
    return sets


@functools.cache
def _features(seed: int, extractor: str) -> dict[str, Tensor]:
    """Of all sets, and of the settings made from them: {setting: [N,D]}."""
    from diffgen.eval.extractors import get_extractor

    extract = get_extractor(extractor)
    found = {name: extract(images, progress=False) for name, images in _sets(seed).items()}
    fresh = found["fresh"][:N]
    found |= {f"different {n}": fresh[:n].repeat(N // n, 1) for n in DIFFERENT}
    return found | {"noise 0": fresh, "kinds 4": fresh}


def _measure(X: Tensor, Y: Tensor) -> dict[str, float]:
    from diffgen.eval import functional

    found = functional.prdc(X, Y)
    return {
        "fd": functional.fd(X, Y),
        "kid": 1000 * functional.kid(X, Y),
        "precision": found.precision,
        "recall": found.recall,
        "coverage": found.coverage,
        "vendi": functional.vendi(X),
    }


def _bracket(Y: Tensor, n: int) -> dict[str, float]:
    from diffgen.eval import functional

    low = functional.fd_floor(functional.spectrum(Y), n, len(Y))
    return {"floor low": low, "floor high": functional.fd_floor_split(Y, n, splits=3)}


def _sizes(images: Tensor, seed: int) -> list[dict[str, float]]:
    """Means over random pairs of disjoint sets of the same distribution, n images on both sides; KID's standard deviation."""
    from diffgen.eval import functional

    generator, rows = torch.Generator().manual_seed(seed), []
    for n in SIZES:
        orders = [torch.randperm(len(images), generator=generator) for _ in range(PAIRS)]
        both = [(images[order[:n]], images[order[n : 2 * n]]) for order in orders]
        found = [_measure(X, Y) | _bracket(Y, n) for X, Y in both]
        row = {"x": n} | {key: statistics.mean(f[key] for f in found) for key in found[0]}
        row["kid sd"] = statistics.stdev(f["kid"] for f in found)
        if n == N:
            ends = [functional.fd_infinity(X, Y, (n // 4, n // 2, n), subset_reference=True) for X, Y in both]
            row["fd infinity"] = statistics.mean(ends)
        rows.append(row)
    return rows


def _least(curve: list[dict[str, Any]], measure: str) -> tuple[float, float]:
    """(before, after) of the smallest step upwards between neighbours."""
    values = [point[measure] for point in curve]
    return min(itertools.pairwise(values), key=lambda pair: pair[1] - pair[0])


def _ends(curve: list[dict[str, Any]], measure: str) -> tuple[float, float]:
    return curve[0][measure], curve[-1][measure]


def _sanity(seed: int) -> dict[str, Any]:
    from scipy.stats import spearmanr

    from diffgen.eval import functional

    features = {extractor: _features(seed, extractor) for extractor in EXTRACTORS}
    own = features[EXTRACTORS[0]]

    def point(name: str, x: int) -> dict[str, float]:
        others = {f"fd {e}": functional.fd(features[e][name], features[e]["reference"]) for e in EXTRACTORS[1:]}
        return {"x": x} | _measure(own[name], own["reference"]) | others

    levels = {"noise": NOISE, "kinds": KINDS, "different": DIFFERENT}
    curves = {name: [point(f"{name} {x}", x) for x in xs] for name, xs in levels.items()}
    noise, kinds, different = curves.values()
    sizes = _sizes(torch.cat([own["fresh"], own["reference"]]), seed)
    slope = float(np.polyfit(np.log(SIZES), np.log([row["fd"] for row in sizes]), 1)[0])
    settings = noise + kinds[1:] + different[1:]

    def agreement(points: list[dict[str, float]], extractor: str) -> float:
        return float(spearmanr([p["fd"] for p in points], [p[f"fd {extractor}"] for p in points]).statistic)

    pairs = {
        "noise: fd": _least(noise, "fd"),
        "noise: kid": _least(noise, "kid"),
        "noise: fd to 40": _least(noise[:-1], "fd"),
        "noise: kid to 40": _least(noise[:-1], "kid"),
        **{f"noise: {m}": _ends(noise, m) for m in ("precision", "recall", "vendi")},
        "kinds: fd": _least(kinds, "fd"),
        **{f"kinds: {m}": _ends(kinds, m) for m in ("recall", "coverage")},
        "kinds: vendi": (1.0, kinds[-1]["vendi"] / kinds[0]["vendi"]),
        "different: fd": _least(different, "fd"),
        "different: vendi": (1.0, different[-1]["vendi"] / different[0]["vendi"]),
        "different: precision": (0.0, max(abs(p["precision"] - different[0]["precision"]) for p in different)),
        "sizes: slope": (0.0, abs(slope + 1)),
        "sizes: kid": (0.0, max(abs(row["kid"]) / row["kid sd"] for row in sizes)),
        "sizes: low": (1.0, min(row["fd"] / row["floor low"] for row in sizes)),
        "sizes: high": (1.0, max(row["fd"] / row["floor high"] for row in sizes)),
        "sizes: infinity": (1.0, abs(sizes[-1]["fd infinity"]) / sizes[-1]["fd"]),
        "second: order": (0.0, min(agreement(c, e) for c in curves.values() for e in EXTRACTORS[1:])),
    } | {f"second: {e}": (0.0, agreement(settings, e)) for e in EXTRACTORS[1:]}
    details = {k: [{m: round(v, 4) for m, v in p.items()} for p in c] for k, c in (curves | {"sizes": sizes}).items()}
    floor = {k: round(v, 4) for k, v in _bracket(own["reference"], N).items()}
    return pairs | {"details": {"curves": details, "floor": floor, "slope": round(slope, 4)}}


STEP = "smallest step between neighbours"
SPEARMAN = "Spearman's rank correlation"
CLAIMS: dict[str, Claim] = {
    "evaluation.sanity": Claim(
        "The measures see noise, missing modes and copies, and FD's bias at small N is where its noise floor says",
        f"{N} images a set, {M:,} true images as reference, EfficientNet-Lite0 features, one core, 4 minutes a seed",
        _sanity,
        {
            "noise: fd": Check("FD rises with pixel noise of 0, 10, 20, 40, 80", f"FD, {STEP}", 1e-6),
            "noise: kid": Check("KID rises with it", f"1000 KID, {STEP}", 1e-6),
            "noise: fd to 40": Check("FD, noise 0 to 40", f"FD, {STEP}", report=True),
            "noise: kid to 40": Check("KID, noise 0 to 40", f"1000 KID, {STEP}", report=True),
            "noise: precision": Check("precision falls by at least 0.3, noise 0 to 80", "precision", 0.3, "lower"),
            "noise: recall": Check("recall, noise 0 to 80", "recall", report=True),
            "noise: vendi": Check("Vendi, noise 0 to 80", "Vendi score", report=True),
            "kinds: fd": Check("FD rises as shapes go missing: 4, 3, 2, 1 of them left", f"FD, {STEP}", 1e-6),
            "kinds: recall": Check("recall falls by at least 0.3, 4 to 1", "recall", 0.3, "lower"),
            "kinds: coverage": Check("coverage falls by at least 0.3, 4 to 1", "coverage", 0.3, "lower"),
            "kinds: vendi": Check("Vendi falls by at least a quarter, 4 to 1", "share of Vendi at 4", 0.25, "lower"),
            "different: fd": Check("FD rises with copies: 400, 200, 100, 40 different images", f"FD, {STEP}", 1e-6),
            "different: vendi": Check("Vendi falls by at least a quarter", "share of Vendi at 400", 0.25, "lower"),
            "different: precision": Check("precision stays within 0.1", "largest change of precision", -0.1, "lower"),
            "sizes: slope": Check(
                "FD falls with N like 1/N: exponent -1 within 0.25", "distance from -1", -0.25, "lower"
            ),
            "sizes: kid": Check(
                "KID has no bias: mean within 2 sd of 0 at every N", "|mean| / sd, worst N", -2.0, "lower"
            ),
            "sizes: low": Check("FD is above the noise floor's lower end at every N", "FD / lower end, least", 0.0),
            "sizes: high": Check("and below its upper end", "FD / upper end, most", 0.0, "lower"),
            "sizes: infinity": Check("|FD∞| is at most half of FD", "|FD∞| / FD at 400 images", 0.5, "lower"),
            "second: order": Check("each curve has the same order under other features", f"least {SPEARMAN}", 0.99),
        }
        | {
            f"second: {e}": Check(f"FD ranks all settings alike under {e}: 0.7 or more", SPEARMAN, 0.7)
            for e in EXTRACTORS[1:]
        },
    ),
}
