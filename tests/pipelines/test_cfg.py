import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from diffgen.parametrization import Level
from diffgen.pipelines import CFG, guide
from diffgen.tap import StepInfo


def step(x):
    return StepInfo(0, 1, 0, Level.flow(0.5), "flow_prediction", x)


def predictions(*shape, dtype=torch.float64):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype).unbind()


def test_cfg_extrapolates_from_the_unconditional_prediction():
    c, u = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
    assert CFG(3.0)(c, u, step(c)).tolist() == [[7.0, 12.0]]  # (1, 0) + 3 (2, 4)
    assert torch.equal(CFG(1.0)(c, u, step(c)), c)
    assert torch.equal(CFG(0.0)(c, u, step(c)), u)


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (2, 6, 5), (2, 4, 2, 3, 3)])
def test_rescale_is_diffusers_rescale_noise_cfg(shape):
    c, u = predictions(*shape)
    guided = u + 7.5 * (c - u)
    torch.testing.assert_close(CFG(7.5, rescale=0.7)(c, u, step(c)), rescale_noise_cfg(guided, c, 0.7))
    assert torch.equal(CFG(7.5, rescale=0.0)(c, u, step(c)), guided)


def test_full_rescale_has_the_standard_deviation_of_the_conditional_prediction():
    """c = (0, 2), u = (2, 0), w = 2: g = (-2, 4) with std 3 sqrt 2, std(c) = sqrt 2, so g / 3."""
    c, u = torch.tensor([[0.0, 2.0]]), torch.tensor([[2.0, 0.0]])
    torch.testing.assert_close(CFG(2.0, rescale=1.0)(c, u, step(c)), torch.tensor([[-2 / 3, 4 / 3]]))
    torch.testing.assert_close(CFG(2.0, rescale=0.5)(c, u, step(c)), torch.tensor([[-4 / 3, 8 / 3]]))


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "LTXPipeline"])
def test_rescale_in_a_pipeline_is_its_own_guidance_rescale(name, scene):
    s = scene(name)
    stock = s.run(guidance_rescale=0.7)
    assert not torch.equal(stock, s.run())
    with guide(s.pipe, CFG(4.0, rescale=0.7)):
        assert torch.equal(s.run(s.call), stock)


@pytest.mark.parametrize("rescale", [-0.1, 1.5, float("nan")])
def test_a_rescale_outside_0_to_1_is_an_error_that_names_the_field(rescale):
    with pytest.raises(ValueError, match=r"CFG.rescale must be in \[0, 1\], got"):
        CFG(4.0, rescale=rescale)
