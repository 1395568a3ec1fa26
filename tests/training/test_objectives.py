"""The clipped loss, computed by hand: rho = exp(logp - old), c = 0.2."""

import math

import pytest
import torch

from diffgen.training.objectives import clipped


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [
        (2.0, 1.0, -2.0, -2.0),
        (2.0, 1.5, -2.4, 0.0),  # above the range and A > 0: clipped at 1.2, no gradient
        (2.0, 0.5, -1.0, -1.0),  # below the range and A > 0: the unclipped term is larger
        (-2.0, 1.5, 3.0, 3.0),  # above the range and A < 0: the unclipped term is larger
        (-2.0, 0.5, 1.6, 0.0),  # below the range and A < 0: clipped at 0.8, no gradient
        (-2.0, 1.0, 2.0, 2.0),
        (0.0, 3.0, 0.0, 0.0),
    ],
)
def test_the_loss_is_the_one_computed_by_hand(advantage, ratio, loss, gradient):
    old = torch.tensor([[-0.7]])
    logp = (old + math.log(ratio)).requires_grad_()
    got = clipped(logp, old, torch.tensor([[advantage]]), clip_range=0.2)
    assert got.shape == (1, 1)
    torch.testing.assert_close(got.item(), loss)
    got.sum().backward()
    torch.testing.assert_close(logp.grad.item(), gradient)


def test_at_ratio_one_loss_and_gradient_are_minus_the_advantage():
    advantage = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    old = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    logp = old.clone().requires_grad_()
    loss = clipped(logp, old, advantage)
    assert torch.equal(loss, -advantage)
    loss.sum().backward()
    torch.testing.assert_close(logp.grad, -advantage)


def test_the_upper_bound_can_be_another():
    old, one = torch.zeros(1, 1), torch.ones(1, 1)
    for ratio, bound in [(1.3, 1.28), (0.5, 0.5)]:
        logp = torch.full((1, 1), math.log(ratio))
        got = clipped(logp, old, one, clip_range=0.2, clip_range_high=0.28)
        torch.testing.assert_close(got.item(), -bound)
    got = clipped(torch.full((1, 1), math.log(0.5)), old, -one, clip_range=0.2, clip_range_high=0.28)
    torch.testing.assert_close(got.item(), 0.8)
