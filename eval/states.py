"""Mergeable states of feature sets: what streaming and distributed metrics keep instead of the features.

Each state is one float64 tensor that knows its own n, so that one function merges batches, processes and checkpoints.
The result depends on no split into batches or ranks beyond rounding. Legend: N rows; d features.

    moments  [d+1,d+1]   [0,0] = n, [0,1:] = mean, [1:,1:] = M2 = sum (x - mean)(x - mean)^T; merged by Chan's rule
    gram     [d+2,d+2]   sum a a^T of a = (1, unit row, 1 where the row is zero); merged by addition

M2 is centred: plain sums of x x^T lose tr sigma at mean/std = 1e4 in float64 to 4e-8, and at 1e2 in float32 to 1e-3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffgen.eval.functional._check import features, row_blocks
from diffgen.eval.functional._pairs import units
from diffgen.eval.functional.diversity import check_order, hill


def empty(d: int = 0) -> Tensor:
    """The moments of no rows; d = 0 stands for a set whose width isn't known yet."""
    return torch.zeros(d + 1, d + 1, dtype=torch.float64)


def count(state: Tensor) -> int:
    """n, the rows in a state (moments or gram)."""
    return round(float(state[0, 0]))


def moments(X: Tensor) -> Tensor:
    """Moments [d+1,d+1] of X [N,d], N >= 0, on X's device (on the CPU for MPS, which has no float64).

    Raises TypeError and ValueError as `functional` does: a tensor, two dimensions, finite.
    """
    X = features(X, "features", rows=0)
    return add_moments(empty(X.shape[1]).to("cpu" if X.device.type == "mps" else X.device), X)


def add_moments(state: Tensor, X: Tensor) -> Tensor:
    """`state`, changed in place to the moments of its rows and those of X: one pass over M2, where `merge` takes several."""
    for x_Nd in row_blocks(features(X, "features", rows=0)):
        n_a, n_b = float(state[0, 0]), len(x_Nd)
        if n_b == 0:
            continue
        mean, n = x_Nd.mean(0), n_a + n_b
        delta = mean - state[0, 1:]
        # delta as one more row adds delta delta^T n_a n_b/n
        rows = torch.cat([x_Nd - mean, math.sqrt(n_a * n_b / n) * delta[None]])
        state[1:, 1:].addmm_(rows.T, rows)
        state[0, 1:] += delta * (n_b / n)
        state[0, 0] = n
    return state


def merge(a: Tensor, b: Tensor) -> Tensor:
    """Moments of the union of two sets (Chan, Golub and LeVeque 1979); merge(a, b) equals merge(b, a) bit for bit.

    n = n_a + n_b;  mean = (n_a mean_a + n_b mean_b)/n;  M2 = M2_a + M2_b + delta delta^T n_a n_b/n, delta = mean_b - mean_a
    """
    if a.shape != b.shape:
        if count(a) == 0 or count(b) == 0:
            return (b if count(a) == 0 else a).clone()
        raise ValueError(f"states must have equally many features; got d={len(a) - 1} and d={len(b) - 1}")
    n_a, n_b = a[0, 0], b[0, 0]
    n = (n_a + n_b).clamp(min=1)
    delta = b[0, 1:] - a[0, 1:]
    merged = a + b
    merged[1:, 1:] += torch.outer(delta, delta) * (n_a * n_b / n)
    merged[0, 1:] = n_a / n * a[0, 1:] + n_b / n * b[0, 1:]
    return merged


def merge_stack(stacked: Tensor) -> Tensor:
    """Moments of the union of W sets, [W,d+1,d+1] -> [d+1,d+1]; a `dist_reduce_fx` for torchmetrics."""
    merged = stacked[0]
    for state in stacked[1:]:
        merged = merge(merged, state)
    return merged if len(stacked) > 1 else merged.clone()


def mean_cov(state: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and unbiased covariance [d,d] (divisor n-1). Raises ValueError for n < 2."""
    n = _at_least_two(state)
    return state[0, 1:], state[1:, 1:] / (n - 1)


# ------------------------------------------------------------------------------------------------------------ gram


def gram(X: Tensor) -> Tensor:
    """Gram state [d+2,d+2] of the rows of X [N,d] scaled to unit length: n, their sum, their d x d Gram matrix.

    The last axis counts zero rows, which have no direction: one of their own, as in `functional.vendi`.
    """
    X = features(X, "features", rows=0)
    return add_gram(empty(X.shape[1] + 1).to("cpu" if X.device.type == "mps" else X.device), X)


def add_gram(state: Tensor, X: Tensor) -> Tensor:
    """`state`, changed in place to the Gram state of its rows and those of X."""
    for block in row_blocks(features(X, "features", rows=0)):
        f_Nd, zero = units(block)
        rows = torch.cat([torch.ones_like(f_Nd[:, :1]), f_Nd, zero[:, None].double()], dim=1)
        state.addmm_(rows.T, rows)
    return state


def merge_gram(stacked: Tensor) -> Tensor:
    """Gram state of the union of W sets, [W,d+2,d+2] -> [d+2,d+2]; a `dist_reduce_fx` for torchmetrics."""
    return stacked.sum(0)


def gram_eigenvalues(state: Tensor) -> Tensor:
    """Eigenvalues of K/n, K the N x N matrix of cosines, without the zeros that are only N > d: [d+1], ascending."""
    return torch.linalg.eigvalsh(state[1:, 1:] / _at_least_two(state)).clamp(min=0)


def gram_vendi(state: Tensor, q: float = 1) -> float:
    """`functional.vendi` of a Gram state. arXiv:2210.02410 (q = 1), arXiv:2310.12952 (any q)."""
    check_order(q)
    return hill(gram_eigenvalues(state), q)


def gram_mean_pairwise(state: Tensor) -> float:
    """`functional.mean_pairwise` (cosine) of a Gram state: n/(n-1) (1 - |mean f|^2)."""
    n = _at_least_two(state)
    return float(n / (n - 1) * (1 - (state[0, 1:] / n).square().sum()).clamp(min=0))


# ---------------------------------------------------------------------------------------------------------- checks


def _at_least_two(state: Tensor) -> int:
    n = count(state)
    if n < 2:
        raise ValueError(f"need at least 2 rows; the state has {n}")
    return n
