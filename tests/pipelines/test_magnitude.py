import math

import pytest
import torch

from diffgen.parametrization import Level
from diffgen.pipelines import CFG, MaG
from diffgen.tap import StepInfo

C = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
U = torch.tensor([[1.0, 0.0]], dtype=torch.float64)


def step(x=C):
    return StepInfo(0, 1, 0, Level.flow(0.5), "flow_prediction", x)


def random(*shape, dtype=torch.float64):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype).unbind()


def test_the_scale_falls_with_the_distance_of_the_predictions():
    """shared/methods/guidance.md section 3: |d| / |u| = sqrt(20) = 4.4721."""
    torch.testing.assert_close(MaG(3.0)(C, U, step()), C, rtol=1e-14, atol=1e-14)  # w = 1 + 2 exp(-35.8)
    half = MaG(3.0, alpha=math.log(2) / math.sqrt(20))  # w = 1 + 2 / 2
    torch.testing.assert_close(half(C, U, step()), torch.tensor([[5.0, 8.0]]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_with_alpha_0_it_is_cfg_bit_for_bit(dtype):
    c, u = random(2, 4, 8, 8, dtype=dtype)
    assert torch.equal(MaG(7.5, alpha=0.0)(c, u, step(c)), CFG(7.5)(c, u, step(c)))
    assert not torch.equal(MaG(7.5, alpha=0.1)(c, u, step(c)), CFG(7.5)(c, u, step(c)))


def test_scale_1_is_the_conditional_prediction():
    c, u = random(2, 4, 8, 8)
    torch.testing.assert_close(MaG(1.0)(c, u, step(c)), c, rtol=1e-14, atol=1e-14)


def test_zero_predictions_are_no_division_by_zero():
    zero = torch.zeros_like(C)
    assert torch.equal(MaG()(zero, zero, step()), zero)
    assert torch.equal(MaG()(C, zero, step()), C)  # w_t = 1
    assert torch.equal(MaG()(C, C, step()), C)
    torch.testing.assert_close(MaG(alpha=1.0)(zero, C, step()), -9 * math.exp(-1) * C)  # w_t = 1 + 9 / e


@pytest.mark.parametrize("shape", [(3, 6, 5), (3, 4, 8, 8), (3, 4, 2, 3, 3)])
def test_each_sample_is_guided_as_if_it_were_alone(shape):
    c, u = random(*shape)
    whole = MaG(alpha=0.5)(c, u, step(c))
    assert torch.equal(MaG(alpha=0.5)(c[1:2], u[1:2], step(c[1:2])), whole[1:2])


def test_half_precision_predictions_come_back_in_their_dtype_and_are_computed_in_float64():
    c, u = random(2, 4, 8, 8, dtype=torch.bfloat16)
    exact = MaG(alpha=0.5)(c.double(), u.double(), step(c))
    assert torch.equal(MaG(alpha=0.5)(c, u, step(c)), exact.bfloat16())


def test_gradients_are_finite_also_where_both_predictions_are_the_same_or_zero():
    c, u = (x.requires_grad_() for x in random(2, 4, 8, 8))
    MaG(alpha=0.5)(c, u, step(c)).sum().backward()
    assert c.grad.isfinite().all()
    assert u.grad.any()
    for same in (c.detach(), torch.zeros_like(c)):
        same.requires_grad_()
        MaG()(same, same, step(c)).sum().backward()
        assert same.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [-1.0, float("inf"), float("nan"), "8", True])
def test_a_bad_alpha_is_an_error_that_names_the_field(alpha):
    with pytest.raises(ValueError, match=r"MaG.alpha must be a number >= 0, got "):
        MaG(alpha=alpha)


def test_a_bad_scale_is_an_error_that_names_the_field():
    with pytest.raises(ValueError, match=r"MaG.scale must be a number in \[0, 1000\], got -1.0"):
        MaG(-1.0)
