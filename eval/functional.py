"""Metrics as plain functions of tensors.

Features are real tensors [N,D] or [M,D] (X generated, Y reference), and all arithmetic is float64. Images are uint8
[N,3,H,W]. Legend: N, M images or feature rows; D features; mu mean; sigma unbiased covariance (divisor N-1).

All functions raise TypeError for what is not a tensor of the right kind, and ValueError for a wrong shape, fewer than
two rows or non-finite features (with the rows' numbers).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

# --------------------------------------------------------------------------------------------- Fréchet distance


def fd(X: Tensor, Y: Tensor) -> float:
    """Fréchet distance between the Gaussians fitted to X [N,D] and Y [M,D] (FID, FD-DINOv2, by the features' network).

    FD = |mu_x - mu_y|^2 + tr sigma_x + tr sigma_y - 2 tr (sigma_x sigma_y)^(1/2)

    The last trace is the nuclear norm |F_x^T F_y|_* for any factors sigma = F F^T, so no matrix square root is taken
    and singular covariances (N <= D) are exact. Biased upwards by about `fd_floor`. arXiv:1706.08500.
    """
    X, Y = _feature_pair(X, Y)
    return _fd_from_factors(X.mean(0), _factor(X), Y.mean(0), _factor(Y))


def fd_from_stats(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """`fd` from the means [D] and covariances [D,D] alone.

    Raises ValueError for shapes that don't fit, non-finite entries, and a sigma that is asymmetric or not positive
    semi-definite. arXiv:1706.08500.
    """
    mu1, sigma1 = _gaussian(mu1, sigma1, "mu1", "sigma1")
    mu2, sigma2 = _gaussian(mu2, sigma2, "mu2", "sigma2")
    if mu1.shape != mu2.shape:
        raise ValueError(f"mu1 and mu2 must have the same length; got {len(mu1)} and {len(mu2)}")
    return _fd_from_factors(mu1, _cholesky(sigma1, "sigma1"), mu2, _cholesky(sigma2, "sigma2"))


def fd_floor(eigenvalues: Tensor, n: int, m: int) -> float:
    """Expected FD of n and m samples of one Gaussian whose covariance has these eigenvalues [D].

    E[FD] ~ tr sigma (1/n + 1/m) + (1/(n-1) + 1/(m-1)) sum_ij l_i l_j (1 + [i=j]) / (2 (l_i + l_j))

    Second-order expansion of the Bures distance; for sigma = I it is d(1/n + 1/m) + d(d+1)/4 (1/(n-1) + 1/(m-1)).
    With a sample spectrum (`spectrum(Y)`) it underestimates when m < d or tails are heavy. The bias: arXiv:1911.07023.
    """
    if not isinstance(eigenvalues, Tensor):
        raise TypeError(f"eigenvalues must be a tensor [D]; got {type(eigenvalues).__name__}")
    if eigenvalues.ndim != 1 or not bool((eigenvalues >= 0).all()):
        raise ValueError(f"eigenvalues must be [D] and not negative; got shape {list(eigenvalues.shape)}")
    if min(n, m) < 2:
        raise ValueError(f"n and m must be at least 2; got n={n}, m={m}")
    lam = _float64(eigenvalues[eigenvalues > 0])
    pairs = lam[:, None] * lam[None, :] / (2 * (lam[:, None] + lam[None, :]))
    return float(lam.sum() * (1 / n + 1 / m) + (1 / (n - 1) + 1 / (m - 1)) * (pairs.sum() + pairs.trace()))


def fd_floor_split(Y: Tensor, n: int, splits: int = 10, seed: int = 0) -> float:
    """Mean FD between disjoint random subsets of Y [M,D], both of size s = min(n, floor(M/2)).

    Overestimates the floor at (n, M), because the subsets are smaller: the upper end of the bracket whose lower end is
    `fd_floor(spectrum(Y), n, M)`. Raises ValueError when M < 4.
    """
    Y = _features(Y, "Y")
    if len(Y) < 4 or n < 2:
        raise ValueError(f"Y must have at least 4 rows and n be at least 2; got {len(Y)} rows, n={n}")
    s = min(n, len(Y) // 2)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(Y), generator=generator).to(Y.device) for _ in range(splits)]
    rounds = tqdm(orders, desc="noise floor", delay=2, leave=False)
    return sum(fd(Y[order[:s]], Y[order[s : 2 * s]]) for order in rounds) / splits


def spectrum(X: Tensor) -> Tensor:
    """Eigenvalues of the covariance of X [N,D] that can be non-zero: [min(N,D)], ascending."""
    X = _features(X, "X")
    A = (X - X.mean(0)) / math.sqrt(len(X) - 1)
    gram = A @ A.T if len(A) < A.shape[1] else A.T @ A
    return torch.linalg.eigvalsh(gram).clamp(min=0)


def _factor(X: Tensor) -> Tensor:
    """F [D, min(N,D)] with F F^T = covariance of X: the centred rows themselves while they are few, else Cholesky's."""
    A = (X - X.mean(0)) / math.sqrt(len(X) - 1)
    return A.T if len(A) <= A.shape[1] else _cholesky(A.T @ A, "covariance")


def _cholesky(sigma: Tensor, name: str) -> Tensor:
    """F [D,D] with F F^T = sigma; by eigenvectors where sigma is singular (a jitter would change the distance)."""
    factor, failed = torch.linalg.cholesky_ex(sigma)
    if not failed:
        return factor
    lam, vectors = torch.linalg.eigh(sigma)
    if lam[0] < -1e-5 * lam.abs().max():
        raise ValueError(f"{name} must be positive semi-definite; its smallest eigenvalue is {lam[0].item():.3g}")
    return vectors * lam.clamp(min=0).sqrt()


def _fd_from_factors(mu1: Tensor, F1: Tensor, mu2: Tensor, F2: Tensor) -> float:
    trace1, trace2 = F1.square().sum(), F2.square().sum()
    trace_of_root = torch.linalg.svdvals(F1.T @ F2).sum()
    distance = float((mu1 - mu2).square().sum() + trace1 + trace2 - 2 * trace_of_root)
    if distance < -1e-6 * float(trace1 + trace2):
        raise ArithmeticError(f"Fréchet distance came out as {distance}, more negative than rounding explains")
    return max(distance, 0.0)


# ---------------------------------------------------------------------------------------------------- diversity


def mean_pairwise(X: Tensor, metric: str = "cosine") -> float:
    """Mean distance over all pairs of different rows of X [N,D], without forming pairs (O(ND)).

    cosine:       N/(N-1) (1 - |mean f|^2), f the rows scaled to unit length; 0 for a collapsed set, at most N/(N-1)
    sqeuclidean:  2 tr sigma

    The diversity reported by GARDO (arXiv:2512.24138) is of this kind. Zero rows count as one direction of their own:
    at cosine distance 0 from each other, 1 from the rest. Raises ValueError for another metric.
    """
    X = _features(X, "X")
    n = len(X)
    if metric == "cosine":
        return float(n / (n - 1) * (1 - _unit_rows(X).mean(0).square().sum()).clamp(min=0))
    if metric == "sqeuclidean":
        return float(2 * X.var(0).sum())
    raise ValueError(f"metric must be 'cosine' or 'sqeuclidean'; got {metric!r}")


def vendi(X: Tensor, q: float = 1) -> float:
    """Vendi score of order q: the effective number of different rows in X [N,D], from 1 to min(N,D).

    l = eigenvalues of K/N, K_ij = cos(x_i, x_j);  q = 1: exp(-sum l ln l);  q = inf: 1/max l;  else (sum l^q)^(1/(1-q))

    The D x D dual has the same non-zero eigenvalues and is used when D < N. Eigenvalues below 1e-12 are dropped. The
    value depends on N: compare at equal N. Zero rows as in `mean_pairwise`. Raises ValueError for q < 0.
    arXiv:2210.02410 (q = 1), arXiv:2310.12952 (any q).
    """
    if not q >= 0:
        raise ValueError(f"q must be 0 or more (inf allowed); got {q}")
    F = _unit_rows(_features(X, "X"))
    gram = F.T @ F if F.shape[1] < len(F) else F @ F.T
    lam = torch.linalg.eigvalsh(gram / len(F))
    lam = lam[lam > 1e-12]
    if q == 1:
        return float(torch.exp(-(lam * lam.log()).sum()))
    if math.isinf(q):
        return float(1 / lam.max())
    return float((lam**q).sum() ** (1 / (1 - q)))


def _unit_rows(X: Tensor) -> Tensor:
    """Rows scaled to length 1; zero rows, if there are any, point along one additional axis."""
    norm = X.norm(dim=1, keepdim=True)
    zero = norm == 0
    units = X / norm.where(~zero, 1.0)
    return torch.cat([units, zero.to(X.dtype)], dim=1) if bool(zero.any()) else units


# -------------------------------------------------------------------------------------------------- uncertainty


def bootstrap_sd(
    fn: Callable[..., float], X: Tensor, Y: Tensor | None = None, samples: int = 50, seed: int = 0
) -> float:
    """Standard deviation of fn(X, Y), or fn(X), when rows are drawn anew with replacement (X and Y independently).

    Report estimate +- 1.96 sd. Don't take percentiles of the resampled values: resampling adds the bias of FD and Vendi
    once more, so such an interval may not even contain the estimate. For FD near its floor the sd is conservative.
    Raises ValueError for samples < 2.
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2; got {samples}")
    sets = [_features(X, "X")] + ([] if Y is None else [_features(Y, "Y")])
    generator = torch.Generator().manual_seed(seed)

    def resample(rows: Tensor) -> Tensor:
        return rows[torch.randint(len(rows), (len(rows),), generator=generator).to(rows.device)]

    name = getattr(fn, "__name__", "metric")
    rounds = tqdm(range(samples), desc=f"bootstrap {name}", delay=2, leave=False)
    values = [fn(*(resample(rows) for rows in sets)) for _ in rounds]
    return float(torch.tensor(values, dtype=torch.float64).std())


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


# --------------------------------------------------------------------------------------------- image statistics


def saturation(images: Tensor) -> Tensor:
    """Mean HSV saturation (max - min)/max of each image, 0 for black pixels. uint8 [N,3,H,W] -> float64 [N]."""

    def hsv_saturation(x_BCHW: Tensor) -> Tensor:
        low, high = x_BCHW.amin(1), x_BCHW.amax(1)
        return ((high - low) / high.where(high > 0, 1.0)).mean((1, 2))

    return _per_image(hsv_saturation, images)


def contrast(images: Tensor) -> Tensor:
    """Standard deviation (divisor HW) of the luma 0.299 R + 0.587 G + 0.114 B in [0,1]. uint8 [N,3,H,W] -> [N]."""

    def luma_sd(x_BCHW: Tensor) -> Tensor:
        luma = torch.einsum("bchw,c->bhw", x_BCHW, x_BCHW.new_tensor([0.299, 0.587, 0.114]))
        return luma.flatten(1).std(dim=1, correction=0)

    return _per_image(luma_sd, images)


def clipping(images: Tensor) -> Tensor:
    """Share of channel values that are 0 or 255, the plainest sign of oversaturation. uint8 [N,3,H,W] -> [N]."""
    return _per_image(lambda x_BCHW: ((x_BCHW == 0) | (x_BCHW == 1)).double().mean((1, 2, 3)), images)


def _per_image(statistic: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Apply statistic ([B,3,H,W] float64 in [0,1] -> [B]) in batches."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(
            f"images must be a uint8 tensor [N,3,H,W]; got {got} (diffgen.eval.images.load_images converts)"
        )
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"images must be [N,3,H,W] and not empty; got {list(images.shape)}")
    return torch.cat([statistic(_float64(batch) / 255) for batch in images.split(64)])


# ------------------------------------------------------------------------------------------------------- checks


def _float64(x: Tensor) -> Tensor:
    x = x.detach()
    return (x.cpu() if x.device.type == "mps" else x).double()  # MPS has no float64


def _features(X: Tensor, name: str) -> Tensor:
    if not isinstance(X, Tensor):
        raise TypeError(f"{name} must be a tensor of features [N,D]; got {type(X).__name__}")
    if X.ndim != 2 or X.shape[1] < 1:
        raise ValueError(f"{name} must be [N,D]; got shape {list(X.shape)}")
    if len(X) < 2:
        raise ValueError(f"{name} needs at least 2 rows; got {len(X)}")
    bad = (~torch.isfinite(X).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ValueError(f"{name} must be finite; NaN or infinity in rows {bad[:10]}{more} of {len(X)}")
    return _float64(X)


def _feature_pair(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    X, Y = _features(X, "X"), _features(Y, "Y")
    if X.shape[1] != Y.shape[1]:
        raise ValueError(f"X and Y must have equally many features; got D={X.shape[1]} and D={Y.shape[1]}")
    return X, Y


def _gaussian(mu: Tensor, sigma: Tensor, mu_name: str, sigma_name: str) -> tuple[Tensor, Tensor]:
    for tensor, name in ((mu, mu_name), (sigma, sigma_name)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} must be finite; it has NaN or infinity")
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        got = f"{list(mu.shape)} and {list(sigma.shape)}"
        raise ValueError(f"{mu_name} and {sigma_name} must be [D] and [D,D]; got {got}")
    if not torch.allclose(sigma, sigma.T, rtol=1e-5, atol=1e-5 * float(sigma.abs().max())):
        raise ValueError(f"{sigma_name} must be symmetric; it differs from its transpose")
    return _float64(mu), _float64(sigma)
