"""Distances between two sets by kernels (KID, CMMD) and by projections (MIND); the inception score."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffgen.eval.functional._check import (
    BLOCK,
    feature_pair,
    features,
    float64,
    mean,
    row_blocks,
    same_width,
    whole,
)
from diffgen.eval.functional._pairs import squared_distances, unit_rows

Blocks = Iterator[tuple[slice, slice, Tensor]]  # (rows of A, rows of B, their kernel values)


def kid(
    X: Tensor,
    Y: Tensor,
    subset_size: int | None = None,
    subsets: int = 100,
    seed: int = 2020,
    compat: str | None = None,
) -> float:
    """Kernel distance (KID): unbiased MMD^2 of X [N,D] and Y [M,D] under k(x,y) = (x.y/D + 1)^3.

    MMD^2 = mean_{i!=j} k(x_i,x_j) + mean_{i!=j} k(y_i,y_j) - 2 mean_ij k(x_i,y_j)

    subset_size None: over all pairs, deterministic, O((N+M)^2 D). Otherwise the mean of `kid_subsets`, the peers'
    estimator. Unbiased, so values a little below 0 are right. arXiv:1801.01401.
    """
    if subset_size is not None:
        return float(kid_subsets(X, Y, subset_size, subsets, seed, compat).mean())
    _check_compat(compat)
    X, Y = feature_pair(X, Y)
    return _cubic_mmd2(X, Y)


def kid_subsets(
    X: Tensor, Y: Tensor, subset_size: int = 1000, subsets: int = 100, seed: int = 2020, compat: str | None = None
) -> Tensor:
    """`kid` of random subsets: float64 [subsets]. Defaults 1000 and 100: torch-fidelity, torchmetrics.

    compat="torch-fidelity" draws with numpy's RandomState(seed), X before Y in each round, and gives its numbers.
    A subset_size above min(N,M) is reduced to it with a warning (both peers raise). Subsets overlap, so their standard
    deviation is no standard error of the mean: use `bootstrap_sd`. Raises ValueError for subset_size < 2.
    """
    _check_compat(compat)
    X, Y = feature_pair(X, Y)
    whole("subset_size", subset_size, 2)
    whole("subsets", subsets, 1)
    if subset_size > min(len(X), len(Y)):
        size = min(len(X), len(Y))
        text = f"KID subset_size={subset_size} exceeds the smaller set (N={len(X)}, M={len(Y)}); reduced to {size}"
        warnings.warn(text, stacklevel=2)
        subset_size = size
    state, generator = np.random.RandomState(seed), torch.Generator().manual_seed(seed)

    def draw(rows: Tensor) -> Tensor:
        if compat == "torch-fidelity":
            chosen = torch.from_numpy(state.choice(len(rows), subset_size, replace=False))
        else:
            chosen = torch.randperm(len(rows), generator=generator)[:subset_size]
        return rows[chosen.to(rows.device)]

    rounds = tqdm(range(subsets), desc="KID", delay=2, leave=False)
    return torch.tensor([_cubic_mmd2(draw(X), draw(Y)) for _ in rounds], dtype=torch.float64)


def cmmd(X: Tensor, Y: Tensor, sigma: float = 10.0, estimator: str = "v", normalize: bool = True) -> float:
    """CMMD: 1000 MMD^2 of X [N,D] and Y [M,D] under k(x,y) = exp(-|x - y|^2 / (2 sigma^2)).

    estimator:  "v" includes the pairs of a row with itself, so it is >= 0 and biased up by at most 10 (1/N + 1/M) on
                unit rows: that is what the paper's code computes. "u" leaves them out: unbiased, may be negative.
    normalize:  scale rows to unit length first (CLIP embeddings).

    Unit rows and sigma 10 make the kernel almost linear, so CMMD is about 10 |mean_x - mean_y|^2: it hardly sees the
    spread. All arithmetic is on k - 1, which cancels in MMD^2 and keeps its digits. Zero rows: one common direction.
    Raises ValueError for another estimator or sigma <= 0. arXiv:2401.09603.
    """
    if estimator not in ("v", "u"):
        raise ValueError(f"estimator must be 'v' or 'u'; got {estimator!r}")
    if not (0 < sigma < math.inf):
        raise ValueError(f"sigma must be positive and finite; got {sigma}")
    rows = 1 if estimator == "v" else 2
    X, Y = features(X, "X", rows), features(Y, "Y", rows)
    same_width(X=X, Y=Y)
    if normalize:
        X, Y = unit_rows(X, Y)
    centre = mean(Y)

    def gaussian(A: Tensor, B: Tensor, upper: bool) -> Blocks:
        for rows, columns, d2 in squared_distances(A, B, centre, upper=upper):
            yield rows, columns, torch.expm1(d2.clamp_(min=0) / (-2 * sigma**2))

    return 1000 * _mmd2(gaussian, X, Y, unbiased=estimator == "u")


def inception_score(logits: Tensor, splits: int = 10, shuffle: bool = True, seed: int = 2020) -> tuple[float, float]:
    """(mean, sd) over splits of exp(mean_x KL(p(y|x) || p(y))), p = softmax(logits [N,C]); from 1 to C.

    splits:   parts of the set, rows floor(iN/splits) onwards; the sd has divisor `splits`, so it is 0 for one split
              (torchmetrics divides by splits - 1 and gives NaN).
    shuffle:  permute the rows with numpy's RandomState(seed) before: torch-fidelity's default, and its numbers.

    p(y) is a mean in the log domain, so confident logits give no NaN. Raises ValueError for splits > N. arXiv:1606.03498.
    """
    logits = features(logits, "logits", whole("splits", splits, 1), f" for splits={splits}")
    n = len(logits)
    if shuffle:
        logits = logits[torch.from_numpy(np.random.RandomState(seed).permutation(n)).to(logits.device)]
    scores = []
    for i in range(splits):
        logp = float64(logits[i * n // splits : (i + 1) * n // splits]).log_softmax(1)
        marginal = torch.logsumexp(logp, 0) - math.log(len(logp))
        scores.append((logp.exp() * (logp - marginal)).sum(1).mean().exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))


def mind(X: Tensor, Y: Tensor, directions: int = 1000, seed: int = 2020) -> float:
    """MIND: 3 D times the mean, over random unit directions u, of W_2^2 between the projections X u [N] and Y u [M].

    For N = M, W_2^2 = mean_j (sort(X u)_j - sort(Y u)_j)^2; for N != M the exact distance of the step functions, where
    torch-fidelity drops rows. A pure shift c gives 3 |c|^2 on average. arXiv:2605.06797.
    """
    X, Y = feature_pair(X, Y)
    whole("directions", directions, 1)
    n, m, d = len(X), len(Y), X.shape[1]
    generator = torch.Generator().manual_seed(seed)
    # levels between which both quantile functions are constant, in units of 1/(n m)
    steps = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).unique()
    width, start = steps.diff().double() / (n * m), steps[:-1]
    x_rows, y_rows = start // m, start // n
    total = 0.0
    for count in [64] * (directions // 64) + [directions % 64] * (directions % 64 > 0):
        u = torch.nn.functional.normalize(torch.randn(d, count, generator=generator, dtype=torch.float64), dim=0)
        x, y = (torch.cat([block @ u.to(block.device) for block in row_blocks(A)]).cpu().sort(0)[0] for A in (X, Y))
        total += float((width @ (x[x_rows] - y[y_rows]).square()).sum())
    return 3 * d * total / directions


def _check_compat(compat: str | None) -> None:
    if compat not in (None, "torch-fidelity"):
        raise ValueError(f"compat must be None or 'torch-fidelity'; got {compat!r}")


def _cubic_mmd2(X: Tensor, Y: Tensor) -> float:
    """Unbiased MMD^2 under (x.y/D + 1)^3."""

    def cubic(A: Tensor, B: Tensor, upper: bool) -> Blocks:
        for i in tqdm(range(0, len(A), BLOCK), desc="KID", delay=2, leave=False):
            a = float64(A[i : i + BLOCK])
            for j in range(i if upper else 0, len(B), BLOCK):
                b = float64(B[j : j + BLOCK])
                k = (a @ b.T).div_(A.shape[1]).add_(1).pow_(3)
                yield slice(i, i + len(a)), slice(j, j + len(b)), k

    return _mmd2(cubic, X, Y, unbiased=True)


def _mmd2(kernel: Callable[[Tensor, Tensor, bool], Blocks], X: Tensor, Y: Tensor, unbiased: bool) -> float:
    """mean k(x,x') + mean k(y,y') - 2 mean k(x,y), without the pairs of a row with itself if unbiased."""

    def within(A: Tensor) -> float:
        total = 0.0
        for rows, columns, k in kernel(A, A, True):
            if rows != columns:
                total += 2 * float(k.sum())
            else:
                total += float((k.fill_diagonal_(0) if unbiased else k).sum())
        return total / (len(A) * (len(A) - 1) if unbiased else len(A) ** 2)

    across = sum(float(k.sum()) for _, _, k in kernel(X, Y, False)) / (len(X) * len(Y))
    return within(X) + within(Y) - 2 * across
