"""METRICS: what `evaluate` and `compare` can measure. A new metric is one row.

Legend: x, y features of the generated and the reference images [N,D], [M,D]; train, test those of the training and of a
held-out set; logits [N,C]; groups one label an image; images uint8 [N,3,H,W].
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffgen.eval import functional
from diffgen.eval.features import Stats
from diffgen.eval.functional import frechet

Verifier = Callable[[Tensor, list[str]], Any]
Floor = dict[str, "float | None"]  # plug_in: usually too low; split: usually too high, None when it can't be had


@dataclass(frozen=True)
class Metric:
    """One row of METRICS. `function` takes what `needs` names and gives a float, one value an image or a group [N], or,
    with `part`, a named tuple that several rows share.

    needs:    of NEEDS. The rows of the first set of features are what intervals resample, together with the second's.
    floor:    (x, y, seed) -> the bracket of values that two samples of one distribution would give.
    stats:    the same function for a reference of which there is only mean and covariance: Stats -> (x -> float).
    interval: "bootstrap" (rows drawn with replacement); "half" (halves drawn without: for what copies of a row would spoil,
              such as nearest neighbours); None where resampling costs too much. Values an image have a standard error.
    least:    images that each set must have; "k+1" for metrics of k-th neighbours.
    null:     the value that two samples of one distribution have on average.
    """

    function: Callable[..., Any]
    needs: tuple[str, ...]
    higher_is_better: bool | None  # None: neither; compare with the reference
    summary: str
    paper: str = ""  # arXiv id
    floor: Callable[[Tensor, Tensor, int], Floor] | None = None
    stats: Callable[[Stats], Callable[[Tensor], float]] | None = None
    interval: str | None = "bootstrap"
    least: int | str = 2
    null: float | None = None
    part: str | None = None


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


def fd_floor_of_stats(X: Tensor, reference: Stats) -> Floor | None:
    """The lower end alone; None when the file doesn't say of how many images its statistics are."""
    if reference.n is None:
        return None
    eigenvalues = torch.linalg.eigvalsh(reference.sigma).clamp(min=0)
    return {"plug_in": functional.fd_floor(eigenvalues, len(X), reference.n), "split": None}


def fd_to_stats(reference: Stats) -> Callable[[Tensor], float]:
    """`functional.fd_from_stats` of the rows X: the reference is factored once, X's covariance isn't formed for few rows."""
    factor = frechet._cholesky(reference.sigma, "sigma")

    def fd(X: Tensor) -> float:
        return frechet._fd_from_factors(*frechet._moments(X), reference.mu, factor)

    return fd


def prdc(x: Tensor, y: Tensor, k: int) -> functional.PRDC:
    return functional.prdc(x, y, k=k)


def inception_score(logits: Tensor) -> float:
    return functional.inception_score(logits)[0]


def vendi2(x: Tensor) -> float:
    return functional.vendi(x, q=2)


def intra_prompt(x: Tensor, groups: Sequence[Hashable]) -> Tensor:
    """`functional.intra_prompt` of each prompt with at least two images: [G]."""
    functional.intra_prompt(x, groups)  # checks
    rows: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        rows.setdefault(group, []).append(i)
    values = [functional.mean_pairwise(x[members]) for members in rows.values() if len(members) > 1]
    return torch.tensor(values, dtype=torch.float64)


def fd_infinity(x: Tensor, y: Tensor, seed: int) -> float:
    return functional.fd_infinity(x, y, seed=seed)


def ct_score(x: Tensor, train: Tensor, test: Tensor, seed: int) -> float:
    return functional.ct_score(x, train, test, seed=seed)


def nn_ratio(x: Tensor, train: Tensor) -> float:
    return functional.nn_audit(x, train, k=min(50, len(train))).ratio


XY, TRAIN, IMAGES = ("x", "y"), ("x", "train"), ("images",)
_prdc = partial(Metric, prdc, ("x", "y", "k"), True, interval="half", least="k+1")

METRICS: dict[str, Metric] = {
    "fd": Metric(functional.fd, XY, False, "Fréchet distance", "1706.08500", fd_floor_bracket, fd_to_stats),
    "kid": Metric(
        functional.kid, XY, False, "kernel distance, unbiased: may be below 0", "1801.01401", interval="half", null=0
    ),
    "cmmd": Metric(functional.cmmd, XY, False, "CMMD's distance; its paper's features: clip-vitl14-336", "2401.09603"),
    "fd_infinity": Metric(
        fd_infinity, (*XY, "seed"), False, "FD extrapolated to infinitely many images", "1911.07023", interval=None
    ),
    "precision": _prdc("share of images near the reference", "1904.06991", part="precision"),
    "recall": _prdc("share of the reference near the images", "1904.06991", part="recall"),
    "density": _prdc("how densely the reference surrounds the images", "2002.09797", part="density"),
    "coverage": _prdc("share of the reference with an image in its neighbourhood", "2002.09797", part="coverage"),
    "is": Metric(inception_score, ("logits",), True, "inception score, on the extractor's classes", "1606.03498", least=10),
    "pairwise": Metric(functional.mean_pairwise, ("x",), True, "mean pairwise cosine distance", "2512.24138"),
    "vendi": Metric(functional.vendi, ("x",), True, "effective number of different images", "2210.02410"),
    "vendi2": Metric(vendi2, ("x",), True, "the same of order 2: common kinds weigh more", "2310.12952"),
    "intra_prompt": Metric(intra_prompt, ("x", "groups"), True, "mean pairwise cosine distance inside a prompt"),
    "authpct": Metric(
        functional.authpct, TRAIN, True, "% farther from train than train is from itself", "2102.08921",
        interval="half",
    ),
    "ct": Metric(
        ct_score, (*TRAIN, "test", "seed"), None, "z of distances to train: below 0 copying, above underfitting",
        "2004.05675", interval="half",
    ),
    "mifid": Metric(functional.mifid, TRAIN, False, "FD to train, enlarged by copying", "2106.03062", interval="half"),
    "nn_ratio": Metric(
        nn_ratio, TRAIN, True, "distance to the nearest training image / to the nearest 50", interval="half"
    ),
    "saturation": Metric(functional.saturation, IMAGES, None, "mean HSV saturation", least=1),
    "contrast": Metric(functional.contrast, IMAGES, None, "standard deviation of luma", least=1),
    "colourfulness": Metric(functional.colourfulness, IMAGES, None, "Hasler and Süsstrunk's, 0 to about 109", least=1),
    "clipping": Metric(functional.clipping, IMAGES, False, "share of channel values at 0 or 255", least=1),
    "verifier": Metric(
        verify, ("images", "prompts", "verifier"), True, "share of images that pass the verifier", least=1
    ),
}  # fmt: skip

SHORT = {"prdc": ("precision", "recall", "density", "coverage"), "fid": ("fd",)}
NEEDS = ("x", "y", "logits", "groups", "train", "test", "images", "prompts", "verifier", "k", "seed")
# need -> the argument of evaluate that may be absent
ARGUMENTS = {
    "y": "reference",
    **{n: n for n in ("prompts", "train", "test", "verifier")},
    "groups": "groups or prompts",
}
SETS = {"x": "generated", "logits": "generated", "y": "reference", "train": "train", "test": "test"}


def checked_names(metrics: Sequence[str] | str, verifier: Verifier | None, scorers: bool = False) -> list[str]:
    """Metrics in the order asked for, shorthands written out; "all" is every row. Raises for an unknown name, or none."""
    if isinstance(metrics, str):
        if metrics != "all":
            hint = f"did you mean [{metrics!r}]?"
            raise TypeError(f"metrics must be a sequence of names, or 'all'; got the string {metrics!r}, {hint}")
        metrics = list(METRICS)
    asked = [name for m in metrics for name in SHORT.get(m, (m,))]
    names = list(dict.fromkeys([*asked, *(["verifier"] if verifier is not None else [])]))
    if not names and not scorers:
        raise ValueError(f"metrics must name at least one of {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            nearest = get_close_matches(str(name), [*METRICS, *SHORT], n=1, cutoff=0)[0]
            raise ValueError(f"unknown metric {name!r}; nearest is {nearest!r} of {', '.join(METRICS)}")
    return names


def missing(metric: Metric, given: dict[str, Any]) -> list[str]:
    """The arguments of evaluate that the metric lacks. given: need -> value, None when absent; "y" may be Stats."""
    found = [ARGUMENTS[need] for need in metric.needs if need in ARGUMENTS and given[need] is None]
    if "y" in metric.needs and isinstance(given["y"], Stats) and metric.stats is None:
        found.append("the reference's images (features), not their statistics")
    return found


def check_inputs(names: list[str], given: dict[str, Any], skip: bool) -> dict[str, str]:
    """{metric: why it is left out}, empty unless skip: then what lacks something is an error."""
    reasons = {}
    for name in names:
        if lacks := missing(METRICS[name], given):
            reasons[name] = f"needs {' and '.join(lacks)}"
            if not skip:
                possible = [other for other, metric in METRICS.items() if not missing(metric, given)]
                raise ValueError(f"metric {name!r} {reasons[name]}; without, there are {', '.join(possible)}")
    return reasons


def too_few(metric: Metric, sizes: dict[str, int], k: int) -> str:
    """Why the sets are too small for the metric, or "". sizes: need -> images."""
    least = k + 1 if metric.least == "k+1" else metric.least
    for need in metric.needs:
        if need in sizes and sizes[need] < int(least):
            why = f" with k={k}" if "k" in metric.needs else ""
            return f"needs at least {least} images{why}; {SETS[need]} has {sizes[need]}"
    return ""
