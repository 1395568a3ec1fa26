"""Fixture F of the specification, closed-form sets and seeded noise, for all files of this folder."""

import pytest
import torch

ROW, COLUMN = torch.arange(1, 16, dtype=torch.float64)[:, None], torch.arange(1, 5, dtype=torch.float64)[None, :]


@pytest.fixture(scope="session", name="X")
def fixture_x():
    return torch.sin(1.3 * ROW[:12] * COLUMN)


@pytest.fixture(scope="session", name="Y")
def fixture_y():
    return torch.cos(0.7 * ROW * (COLUMN + 1)) + 0.2


@pytest.fixture(scope="session", name="t")
def rows():
    return lambda *values: torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="session", name="normal")
def gaussian_rows():
    def normal(n, d, seed=0):
        return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return normal
