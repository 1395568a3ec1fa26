import pytest
import torch

from diffgen import registry
from diffgen.parametrization import Level, to_x0
from diffgen.pipelines import CFG, FDG, guide
from diffgen.pipelines.frequency import pyramid, rebuild
from diffgen.tap import StepInfo


def step(x, level=None, kind="flow_prediction"):
    return StepInfo(0, 1, 0, level or Level.flow(0.5), kind, x)


def random(*shape, n=2, seed=0, dtype=torch.float64):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).unbind()


def paper(c, u, scales, weights, pyrup, build):
    """Algorithm 2 of arXiv 2506.19713, with kornia's functions."""
    levels = []
    for p_c, p_u, w, parallel in zip(build(c, len(scales)), build(u, len(scales)), scales, weights):
        e = torch.nn.functional.normalize(p_c.flatten(1), dim=1).view_as(p_c)
        d = p_c - p_u
        along = (d * e).flatten(1).sum(1).view(-1, 1, 1, 1) * e
        levels.append(p_c + (w - 1) * (parallel * along + d - along))
    result = levels[-1]
    for level in levels[-2::-1]:
        result = pyrup(result) + level
    return result


@pytest.mark.parametrize("size", [(16, 16), (8, 32), (24, 16)])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_pyramid_is_kornias(size, levels):
    kornia = pytest.importorskip("kornia")
    x, _ = random(2, 3, *size)
    theirs = kornia.geometry.transform.build_laplacian_pyramid(x, levels)
    ours = pyramid(x.reshape(6, 1, *size), levels)
    assert len(ours) == len(theirs) == levels
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.view_as(b), b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["flow_prediction", "epsilon", "v_prediction", "sample"])
def test_it_is_the_papers_algorithm_on_denoised_predictions(kind):
    kornia = pytest.importorskip("kornia")
    (c, u, x), level = random(2, 4, 16, 16, n=3), Level(0.6, 0.8)
    guided = FDG((10.0, 5.0, 2.0), parallel=(0.2, 0.5, 1.0))(c, u, step(x, level, kind))
    d_c, d_u = (to_x0(out, x, level, kind) for out in (c, u))
    functions = kornia.geometry.pyrup, kornia.geometry.transform.build_laplacian_pyramid
    expected = paper(d_c, d_u, (10.0, 5.0, 2.0), (0.2, 0.5, 1.0), *functions)
    torch.testing.assert_close(to_x0(guided, x, level, kind), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(3, 3), (4, 7), (5, 8), (13, 21), (96, 64)])
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_a_pyramid_is_rebuilt_exactly_whatever_its_size(size, levels):
    x, _ = random(2, 1, *size)
    if levels > 1 and min(size) < 3 << (levels - 2):
        with pytest.raises(RuntimeError):  # FDG refuses it before, see below
            pyramid(x, levels)
        return
    parts = pyramid(x, levels)
    assert [tuple(p.shape[-2:]) for p in parts] == [(size[0] >> i, size[1] >> i) for i in range(levels)]
    torch.testing.assert_close(rebuild(parts), x, rtol=1e-13, atol=1e-13)


def test_a_constant_is_in_the_lowest_level_alone_and_a_checkerboard_in_the_highest():
    flat = torch.full((1, 1, 8, 8), 3.0)
    high, low = pyramid(flat, 2)
    assert high.abs().max() < 1e-6
    torch.testing.assert_close(low, torch.full((1, 1, 4, 4), 3.0))
    checkers = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)[None, None]
    high, low = pyramid(checkers, 2)
    assert low.abs().max() < 1e-6
    torch.testing.assert_close(high, checkers)


def test_each_band_of_frequencies_has_its_own_scale():
    flat = torch.full((1, 2, 8, 8), 1.0)
    checkers = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4).expand(1, 2, 8, 8)
    zero = torch.zeros_like(flat)
    rule = FDG((10.0, 5.0))
    torch.testing.assert_close(rule(flat, zero, step(flat)), 5 * flat)
    torch.testing.assert_close(rule(checkers, zero, step(flat)), 10 * checkers)
    torch.testing.assert_close(rule(2 * flat + checkers, flat, step(flat)), 6 * flat + 10 * checkers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_with_equal_scales_it_is_cfg_bit_for_bit(dtype):
    c, u = random(2, 4, 8, 8, dtype=dtype)
    for scales in ((7.5,), (7.5, 7.5), (7.5, 7.5, 7.5)):
        assert torch.equal(FDG(scales)(c, u, step(c)), CFG(7.5)(c, u, step(c)))
    packed = c.flatten(2)
    assert torch.equal(FDG((7.5, 7.5))(packed, packed + 1, step(packed)), CFG(7.5)(packed, packed + 1, step(packed)))


def test_nearly_equal_scales_are_nearly_cfg_by_way_of_the_pyramid():
    c, u = random(2, 4, 8, 8)
    torch.testing.assert_close(FDG((7.5, 7.5 + 1e-9))(c, u, step(c)), CFG(7.5)(c, u, step(c)), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        FDG((7.5, 7.5), parallel=1 - 1e-9)(c, u, step(c)), CFG(7.5)(c, u, step(c)), rtol=1e-7, atol=1e-7
    )


def test_scales_of_1_are_the_conditional_prediction():
    c, u = random(2, 4, 8, 8)
    assert torch.equal(FDG((1.0, 1.0), parallel=0.0)(c, u, step(c)), c)
    torch.testing.assert_close(FDG((1.0, 1.0))(c, u, step(c)), c, rtol=1e-14, atol=1e-14)
    low_only = FDG((1.0, 3.0))(c, u, step(c)) - c
    assert low_only.norm() > 1


def test_the_spaces_differ_only_where_something_is_projected():
    c, u, x = random(2, 4, 8, 8, n=3)
    for parallel, same in ((1.0, True), (0.5, False)):
        rules = [FDG((6.0, 3.0), parallel=parallel, space=space) for space in ("x0", "native")]
        a, b = (rule(c, u, step(x)) for rule in rules)
        assert torch.allclose(a, b) is same


def test_a_single_level_without_its_parallel_part_is_orthogonal_to_the_prediction():
    c, u = random(2, 4, 8, 8)
    update = FDG((3.0,), parallel=0.0, space="native")(c, u, step(c)) - c
    assert (update * c).flatten(1).sum(1).abs().max() < 1e-10
    assert update.norm() > 1


def test_frames_of_a_video_are_filtered_one_by_one():
    c, u = random(2, 4, 3, 8, 8)
    whole = FDG()(c, u, step(c))
    for f in range(3):
        torch.testing.assert_close(
            whole[:, :, f], FDG()(c[:, :, f], u[:, :, f], step(c[:, :, f])), rtol=1e-12, atol=1e-12
        )


def test_each_sample_is_guided_as_if_it_were_alone():
    c, u = random(3, 4, 8, 8)
    rule = FDG(parallel=0.3)
    whole = rule(c, u, step(c))
    torch.testing.assert_close(rule(c[1:2], u[1:2], step(c[1:2])), whole[1:2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(3, 3), (5, 7), (9, 4)])
def test_small_and_odd_sizes_keep_their_shape(size):
    c, u = random(2, 4, *size)
    guided = FDG()(c, u, step(c))
    assert guided.shape == c.shape
    assert guided.isfinite().all()


def test_half_precision_predictions_come_back_in_their_dtype():
    c, u = random(2, 4, 8, 8, dtype=torch.bfloat16)
    for rule in (FDG(), FDG(parallel=0.5)):
        guided = rule(c, u, step(c))
        assert guided.dtype == torch.bfloat16
        exact = rule(c.double(), u.double(), step(c.double()))
        assert float((guided.double() - exact).norm() / exact.norm()) < 0.02


def test_zero_predictions_stay_zero():
    zero = torch.zeros(1, 4, 8, 8)
    assert torch.equal(FDG(parallel=0.0, space="native")(zero, zero, step(zero)), zero)


@pytest.mark.parametrize(
    ("size", "scales", "message"),
    [
        ((2, 8), (10.0, 5.0), "FDG with 2 scales needs a grid of at least 3 x 3, got 2 x 8"),
        ((8, 5), (10.0, 5.0, 2.0), "FDG with 3 scales needs a grid of at least 6 x 6, got 8 x 5"),
    ],
)
def test_a_grid_that_is_too_small_for_the_levels_is_an_error(size, scales, message):
    c, u = random(1, 4, *size)
    with pytest.raises(ValueError, match=message):
        FDG(scales)(c, u, step(c))


@pytest.mark.filterwarnings("ignore:transformer is guidance-distilled")
def test_packed_latents_are_an_error_also_in_a_pipeline(scene):
    c, u = random(2, 6, 5)
    message = r"FDG needs predictions on a spatial grid, .* got \(2, 6, 5\): packed latents"
    with pytest.raises(ValueError, match=message):
        FDG()(c, u, step(c))
    s = scene("FluxPipeline")
    with guide(s.pipe, FDG()), pytest.raises(ValueError, match="FDG needs predictions on a spatial grid"):
        s.run(s.call)


def test_in_a_pipeline_equal_scales_are_the_stock_result_and_others_are_not(scene, relative):
    s = scene("StableDiffusion3Pipeline")
    stock = s.run()
    with guide(s.pipe, FDG((4.0, 4.0))):
        assert torch.equal(s.run(s.call), stock)
    with guide(s.pipe, FDG((4.0, 2.0))):
        assert relative(s.run(s.call), stock) > 1e-3


def test_the_scale_of_a_call_is_the_largest_one_and_the_others_keep_their_ratio():
    rule = FDG((10.0, 5.0), parallel=0.5)
    assert rule.scale == 10.0
    assert rule.active
    assert rule.with_scale(6.0) == FDG((6.0, 3.0), parallel=0.5)
    assert FDG((0.7, 7.3, 7.3)).with_scale(4.1).scales[1:] == (4.1, 4.1)
    assert FDG((0.0, 0.0)).with_scale(3.0).scales == (3.0, 3.0)
    assert FDG((1.0, 0.5)).active  # below 1 is a scale, too
    assert not FDG((1.0, 1.0)).active


def test_a_config_can_name_it_with_lists():
    assert registry.build("guidance", "fdg", {"scales": [8, 4], "parallel": [0.5, 1]}) == FDG((8.0, 4.0), (0.5, 1.0))
    assert FDG([8.0, 4.0]).scales == (8.0, 4.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"scales": ()},
            r"FDG.scales must be numbers in \[0, 1000\], from the highest frequency to the lowest, got \(\)",
        ),
        ({"scales": 5.0}, "FDG.scales must be .* got 5.0"),
        ({"scales": (5.0, -1.0)}, r"FDG.scales .* got \(5.0, -1.0\)"),
        ({"scales": (5.0, float("nan"))}, "FDG.scales"),
        ({"scales": ("high", "low")}, "FDG.scales"),
        (
            {"parallel": (1.0,)},
            r"FDG.parallel must be a finite number, or 2 of them: one for each of the scales, got \(1.0,\)",
        ),
        ({"parallel": float("inf")}, "FDG.parallel"),
        ({"parallel": "off"}, "FDG.parallel"),
        ({"space": "eps"}, "FDG.space must be 'x0' or 'native', got 'eps'"),
    ],
)
def test_a_bad_argument_is_an_error_that_names_the_field(options, message):
    with pytest.raises(ValueError, match=message):
        FDG(**options)
