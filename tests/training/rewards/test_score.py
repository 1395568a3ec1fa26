"""Calling rewards and checking what comes back; the rewards that ship."""

import numpy as np
import pytest
import torch

from diffgen import registry
from diffgen.training.rewards.score import RewardError, score
from diffgen.worlds import shapes

PROMPTS = ["a", "b", "c"]


def one(result, on_invalid="error"):
    return score({"r": lambda samples, prompts, **columns: result}, None, PROMPTS, {}, on_invalid)["r"]


@pytest.mark.parametrize(
    "result", [[1, 2, 3], (1.0, 2.0, 3.0), np.array([1, 2, 3]), torch.tensor([1, 2, 3], dtype=torch.float64)]
)
def test_lists_arrays_and_tensors_become_float32(result):
    got = one(result)
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.tensor([1.0, 2, 3]))


def test_a_reward_may_not_keep_gradients():
    assert not one(torch.ones(3, requires_grad=True)).requires_grad


@pytest.mark.parametrize("result", ["good", None, ["a", "b", "c"], [[1], [2, 3]], object(), [1, None, 2]])
def test_what_is_no_number_is_refused_by_the_rewards_name(result):
    with pytest.raises(RewardError, match=r"reward 'r' must return 3 numbers, got "):
        one(result)


@pytest.mark.parametrize(("result", "shape"), [([1.0, 2], r"\[2\]"), (1.0, r"\[\]"), (torch.ones(3, 1), r"\[3, 1\]")])
def test_a_wrong_number_of_numbers_is_refused_with_both_shapes(result, shape):
    with pytest.raises(RewardError, match=rf"reward 'r' must return one number a sample, \[3\], got {shape}"):
        one(result)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_names_its_sample_or_becomes_nan(value):
    with pytest.raises(RewardError, match=rf"reward 'r' returned {value} for sample 2 \(prompt 'c'\), 1 of 3 in all"):
        one([1.0, 2.0, value])
    got = one([1.0, 2.0, value], "skip")
    assert got[:2].tolist() == [1, 2]
    assert got[2].isnan()


def test_a_reward_of_several_numbers_gives_each_a_name():
    got = score({"r": lambda s, p, **c: {"x": [1, 2, 3], "y": [4, 5, 6]}}, None, PROMPTS, {})
    assert {k: v.tolist() for k, v in got.items()} == {"r/x": [1, 2, 3], "r/y": [4, 5, 6]}


def test_a_reward_that_raises_keeps_its_own_error_as_the_cause():
    def broken(samples, prompts, **columns):
        raise KeyError("server")

    with pytest.raises(
        RewardError, match=r"reward 'r' raised KeyError: 'server' \(batch of 3, first prompt 'a'\)"
    ) as error:
        score({"r": broken}, None, PROMPTS, {})
    assert isinstance(error.value.__cause__, KeyError)


def test_columns_are_passed_by_name():
    got = score({"r": lambda s, p, answer, **c: answer}, None, PROMPTS, {"answer": [1, 2, 3], "other": ["x"] * 3})
    assert got["r"].tolist() == [1, 2, 3]


def test_the_shapes_verifier_and_its_dense_form_know_right_from_wrong():
    images, prompts = shapes.dataset(20, seed=1)
    samples = torch.from_numpy(images)
    names = ["shapes_verifier", "shapes_dense"]
    right = score({n: registry.build("reward", n) for n in names}, samples, prompts, {})
    wrong = score({n: registry.build("reward", n) for n in names}, samples, prompts[1:] + prompts[:1], {})
    assert torch.equal(right["shapes_verifier"], torch.ones(20))
    assert right["shapes_dense"].min() > 0.9
    assert wrong["shapes_verifier"].mean() < 0.2
    assert wrong["shapes_dense"].mean() < right["shapes_dense"].mean() - 0.2
    assert 0 <= wrong["shapes_dense"].min() <= wrong["shapes_dense"].max() <= 1


def test_jpeg_rewards_prefer_smooth_and_noisy_images():
    noise = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    samples = torch.stack([torch.full((3, 32, 32), 128, dtype=torch.uint8), noise])
    small, large = (
        registry.build("reward", name)(samples, ["", ""]) for name in ("jpeg_compressibility", "jpeg_incompressibility")
    )
    assert torch.equal(small, -large)
    assert large[1] > 2 * large[0] > 0
    rough = registry.build("reward", "jpeg_incompressibility", {"quality": 10})(samples, ["", ""])
    assert rough[1] < large[1]
