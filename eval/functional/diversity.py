"""How different the images of one set are from each other."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffgen.eval.functional._check import BLOCK, features, mean, row_blocks
from diffgen.eval.functional._pairs import squared_distances, unit_rows, units


def mean_pairwise(X: Tensor, metric: str = "cosine") -> float:
    """Mean distance over all pairs of different rows of X [N,D].

    cosine:  N/(N-1) (1 - |mean f|^2), f the rows scaled to unit length; 0 for a collapsed set, at most N/(N-1)
    l2sq:    2 tr sigma (also under the name "sqeuclidean")
    l2:      mean of |x_i - x_j|, over pairs in blocks: O(N^2 D) where the others are O(ND)

    The diversity reported by GARDO (arXiv:2512.24138) is of this kind. Zero rows count as one direction of their own:
    at cosine distance 0 from each other, 1 from the rest. Raises ValueError for another metric.
    """
    X = features(X, "X")
    n = len(X)
    if metric == "cosine":
        total, zeros = torch.zeros(X.shape[1], dtype=torch.float64), 0
        for block in X.split(BLOCK):
            f, zero = units(block)
            total, zeros = total.to(f.device) + f.sum(0), zeros + int(zero.sum())
        return n / (n - 1) * max(0.0, 1 - float((total / n).square().sum()) - (zeros / n) ** 2)
    if metric in ("l2sq", "sqeuclidean"):
        mu = mean(X)
        return 2 / (n - 1) * sum(float((block - mu).square().sum()) for block in row_blocks(X))
    if metric == "l2":
        total_distance = 0.0
        for rows, columns, d2 in squared_distances(X, X, mean(X), upper=True):
            if rows == columns:
                total_distance += float(d2.fill_diagonal_(0).clamp_(min=0).sqrt_().sum())
            else:
                total_distance += 2 * float(d2.clamp_(min=0).sqrt_().sum())
        return total_distance / (n * (n - 1))
    raise ValueError(f"metric must be 'cosine', 'l2sq' or 'l2'; got {metric!r}")


def vendi(X: Tensor, q: float = 1) -> float:
    """Vendi score of order q: the effective number of different rows in X [N,D], from 1 to min(N,D).

    l = eigenvalues of K/N, K_ij = cos(x_i, x_j);  q = 1: exp(-sum l ln l);  q = inf: 1/max l;  else (sum l^q)^(1/(1-q))

    The D x D dual has the same non-zero eigenvalues and is summed block by block when D < N. Eigenvalues below 1e-12
    are dropped. The value depends on N: compare at equal N. Zero rows as in `mean_pairwise`: together they are one more
    kind. Raises ValueError for q < 0. arXiv:2210.02410 (q = 1), arXiv:2310.12952 (any q).
    """
    check_order(q)
    return hill(_kernel_spectrum(features(X, "X")), q)


def check_order(q: float) -> None:
    if not q >= 0:
        raise ValueError(f"q must be 0 or more (inf allowed); got {q}")


def hill(lam: Tensor, q: float) -> float:
    """Effective number of kinds with shares lam, of order q; shares below 1e-12 are dropped."""
    lam = lam[lam > 1e-12]
    if abs(q - 1) < 1e-8:
        return float(torch.exp(-(lam * lam.log()).sum()))
    if math.isinf(q):
        return float(1 / lam.max())
    return float(torch.exp(torch.logsumexp(q * lam.log(), 0) / (1 - q)))


def _kernel_spectrum(X: Tensor) -> Tensor:
    """Eigenvalues of K/N, without some that are 0."""
    n, d = X.shape
    if n <= d:
        (f,) = unit_rows(X)
        return torch.linalg.eigvalsh(f @ f.T / n)
    gram, zeros = torch.zeros(d, d, dtype=torch.float64), 0
    for block in X.split(BLOCK):
        f, zero = units(block)
        gram, zeros = gram.to(f.device).addmm_(f.T, f), zeros + int(zero.sum())
    return torch.cat([torch.linalg.eigvalsh(gram / n), gram.new_tensor([zeros / n])])


def zero_rows(X: Tensor) -> int:
    """How many rows of X [N,D] are zero: they have no direction, so report them beside any cosine metric."""
    return sum(int((block == 0).all(dim=1).sum()) for block in features(X, "X").split(BLOCK))


class IntraPrompt(NamedTuple):
    """`value` is the mean over `groups` prompts; `excluded` prompts had one image; `by_size` maps group size to mean."""

    value: float
    groups: int
    excluded: int
    by_size: dict[int, float]


def intra_prompt(X: Tensor, prompts: Sequence[Hashable] | Tensor, measure: str = "cosine", q: float = 1) -> IntraPrompt:
    """Diversity inside each prompt's images, averaged over prompts: X [N,D] with one prompt (text or number) a row.

    measure:  a metric of `mean_pairwise`, or "vendi": `vendi` of order q over the group's size, in 1/size..1.

    Prompts with one image have no pairs: they are excluded and counted. Values of groups of different size aren't
    comparable for "vendi", hence `by_size`. Raises ValueError when no prompt has two images.
    """
    X = features(X, "X")
    keys = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
    if len(keys) != len(X):
        raise ValueError(f"prompts must be one a row of X; got {len(keys)} prompts and {len(X)} rows")
    rows: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        rows.setdefault(key, []).append(i)
    groups = [X[members] for members in rows.values() if len(members) > 1]
    if not groups:
        raise ValueError(f"intra-prompt diversity needs a prompt with at least 2 images; got {len(rows)} prompts of 1")

    def diversity(group: Tensor) -> float:
        return vendi(group, q) / len(group) if measure == "vendi" else mean_pairwise(group, measure)

    sizes: dict[int, list[float]] = {}
    for group in groups:
        sizes.setdefault(len(group), []).append(diversity(group))
    by_size = {size: sum(values) / len(values) for size, values in sorted(sizes.items())}
    value = sum(sum(values) for values in sizes.values()) / len(groups)
    return IntraPrompt(value, len(groups), len(rows) - len(groups), by_size)
