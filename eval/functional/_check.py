"""What every function checks before it computes, and how it walks over rows in float64 without a copy of the whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2048  # rows at a time; pairs are computed in blocks of at most BLOCK x BLOCK


def float64(x: Tensor) -> Tensor:
    x = x.detach()
    return (x.cpu() if x.device.type == "mps" else x).double()  # MPS has no float64


def row_blocks(X: Tensor) -> Iterator[Tensor]:
    """X [N,D] in blocks of BLOCK rows, float64."""
    return (float64(block) for block in X.split(BLOCK))


def features(X: Tensor, name: str, rows: int = 2, why: str = "") -> Tensor:
    """X itself, once it is known to be a finite real tensor [N,D] with at least `rows` rows; `why` says who needs them.

    Raises TypeError for what isn't a real tensor, ValueError for the rest (with the numbers of rows that aren't finite).
    """
    if not isinstance(X, Tensor):
        raise TypeError(f"{name} must be a tensor of features [N,D]; got {type(X).__name__}")
    if X.is_complex():
        raise TypeError(f"{name} must be real; got {X.dtype}")
    if X.ndim != 2 or X.shape[1] < 1:
        raise ValueError(f"{name} must be [N,D]; got shape {list(X.shape)}")
    if len(X) < rows:
        raise ValueError(f"{name} needs at least {rows} rows{why}; got {len(X)}")
    X = X.detach()
    bad = (~torch.cat([torch.isfinite(block).all(dim=1) for block in X.split(BLOCK)])).nonzero().flatten().tolist()
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ValueError(f"{name} must be finite; NaN or infinity in rows {bad[:10]}{more} of {len(X)}")
    return X


def same_width(**sets: Tensor) -> None:
    """Raise ValueError unless the named feature sets have equally many columns."""
    widths = [X.shape[1] for X in sets.values()]
    if len(set(widths)) > 1:
        got = " and ".join(f"D={width}" for width in widths)
        raise ValueError(f"{' and '.join(sets)} must have equally many features; got {got}")


def feature_pair(X: Tensor, Y: Tensor, names: tuple[str, str] = ("X", "Y")) -> tuple[Tensor, Tensor]:
    X, Y = features(X, names[0]), features(Y, names[1])
    same_width(**{names[0]: X, names[1]: Y})
    return X, Y


def mean(X: Tensor) -> Tensor:
    """Mean row [D] of X [N,D], float64."""
    return sum((block.sum(0) for block in row_blocks(X)), torch.tensor(0.0, dtype=torch.float64)) / len(X)


def whole(name: str, value: int, low: int) -> int:
    """value, once it is known to be an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}; got {value!r}")
    return value
