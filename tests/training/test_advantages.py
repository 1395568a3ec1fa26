"""Group advantages. Oracles: methods/flow_grpo.md section 2, and torch.std."""

import functools
from types import SimpleNamespace

import pytest
import torch

from diffgen.training.advantages import combine, group_mean, group_std
from diffgen.training.advantages import group as grouped

REWARDS = torch.tensor([1.0, 0, 0, 1, 0.5, 0.5, 0.5, 0.5])
GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


def advantage(rewards, group, **options):
    """As the trainer computes it."""
    rollout = SimpleNamespace(group=group, rewards={"r": rewards})
    return combine(rollout, {"r": 1.0}, functools.partial(grouped, **options))


def test_the_group_std_gives_flow_grpos_numbers():
    a = 0.99980004
    torch.testing.assert_close(
        advantage(REWARDS, GROUP), torch.tensor([a, -a, -a, a, 0, 0, 0, 0]), atol=1e-8, rtol=1e-7
    )


def test_the_std_of_the_whole_batch_gives_flow_grpos_numbers():
    a = 1.4138136755
    got = advantage(REWARDS, GROUP, global_std=True)
    torch.testing.assert_close(got, torch.tensor([a, -a, -a, a, 0, 0, 0, 0]), atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("std", ["population", "unbiased"])
def test_the_std_is_that_of_torch(std):
    values = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    group = torch.tensor([0, 1, 2] * 4)
    correction = 1 if std == "unbiased" else 0
    expected = torch.stack([values[group == g].std(correction=correction) for g in range(3)])[group]
    torch.testing.assert_close(group_std(values, group, std), expected)
    torch.testing.assert_close(
        group_mean(values, group), torch.stack([values[group == g].mean() for g in range(3)])[group]
    )
    mean = group_mean(values, group)
    expected = ((values - mean) / (expected + 1e-4)).float()
    torch.testing.assert_close(advantage(values, group, std=std), expected)


def test_an_unbiased_group_of_one_is_zero_and_not_nan():
    got = advantage(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 1]), std="unbiased")
    assert got[0] == 0
    assert got[1] == -got[2] != 0


def test_an_unknown_std_is_named():
    with pytest.raises(ValueError, match=r"std must be 'population' or 'unbiased', got 'sample'"):
        advantage(REWARDS, GROUP, std="sample")


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("global_std", [False, True])
def test_a_group_that_is_constant_up_to_rounding_is_exactly_zero(scale, global_std):
    """0.1 + 0.2 and 0.3 are neighbours in float32; without an eps they would become +-1."""
    third = torch.tensor([0.1]) + torch.tensor([0.2])
    values = torch.cat([third, torch.tensor([0.3]), third, torch.nextafter(third, torch.tensor([0.0]))]) * scale
    rewards = torch.cat([values, torch.tensor([1.0, 2, 3, 4]) * scale])
    got = advantage(rewards, GROUP, eps=0.0, global_std=global_std)
    assert torch.equal(got[:4], torch.zeros(4))
    assert (got[4:] != 0).all()


def test_a_small_true_difference_is_not_taken_for_rounding():
    got = advantage(torch.tensor([1.0, 1.00001]), torch.tensor([0, 0]), eps=0.0)
    torch.testing.assert_close(got, torch.tensor([-1.0, 1.0]))


def test_nan_is_left_out_of_the_statistics_and_gets_zero():
    rewards = torch.tensor([1.0, 0, torch.nan, 0, 1, torch.nan, torch.nan])
    group = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    got = advantage(rewards, group)
    valid = ~rewards.isnan()
    torch.testing.assert_close(got[valid], advantage(rewards[valid], group[valid]))
    assert torch.equal(got[~valid], torch.zeros(3))
    assert torch.equal(advantage(torch.full((4,), torch.nan), torch.zeros(4, dtype=torch.long)), torch.zeros(4))


def test_advantages_are_clipped():
    rewards = torch.tensor([0.0] * 99 + [1.0])
    group = torch.zeros(100, dtype=torch.long)
    assert advantage(rewards, group, clip=100).max() > 9
    assert advantage(rewards, group).max() == 5
    assert advantage(-rewards, group, clip=2).min() == -2


def test_the_order_of_samples_does_not_matter():
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(1))
    group = torch.tensor([0, 1, 2] * 4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(advantage(rewards, group)[order], advantage(rewards[order], group[order]))


def test_each_reward_is_normalised_by_itself_before_weights_apply():
    """So the scale of one reward can't drown another; and a weighted sum of raw rewards is something else."""
    generator = torch.Generator().manual_seed(3)
    a, b = torch.rand(8, generator=generator), 1000 * torch.rand(8, generator=generator)
    got = combine(SimpleNamespace(group=GROUP, rewards={"a": a, "b": b}), {"a": 1.0, "b": 0.5}, grouped)
    torch.testing.assert_close(got, advantage(a, GROUP) + 0.5 * advantage(b, GROUP))
    assert (got - advantage(a + 0.5 * b, GROUP)).abs().max() > 0.1


def test_any_advantage_gets_zero_where_a_reward_is_nan_or_equal_in_its_group():
    """A new advantage function needn't know: combine sees to it."""

    def leave_one_out(rewards, group, rollout=None):
        return rewards - group_mean(rewards, group).float() + 1

    rollout = SimpleNamespace(
        group=torch.tensor([0, 0, 0, 1, 1, 2, 2]),
        rewards={"r": torch.tensor([1.0, 0.0, torch.nan, 0.3, 0.3, 1.0, torch.nan])},
    )
    got = combine(rollout, {"r": 2.0}, leave_one_out)
    assert got.tolist() == [3.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
