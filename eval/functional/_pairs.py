"""All pairs of rows, in blocks of at most BLOCK x BLOCK, float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from diffgen.eval.functional._check import BLOCK, float64

# Squared distances that differ by less than this share of |x|^2 + |y|^2 (centred) are equal: rounding of the blocks.
TIE = 1e-13


def squared_distances(
    X: Tensor, Y: Tensor, centre: Tensor, slack: float = 0.0, upper: bool = False
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows of X, rows of Y, block) with block_ij = (1 - slack)(|x_i|^2 + |y_j|^2) - 2 x_i.y_j, rows minus `centre` [D].

    Centring changes no distance and prevents cancellation; the clip at 0 is left to the caller. With `upper` only the
    blocks on and above the diagonal come, for sums over a symmetric matrix.
    """
    for i in tqdm(range(0, len(X), BLOCK), desc="distances", delay=2, leave=False):
        x = float64(X[i : i + BLOCK]) - centre
        for j in range(i if upper else 0, len(Y), BLOCK):
            y = float64(Y[j : j + BLOCK]) - centre
            norms = x.square().sum(1)[:, None] + y.square().sum(1)[None, :]
            yield slice(i, i + len(x)), slice(j, j + len(y)), norms.mul_(1 - slack).addmm_(x, y.T, alpha=-2)


def units(block: Tensor) -> tuple[Tensor, Tensor]:
    """Rows scaled to length 1 in float64, and which rows are zero (bool [B]); these stay zero."""
    block = float64(block)
    largest = block.abs().amax(dim=1, keepdim=True)  # first, so that squares neither overflow nor vanish
    zero = largest == 0
    scaled = block / largest.where(~zero, 1.0)
    return scaled / scaled.norm(dim=1, keepdim=True).where(~zero, 1.0), zero[:, 0]


def unit_rows(*sets: Tensor) -> list[Tensor]:
    """The sets with rows scaled to length 1; zero rows, if any set has them, point along one additional common axis."""
    scaled = [units(X) for X in sets]
    if not any(bool(zero.any()) for _, zero in scaled):
        return [X for X, _ in scaled]
    return [torch.cat([X, zero[:, None].double()], dim=1) for X, zero in scaled]
