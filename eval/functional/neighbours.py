"""What nearest neighbours tell: fidelity and coverage (PRDC), and memorisation of the training set.

X [N,D] generated, Y [M,D] reference. Distances are Euclidean, from blocks of centred float64 squares; what differs only
by their rounding counts as equal, so copies are at distance 0 whatever their position.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffgen.eval.functional._check import BLOCK, feature_pair, features, float64, mean, same_width, whole
from diffgen.eval.functional._pairs import TIE, squared_distances, unit_rows
from diffgen.eval.functional.frechet import fd


def nearest(X: Tensor, Y: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor]:
    """Distances, ascending, and row numbers of the k nearest rows of Y to each row of X: float64 [N,k], int64 [N,k].

    Without Y: of X to itself, each row without itself (a copy elsewhere counts). The chosen distances are recomputed
    from differences, exact also for near copies. Raises ValueError when there are fewer than k rows to choose from.
    """
    X = features(X, "X", 1)
    whole("k", k, 1)
    if Y is None:
        Z = features(X, "X", k + 1, f" for k={k}")
    else:
        Z = features(Y, "Y", k, f" for k={k}")
        same_width(X=X, Y=Z)
    centre, found = mean(Z), []
    best: list[tuple[Tensor, Tensor]] = []

    def refined(rows: slice) -> tuple[Tensor, Tensor]:
        index = _smallest(best, k)[1]
        x = float64(X[rows])
        exact = torch.stack([(x - float64(Z[column.to(Z.device)])).norm(dim=1) for column in index.T], dim=1)
        distance, order = exact.sort(dim=1, stable=True)
        return distance, index.gather(1, order)

    for rows, columns, d2 in squared_distances(X, Z, centre):
        if Y is None and rows.start == columns.start:
            d2.fill_diagonal_(torch.inf)
        values, index = d2.topk(min(k, d2.shape[1]), dim=1, largest=False)
        best = [_smallest([*best, (values, index + columns.start)], k)]
        if columns.stop == len(Z):
            found.append(refined(rows))
            best = []
    return torch.cat([distance for distance, _ in found]), torch.cat([index for _, index in found])


def _smallest(candidates: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    values, index = (torch.cat(column, dim=1) for column in zip(*candidates))
    smallest, order = values.topk(min(k, values.shape[1]), dim=1, largest=False)
    return smallest, index.gather(1, order)


class PRDC(NamedTuple):
    precision: float
    recall: float
    density: float
    coverage: float


def prdc(
    X: Tensor, Y: Tensor, k: int = 5, strict: bool = False, max_points: int | None = 10_000, seed: int = 0
) -> PRDC:
    """Precision, recall, density and coverage of X [N,D] against Y [M,D] by the balls of radius r_k.

    r_k(y) = distance of y to its k-th nearest neighbour in its own set, itself excluded
    precision = share of x within r_k(y) of some y         recall   = share of y within r_k(x) of some x
    density   = (1/kN) sum_x sum_y [|x - y| <= r_k(y)]     coverage = share of y with some x within r_k(y)

    k:           5 (dgm-eval; density and coverage's paper); torch-fidelity and precision and recall's paper take 3.
    strict:      `<` as prdc and dgm-eval, in place of `<=` as the paper and torch-fidelity; they differ on ties only,
                 that is with copies.
    max_points:  random rows of each set to use at most (10,000: dgm-eval); None for all.

    All four are 1 for two equal sets (density about 1, and may exceed it). Raises ValueError when a set has fewer than
    k+1 rows. arXiv:1904.06991, arXiv:2002.09797.
    """
    whole("k", k, 1)
    X, Y = features(X, "X", k + 1, f" for k={k}"), features(Y, "Y", k + 1, f" for k={k}")
    same_width(X=X, Y=Y)
    if max_points is not None:
        whole("max_points", max_points, k + 1)
        generator = torch.Generator().manual_seed(seed)
        X, Y = (
            A[torch.randperm(len(A), generator=generator)[:max_points].to(A.device)] if len(A) > max_points else A
            for A in (X, Y)
        )
    radius_x, radius_y = (nearest(A, k=k)[0][:, -1].square() for A in (X, Y))
    precise, recalled = (torch.zeros(len(A), dtype=torch.bool, device=radius_y.device) for A in (X, Y))
    covered, inside = torch.zeros_like(recalled), 0
    for rows, columns, d2 in squared_distances(X, Y, mean(Y), slack=-TIE if strict else TIE):
        in_y = d2 < radius_y[columns] if strict else d2 <= radius_y[columns]
        in_x = d2 < radius_x[rows, None] if strict else d2 <= radius_x[rows, None]
        precise[rows] |= in_y.any(dim=1)
        covered[columns] |= in_y.any(dim=0)
        recalled[columns] |= in_x.any(dim=0)
        inside += int(in_y.sum())
    precision, recall, coverage = (float(hit.double().mean()) for hit in (precise, recalled, covered))
    return PRDC(precision, recall, inside / (k * len(X)), coverage)


def authpct(X: Tensor, train: Tensor) -> float:
    """AuthPct: percentage of X [N,D] that is authentic, that is farther from its nearest training row t than t is from
    its own nearest neighbour in train [M,D].

    0 for copies. Fresh data score below 100: the test sets of CIFAR-10 and ImageNet 72 and 70 under DINOv2, so report
    it beside the test set's. Raises ValueError for fewer than 2 training rows. arXiv:2102.08921.
    """
    distance, index = nearest(X, features(train, "train"))
    return 100 * float((distance > nearest(train)[0].to(distance.device)[index]).double().mean())


def mann_whitney_z(generated: Tensor, test: Tensor) -> float:
    """Z_u of two samples [N] and [M]: (U - (NM/2 - 1/2)) / sqrt(NM (N+M+1)/12), U = #{generated > test}, ties 1/2.

    Below 0: generated values tend to be smaller. The 1/2 is the continuity correction of arXiv:2004.05675's code.
    """
    from scipy.stats import rankdata

    n, m = len(generated), len(test)
    if min(n, m) < 1:
        raise ValueError(f"Mann-Whitney needs a value in each sample; got {n} and {m}")
    ranks = rankdata(torch.cat([float64(generated), float64(test)]).cpu().numpy())
    u = float(ranks[:n].sum()) - n * (n + 1) / 2
    return (u - (n * m / 2 - 0.5)) / (n * m * (n + m + 1) / 12) ** 0.5


def ct_score(
    X: Tensor,
    train: Tensor,
    test: Tensor,
    cells: int = 3,
    components: int = 64,
    min_generated: int = 20,
    seed: int = 0,
) -> float:
    """C_T: are generated rows X [N,D] closer to train than fresh test rows are? Below 0 copying, above 0 underfitting.

    In each K-means cell of train, `mann_whitney_z` of the distances to the cell's training rows, X against test;
    averaged with the test set's shares as weights, over the cells with at least min_generated rows of X. Features are
    projected on train's first principal components before. Beyond about +-3 it is unlikely to be chance.

    cells, components:  3 and 64 (dgm-eval). min_generated: 20 (there: more than 20).

    Raises ValueError when a cell has no test or training row (use fewer cells), or none has enough of X.
    arXiv:2004.05675.
    """
    from scipy.cluster.vq import kmeans2, vq

    whole("cells", cells, 1)
    whole("components", components, 1)
    sets = [features(A, name) for A, name in ((X, "X"), (train, "train"), (test, "test"))]
    same_width(X=sets[0], train=sets[1], test=sets[2])
    if len(train) < cells:
        raise ValueError(f"train needs at least as many rows as cells; got {len(train)} rows and {cells} cells")
    x, t, fresh = _principal(sets, reference=1, components=components)
    rng = np.random.default_rng(seed)
    centroids = min(
        (kmeans2(t.numpy(), cells, minit="++", rng=rng, missing="warn")[0] for _ in range(10)),
        key=lambda found: float((vq(t.numpy(), found)[1] ** 2).sum()),
    )
    cell_x, cell_t, cell_fresh = (torch.from_numpy(vq(A.numpy(), centroids)[0]) for A in (x, t, fresh))
    total = weights = 0.0
    for cell in range(cells):
        mine, its_train, its_test = x[cell_x == cell], t[cell_t == cell], fresh[cell_fresh == cell]
        if not len(its_train) or not len(its_test):
            got = f"{len(its_train)} training and {len(its_test)} test rows"
            raise ValueError(f"C_T: cell {cell} of {cells} has {got}; use fewer cells or a larger test set")
        if len(mine) >= max(min_generated, 1):
            near = [nearest(A, its_train)[0][:, 0] for A in (mine, its_test)]
            total, weights = total + len(its_test) * mann_whitney_z(*near), weights + len(its_test)
    if not weights:
        raise ValueError(f"C_T: no cell has {min_generated} generated rows (N={len(x)}, cells={cells})")
    return total / weights


def _principal(sets: list[Tensor], reference: int, components: int) -> list[Tensor]:
    """The sets on the principal axes of one of them, on CPU; as they are when they have no more than `components`."""
    sets = [float64(A).cpu() for A in sets]
    if sets[0].shape[1] <= components:
        return sets
    centred = sets[reference] - sets[reference].mean(0)
    axes = torch.linalg.eigh(centred.T @ centred)[1][:, -components:]
    return [A @ axes for A in sets]


def mifid(X: Tensor, Y: Tensor, direction: str = "fake", threshold: float = 0.1) -> float:
    """MiFID: fd(X, Y) / s, Y [M,D] being the training set; s the mean over X of min_y (1 - |cos|), or 1 if >= threshold.

    direction "fake" follows the definition; "torchmetrics" takes the mean over Y of the minimum over X, as torchmetrics
    does, which hardly notices a few copies. 0 when FD <= 1e-8, and s >= 1e-14, as there. Zero rows are at distance 1
    from all others (torchmetrics drops rows that sum to 0). Raises ValueError for another direction. arXiv:2106.03062.
    """
    if direction not in ("fake", "torchmetrics"):
        raise ValueError(f"direction must be 'fake' or 'torchmetrics'; got {direction!r}")
    value = fd(X, Y)
    fake, real = unit_rows(*feature_pair(X, Y))
    sources, targets = (fake, real) if direction == "fake" else (real, fake)
    s = float((1 - _largest_cosine(sources, targets, absolute=True)[0]).clamp(min=0).mean())
    return 0.0 if value <= 1e-8 else value / (max(s, 1e-14) if s < threshold else 1.0)


def _largest_cosine(
    sources: Tensor, targets: Tensor, absolute: bool = False, other: bool = False
) -> tuple[Tensor, Tensor]:
    """For each unit row the largest cosine with a row of targets (of another number, if `other`), and which: [N], [N]."""
    values, indices = [], []
    for i in range(0, len(sources), BLOCK):
        a = sources[i : i + BLOCK]
        best, where = a.new_full((len(a),), -torch.inf), torch.zeros(len(a), dtype=torch.long, device=a.device)
        for j in range(0, len(targets), BLOCK):
            cosine = a @ targets[j : j + BLOCK].T
            if other and i == j:
                cosine.fill_diagonal_(-torch.inf)
            value, index = (cosine.abs() if absolute else cosine).max(dim=1)
            where = torch.where(value > best, index + j, where)
            best = torch.maximum(best, value)
        values.append(best)
        indices.append(where)
    return torch.cat(values), torch.cat(indices)


class NNAudit(NamedTuple):
    """The two summaries, and per row of X its nearest training row by distance and by cosine."""

    ratio: float  # mean of `ratios`
    copied: float  # share of X with cosine > threshold
    ratios: Tensor  # [N] distance to the nearest / mean distance to the k nearest; 0 for copies, near 1 for fresh rows
    distances: Tensor  # [N]
    indices: Tensor  # [N] rows of train
    cosines: Tensor  # [N]
    cosine_indices: Tensor  # [N] rows of train


def nn_audit(X: Tensor, train: Tensor | None = None, k: int = 50, threshold: float = 0.95) -> NNAudit:
    """How close the rows of X [N,D] come to train [M,D], with the pairs to look at; without train, to each other.

    ratio = mean over x of |x - nn_1(x)| / mean_{i<=k} |x - nn_i(x)|: lower means more copying. `copied`: share with a
    cosine above threshold to some training row. Neither has an absolute scale: compare with a test set's.

    Raises ValueError for fewer than k rows to choose from and for a threshold outside [-1, 1].
    """
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold must be a cosine, within [-1, 1]; got {threshold}")
    X = features(X, "X", 1)
    distance, index = nearest(X, None if train is None else features(train, "train", k, f" for k={k}"), k)
    spread = distance.mean(dim=1)
    ratios = distance[:, 0] / spread.where(spread > 0, 1.0)
    unit_x, unit_train = unit_rows(X, X if train is None else train)
    cosines, cosine_index = _largest_cosine(unit_x, unit_train, other=train is None)
    copied = float((cosines > threshold).double().mean())
    return NNAudit(float(ratios.mean()), copied, ratios, distance[:, 0], index[:, 0], cosines, cosine_index)
