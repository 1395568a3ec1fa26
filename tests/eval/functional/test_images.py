"""Pixel statistics: images whose values are known."""

import pytest
import torch

from diffgen.eval import functional as f


def image(*rows):
    return torch.tensor(rows, dtype=torch.uint8).permute(2, 0, 1)[None]


RED = image([[255, 0, 0]] * 2, [[255, 0, 0]] * 2)
CHECKER = image([[0] * 3, [255] * 3], [[255] * 3, [0] * 3])
GREY = image([[128] * 3] * 2, [[128] * 3] * 2)
TWO_ROWS = image([[200, 100, 0]] * 2, [[0, 0, 50]] * 2)


def test_image_statistics_equal_their_oracles():
    images = torch.cat([RED, CHECKER, GREY, TWO_ROWS])
    assert f.saturation(images).tolist() == pytest.approx([1, 0, 0, 1], abs=1e-12)
    assert f.contrast(images).tolist() == pytest.approx([0, 0.5, 0, 0.221176471], abs=1e-9)
    assert f.colourfulness(images).tolist() == pytest.approx([85.529600139, 0, 0, 133.016602311], abs=1e-8)
    assert f.clipping(images).tolist() == pytest.approx([1, 1, 0, 0.5], abs=1e-12)


def test_image_statistics_are_those_of_single_images_in_any_batch():
    images = torch.randint(0, 256, (70, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for statistic in (f.saturation, f.contrast, f.colourfulness, f.clipping):
        torch.testing.assert_close(statistic(images)[69:], statistic(images[69:]))
