"""How far a value would move with other samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from diffgen.eval.functional._check import features, whole


def bootstrap_sd(
    fn: Callable[..., float],
    X: Tensor,
    Y: Tensor | None = None,
    samples: int = 50,
    seed: int = 0,
    clusters: Sequence[Hashable] | Tensor | None = None,
) -> float:
    """Standard deviation of fn(X, Y), or fn(X), when rows are drawn anew with replacement (X and Y independently).

    clusters: one label a row of X, such as its prompt: whole clusters are drawn, because images of one prompt are alike.

    Report estimate +- 1.96 sd. Don't take percentiles of the resampled values: resampling adds the bias of FD and Vendi
    once more, so such an interval may not even contain the estimate. For FD near its floor the sd is conservative.
    Raises ValueError for samples < 2, and for fewer than 2 clusters.
    """
    whole("samples", samples, 2)
    X = features(X, "X")
    sets = [X] if Y is None else [X, features(Y, "Y")]
    generator = torch.Generator().manual_seed(seed)
    members = _members(clusters, len(X))

    def resample() -> list[Tensor]:
        rows = [_draw(len(X), members, generator), *(_draw(len(A), None, generator) for A in sets[1:])]
        return [A[chosen.to(A.device)] for A, chosen in zip(sets, rows)]

    return _sd(lambda: fn(*resample()), samples, f"bootstrap {getattr(fn, '__name__', 'metric')}")


def paired_bootstrap_difference(
    fn: Callable[..., float],
    XA: Tensor,
    XB: Tensor,
    Y: Tensor | None = None,
    samples: int = 50,
    seed: int = 0,
    clusters: Sequence[Hashable] | Tensor | None = None,
) -> tuple[float, float]:
    """(fn(XA, Y) - fn(XB, Y), its bootstrap sd), without Y for metrics of one set.

    XA and XB [N,D] are two generators' answers to the same prompts and seeds, row by row: both are resampled by the same
    indices and meet the same resampled Y, so what they share cancels. clusters: as in `bootstrap_sd`.

    Not distinguishable when |difference| < 1.96 sd. Raises ValueError when XA and XB differ in length.
    """
    whole("samples", samples, 2)
    XA, XB = features(XA, "XA"), features(XB, "XB")
    if len(XA) != len(XB):
        raise ValueError(f"XA and XB must be paired row by row; got {len(XA)} and {len(XB)} rows")
    Y = None if Y is None else features(Y, "Y")
    generator = torch.Generator().manual_seed(seed)
    members = _members(clusters, len(XA))

    def difference(rows: Tensor | None, reference: Tensor | None) -> float:
        A, B = (X if rows is None else X[rows.to(X.device)] for X in (XA, XB))
        return fn(A) - fn(B) if reference is None else fn(A, reference) - fn(B, reference)

    def resampled() -> float:
        rows = _draw(len(XA), members, generator)
        return difference(rows, None if Y is None else Y[_draw(len(Y), None, generator).to(Y.device)])

    return difference(None, Y), _sd(resampled, samples, f"bootstrap {getattr(fn, '__name__', 'metric')}")


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval (low, high) of a proportion, sensible also at 0 and n successes (Wilson 1927).

    centre = (p + z^2/2n) / (1 + z^2/n);  half = z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n);  p = successes/n
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need n >= 1 and 0 <= successes <= n; got successes={successes}, n={n}")
    p = successes / n
    scale = 1 + z**2 / n
    centre = (p + z**2 / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def _members(clusters: Sequence[Hashable] | Tensor | None, n: int) -> list[Tensor] | None:
    """Row numbers of each cluster, in order of first appearance."""
    if clusters is None:
        return None
    labels = clusters.tolist() if isinstance(clusters, Tensor) else list(clusters)
    if len(labels) != n:
        raise ValueError(f"clusters must be one label a row; got {len(labels)} labels and {n} rows")
    rows: dict[Hashable, list[int]] = {}
    for i, label in enumerate(labels):
        rows.setdefault(label, []).append(i)
    if len(rows) < 2:
        raise ValueError(f"clusters must have at least 2 different labels; got {len(rows)}")
    return [torch.tensor(members) for members in rows.values()]


def _draw(n: int, members: list[Tensor] | None, generator: torch.Generator) -> Tensor:
    """Row numbers of one resample: n rows, or as many clusters as there are, with replacement."""
    if members is None:
        return torch.randint(n, (n,), generator=generator)
    return torch.cat([members[i] for i in torch.randint(len(members), (len(members),), generator=generator).tolist()])


def _sd(value: Callable[[], float], samples: int, title: str) -> float:
    rounds = tqdm(range(samples), desc=title, delay=2, leave=False)
    return float(torch.tensor([value() for _ in rounds], dtype=torch.float64).std())
