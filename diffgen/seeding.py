"""Every random number of a run comes from a hash of what it is for, so results don't depend on order or on processes."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*parts: int | str) -> int:
    """63-bit seed from any parts, for example (run seed, update, prompt uid, sample index)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """CPU generator: the same numbers whatever the device of the run."""
    return torch.Generator().manual_seed(seed_of(*parts))
