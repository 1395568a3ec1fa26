"""Fréchet distance, its noise floor, and its extrapolation to infinitely many samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from diffgen.eval.functional._check import feature_pair, features, float64, mean, row_blocks, whole


def fd(X: Tensor, Y: Tensor) -> float:
    """Fréchet distance between the Gaussians fitted to X [N,D] and Y [M,D] (FID, FD-DINOv2, by the features' network).

    FD = |mu_x - mu_y|^2 + tr sigma_x + tr sigma_y - 2 tr (sigma_x sigma_y)^(1/2)

    The last trace is the nuclear norm |F_x^T F_y|_* for any factors sigma = F F^T, so no matrix square root is taken
    and singular covariances (N <= D) are exact. Biased upwards by about `fd_floor`. arXiv:1706.08500.
    """
    X, Y = feature_pair(X, Y)
    return _fd_from_factors(*_moments(X), *_moments(Y))


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
    lam = float64(eigenvalues[eigenvalues > 0])
    pairs = lam[:, None] * lam[None, :] / (2 * (lam[:, None] + lam[None, :]))
    return float(lam.sum() * (1 / n + 1 / m) + (1 / (n - 1) + 1 / (m - 1)) * (pairs.sum() + pairs.trace()))


def fd_floor_split(Y: Tensor, n: int, splits: int = 10, seed: int = 0) -> float:
    """Mean FD between disjoint random subsets of Y [M,D], both of size s = min(n, floor(M/2)).

    Overestimates the floor at (n, M), because the subsets are smaller: the upper end of the bracket whose lower end is
    `fd_floor(spectrum(Y), n, M)`. Raises ValueError when M < 4.
    """
    Y = features(Y, "Y")
    if len(Y) < 4 or n < 2:
        raise ValueError(f"Y must have at least 4 rows and n be at least 2; got {len(Y)} rows, n={n}")
    whole("splits", splits, 1)
    s = min(n, len(Y) // 2)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(Y), generator=generator).to(Y.device) for _ in range(splits)]
    rounds = tqdm(orders, desc="noise floor", delay=2, leave=False)
    return sum(fd(Y[order[:s]], Y[order[s : 2 * s]]) for order in rounds) / splits


def fd_infinity(
    X: Tensor,
    Y: Tensor,
    points: int | Sequence[int] = 15,
    repeats: int = 3,
    seed: int = 0,
    subset_reference: bool = False,
) -> float:
    """FD extrapolated to infinitely many samples: the intercept a of `fd_line`. May be a little negative. 1911.07023."""
    return fd_line(X, Y, points, repeats, seed, subset_reference)[0]


def fd_line(
    X: Tensor,
    Y: Tensor,
    points: int | Sequence[int] = 15,
    repeats: int = 3,
    seed: int = 0,
    subset_reference: bool = False,
) -> tuple[float, float]:
    """(a, b) of FD_n = a + b/n, fitted to random subsets of n rows of X [N,D] by least squares with weights n.

    points:           how many sizes, evenly spaced from min(5000, max(N//10, 2)) to N (15: dgm-eval), or the sizes.
    repeats:          subsets a size, drawn without replacement.
    subset_reference: also draw n rows of Y [M,D]. By default Y stays whole, as in the paper, and a keeps the bias that
                      is due to M alone; with it, a is about 0 for two samples of one distribution.

    Raises ValueError for fewer than two different sizes, or sizes out of 2..N (2..min(N,M) with subset_reference).
    arXiv:1911.07023.
    """
    X, Y = feature_pair(X, Y)
    whole("repeats", repeats, 1)
    most = min(len(X), len(Y)) if subset_reference else len(X)
    if isinstance(points, int):
        spaced = torch.linspace(min(5000, max(most // 10, 2)), most, whole("points", points, 2), dtype=torch.float64)
        sizes = sorted({int(size) for size in spaced})
    else:
        sizes = sorted(set(points))
    if len(sizes) < 2 or sizes[0] < 2 or sizes[-1] > most:
        raise ValueError(f"points must give at least two different sizes within 2..{most}; got sizes {sizes}")
    generator = torch.Generator().manual_seed(seed)

    def subset(rows: Tensor, size: int) -> Tensor:
        return (
            rows if size == len(rows) else rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)]
        )

    reference = _moments(Y)

    def one(size: int) -> float:
        small = _moments(subset(X, size))
        return _fd_from_factors(*small, *(_moments(subset(Y, size)) if subset_reference else reference))

    values = []
    for size in tqdm(sizes, desc="FD infinity", delay=2, leave=False):
        same = size == len(X) and (not subset_reference or size == len(Y))  # nothing is random: once is enough
        values.append(one(size) if same else sum(one(size) for _ in range(repeats)) / repeats)
    return _line(sizes, values)


def _line(sizes: Sequence[int], values: Sequence[float]) -> tuple[float, float]:
    """(a, b) that minimise sum n (value - a - b/n)^2."""
    n, fds = torch.tensor(sizes, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    weight = n / n.sum()
    x, x_mean, y_mean = 1 / n, (weight / n).sum(), (weight * fds).sum()
    slope = (weight * (x - x_mean) * (fds - y_mean)).sum() / (weight * (x - x_mean).square()).sum()
    return float(y_mean - slope * x_mean), float(slope)


def spectrum(X: Tensor) -> Tensor:
    """Eigenvalues of the covariance of X [N,D] that can be non-zero: [min(N,D)], ascending."""
    X = features(X, "X")
    if len(X) < X.shape[1]:
        A = _centred(X)
        return torch.linalg.eigvalsh(A @ A.T).clamp(min=0)
    return torch.linalg.eigvalsh(_covariance(X)).clamp(min=0)


def _centred(X: Tensor) -> Tensor:
    return (float64(X) - mean(X)) / math.sqrt(len(X) - 1)


def _covariance(X: Tensor) -> Tensor:
    """Unbiased covariance [D,D], block by block."""
    mu = mean(X)
    sigma = mu.new_zeros(len(mu), len(mu))
    for block in row_blocks(X):
        sigma += _gram(block - mu)
    return sigma / (len(X) - 1)


def _gram(A: Tensor) -> Tensor:
    """A^T A. On the CPU by numpy, whose product of a matrix with itself takes half the operations (BLAS syrk)."""
    if A.device.type != "cpu":
        return A.T @ A
    a = A.numpy()
    return torch.from_numpy(a.T @ a)


def _moments(X: Tensor) -> tuple[Tensor, Tensor]:
    return mean(X), _factor(X)


def _factor(X: Tensor) -> Tensor:
    """F [D, min(N,D)] with F F^T = covariance of X: the centred rows themselves while they are few, else Cholesky's."""
    return _centred(X).T if len(X) <= X.shape[1] else _cholesky(_covariance(X), "covariance")


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
    M = F1.T @ F2
    if _well_conditioned(F1) and _well_conditioned(
        F2
    ):  # faster; squaring would cost small singular values their digits
        trace_of_root = torch.linalg.eigvalsh(_gram(M)).clamp(min=0).sqrt().sum()
    else:
        trace_of_root = torch.linalg.svdvals(M).sum()
    distance = float((mu1 - mu2).square().sum() + trace1 + trace2 - 2 * trace_of_root)
    if distance < -1e-6 * float(trace1 + trace2):
        raise ArithmeticError(f"Fréchet distance came out as {distance}, more negative than rounding explains")
    return max(distance, 0.0)


def _well_conditioned(F: Tensor) -> bool:
    """Whether F is a Cholesky factor whose diagonal spans less than three orders of magnitude."""
    diagonal = F.diagonal()
    return F.shape[0] == F.shape[1] and bool(diagonal.min() > 1e-3 * diagonal.max()) and not bool(F.triu(1).any())


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
    return float64(mu), float64(sigma)
