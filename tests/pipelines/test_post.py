import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from diffgen.parametrization import KINDS, Level, to_x0
from diffgen.pipelines import APG, CFG, DynamicThreshold, Renorm, Rescale, ZeroStar, guide
from diffgen.pipelines.post import quantile
from diffgen.table import ROWS
from diffgen.tap import StepInfo

# shared/methods/guidance.md section 3: c = (3, 4), u = (1, 0), w = 3; CFG gives (7, 12)
C = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
U = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
SHAPES = [(3, 6, 5), (3, 4, 8, 8), (3, 4, 2, 3, 3)]


def step(x=C, level=None, kind="flow_prediction", index=0):
    return StepInfo(index, 5, 0, level or Level.flow(0.5), kind, x)


def random(*shape, n=2, seed=0, dtype=torch.float64):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).unbind()


def near(a, b):
    torch.testing.assert_close(a, torch.tensor([b], dtype=torch.float64), rtol=1e-9, atol=1e-9)


# --- rescale ----------------------------------------------------------------------------------------------------------


def test_rescale_gives_the_reference_value():
    near(Rescale(3.0)(C, U, step()), (3.08, 5.28))  # std(c) / std(g) = 1 / 5; 0.7 (7, 12) / 5 + 0.3 (7, 12)


@pytest.mark.parametrize("shape", SHAPES)
def test_rescale_is_diffusers_rescale_noise_cfg_around_any_rule(shape):
    c, u = random(*shape)
    inner = APG(7.5, momentum=0.0)
    expected = rescale_noise_cfg(inner(c, u, step(c)), c, 0.6)
    torch.testing.assert_close(Rescale(inner, 0.6)(c, u, step(c)), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(Rescale(inner, 0.0)(c, u, step(c)), inner(c, u, step(c)))
    assert torch.equal(Rescale(CFG(7.5), 0.6)(c, u, step(c)), CFG(7.5, rescale=0.6)(c, u, step(c)))


def test_a_constant_prediction_is_left_alone_where_diffusers_divides_by_zero():
    c, u = random(2, 4, 8, 8)
    zero = Rescale(ZeroStar(7.5), 0.7)(c, u, step(c))
    assert torch.equal(zero, torch.zeros_like(c))
    assert rescale_noise_cfg(zero, c, 0.7).isnan().all()


# --- renorm -----------------------------------------------------------------------------------------------------------


def test_renorm_caps_the_norm_of_a_sample_at_that_of_the_condition():
    near(Renorm(3.0)(C, U, step()), (7 * 5 / math.sqrt(193), 12 * 5 / math.sqrt(193)))
    near(Renorm(3.0, rho=2.0)(C, U, step()), (70 / math.sqrt(193), 120 / math.sqrt(193)))
    assert torch.equal(Renorm(3.0, rho=3.0)(C, U, step()), CFG(3.0)(C, U, step()))  # |g| = 13.9 < 15
    assert torch.equal(Renorm(0.0)(C, U, step()), U)  # shorter than c: a cap, not a match


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rho", [0.5, 1.0, 1e6])
def test_renorm_is_z_images_cfg_normalization(shape, rho):
    c, u = random(*shape)
    guided = CFG(7.5)(c, u, step(c))
    expected = ROWS["ZImagePipeline"].renorm(guided, c, {"cfg_normalization": rho})
    torch.testing.assert_close(Renorm(7.5, rho)(c, u, step(c)), expected, rtol=1e-12, atol=1e-12)


def test_renorm_over_the_last_dimension_is_qwen_images_and_gives_each_token_its_length_back():
    c, u = random(3, 6, 5)
    guided = Renorm(CFG(7.5), per="last")(c, u, step(c))
    expected = ROWS["QwenImagePipeline"].renorm(CFG(7.5)(c, u, step(c)), c, {})
    torch.testing.assert_close(guided, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(guided.norm(dim=-1), c.norm(dim=-1))
    assert (guided - c).norm() > 1
    near(Renorm(0.0, per="last")(C, 2 * U, step()), (5, 0))  # a match: it also lengthens


@pytest.mark.parametrize("per", ["sample", "last"])
def test_renorm_of_the_conditional_prediction_is_that_prediction(per):
    c, u = random(2, 6, 5)
    torch.testing.assert_close(Renorm(1.0, per=per)(c, u, step(c)), c, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("per", ["sample", "last"])
def test_renorm_of_zeros_is_no_division_by_zero(per):
    zero = torch.zeros_like(C)
    assert torch.equal(Renorm(3.0, per=per)(zero, zero, step()), zero)
    assert torch.equal(Renorm(3.0, per=per)(zero, U, step()), zero)  # |c| = 0
    assert torch.equal(Renorm(3.0, per=per)(C, 1.5 * C, step()), zero)  # g = 0


# --- dynamic thresholding ---------------------------------------------------------------------------------------------


def test_a_quantile_is_interpolated_between_the_absolute_values_of_a_sample():
    x = torch.tensor([[-4.0, 1.0, 0.0, 2.0, -3.0], [0.0, 0.0, 0.0, 0.0, -8.0]])
    assert quantile(x, 0.5).tolist() == [2.0, 0.0]
    assert quantile(x, 0.875).tolist() == [3.5, 4.0]
    assert quantile(x, 1.0).tolist() == [4.0, 8.0]


def test_values_beyond_the_percentile_are_clipped_and_the_rest_is_divided_by_it():
    """x0 = (-4, 1, 0, 2, -3): s = 3.5 at 0.875, so (-3.5, 1, 0, 2, -3) / 3.5."""
    x0 = torch.tensor([[-4.0, 1.0, 0.0, 2.0, -3.0]], dtype=torch.float64)
    pixels = DynamicThreshold(1.0, percentile=0.875, limit=1.0)
    near(pixels(x0, x0, step(x0, kind="sample")), (-1, 2 / 7, 0, 4 / 7, -6 / 7))
    near(DynamicThreshold(1.0, 0.875, limit=2.0)(x0, x0, step(x0, kind="sample")), (-2, 4 / 7, 0, 8 / 7, -12 / 7))
    inside = x0 / 10
    assert torch.equal(pixels(inside, inside, step(x0, kind="sample")), inside)  # s is no less than the limit


def test_without_a_limit_the_percentile_of_the_condition_takes_its_place():
    """Quantiles at 0.875: |c| 3.5; g = 2 c, so 7, and clamp(2 c, -7, 7) / 2."""
    c = torch.tensor([[-4.0, 1.0, 0.0, 2.0, -3.0]], dtype=torch.float64)
    rule = DynamicThreshold(2.0, percentile=0.875)
    near(rule(c, torch.zeros_like(c), step(c, kind="sample")), (-3.5, 1, 0, 2, -3))
    smaller = DynamicThreshold(0.5, percentile=0.875)(c, torch.zeros_like(c), step(c, kind="sample"))
    assert torch.equal(smaller, c / 2)  # it is never scaled up


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_thresholding_of_diffusers_schedulers(kind):
    (c, u, x), level = random(2, 3, 8, 8, n=3), Level(0.6, 0.8)
    scheduler = DDPMScheduler(thresholding=True, sample_max_value=1e9, dynamic_thresholding_ratio=0.9)
    guided = DynamicThreshold(7.5, percentile=0.9, limit=1.0)(c, u, step(x, level, kind))
    expected = scheduler._threshold_sample(to_x0(CFG(7.5)(c, u, step(x)), x, level, kind))
    torch.testing.assert_close(to_x0(guided, x, level, kind), expected, rtol=1e-10, atol=1e-10)
    assert expected.abs().max() == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [1.0, None])
def test_the_denoised_prediction_stays_in_range(kind, limit):
    (c, u, x), level = random(2, 4, 8, 8, n=3), Level(0.6, 0.8)
    guided = DynamicThreshold(APG(15.0, momentum=0.0), 0.95, limit)(c, u, step(x, level, kind))
    top = to_x0(guided, x, level, kind).abs().flatten(1).amax(1)
    expected = torch.ones(2).double() if limit else quantile(to_x0(c, x, level, kind), 0.95)
    torch.testing.assert_close(top, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_with_percentile_1_and_a_limit_above_all_it_is_the_rule_bit_for_bit(kind, dtype):
    c, u, x = random(2, 4, 8, 8, n=3, dtype=dtype)
    rule = DynamicThreshold(7.5, percentile=1.0, limit=1e6)
    assert torch.equal(rule(c, u, step(x, Level(0.6, 0.8), kind)), CFG(7.5)(c, u, step(x)))


def test_at_the_last_steps_and_for_zeros_the_result_is_finite():
    c, u, x = random(2, 4, 8, 8, n=3)
    for level in (Level.flow(0.0), Level.flow(1.0)):
        assert DynamicThreshold(7.5, limit=1.0)(c, u, step(x, level)).isfinite().all()
    zero = torch.zeros_like(c)
    for limit in (1.0, None):
        assert torch.equal(DynamicThreshold(7.5, limit=limit)(zero, zero, step(zero, kind="sample")), zero)


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Rescale(7.5), Renorm(7.5), DynamicThreshold(7.5), DynamicThreshold(7.5, limit=1.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_sample_is_guided_as_if_it_were_alone(rule, shape):
    c, u, x = random(*shape, n=3)
    whole = rule(c, u, step(x))
    torch.testing.assert_close(rule(c[1:2], u[1:2], step(x[1:2])), whole[1:2], rtol=1e-12, atol=1e-12)
    assert (whole - CFG(7.5)(c, u, step(x))).norm() > 0.1


@pytest.mark.parametrize("rule", [Renorm(7.5), DynamicThreshold(7.5)])
def test_half_precision_predictions_come_back_in_their_dtype(rule):
    c, u, x = random(2, 4, 8, 8, n=3, dtype=torch.bfloat16)
    guided = rule(c, u, step(x))
    assert guided.dtype == torch.bfloat16
    exact = rule(c.double(), u.double(), step(x.double()))
    assert float((guided.double() - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("rule", [Renorm(4.0), DynamicThreshold(4.0)])
def test_in_a_pipeline_they_change_the_result_and_cost_nothing(rule, scene, relative):
    s = scene("StableDiffusion3Pipeline")
    stock = s.run()
    with guide(s.pipe, rule) as run:
        assert relative(s.run(s.call), stock) > 1e-3
    assert run.nfe == 2 * s.STEPS


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (Rescale, {"phi": 1.5}, r"Rescale.phi must be in \[0, 1\], got 1.5"),
        (Renorm, {"rho": 0.0}, "Renorm.rho must be a number > 0, got 0.0"),
        (Renorm, {"rho": float("nan")}, "Renorm.rho"),
        (Renorm, {"per": "token"}, "Renorm.per must be 'sample' .* or 'last' .*, got 'token'"),
        (DynamicThreshold, {"percentile": 0.0}, r"DynamicThreshold.percentile must be in \(0, 1\], got 0.0"),
        (DynamicThreshold, {"percentile": 99.5}, "DynamicThreshold.percentile"),
        (DynamicThreshold, {"limit": 0.0}, "DynamicThreshold.limit must be a number > 0, or None .*, got 0.0"),
        (DynamicThreshold, {"limit": "auto"}, "DynamicThreshold.limit"),
    ],
)
def test_a_bad_argument_is_an_error_that_names_the_field(rule, options, message):
    with pytest.raises(ValueError, match=message):
        rule(4.0, **options)
