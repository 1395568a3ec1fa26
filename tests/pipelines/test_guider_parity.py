"""Each two-branch guider of diffusers 0.42, five steps with its state, against our rule on the raw predictions."""

import contextlib
import functools

import pytest
import torch
from diffusers import guiders

from diffgen.parametrization import Level
from diffgen.pipelines import APG, CFG, FDG, TCFG, Interval, MaG, Rescale, ZeroStar
from diffgen.tap import StepInfo

STEPS = 5
W = 7.5
native = functools.partial(APG, W, space="native")
hunyuan = functools.partial(APG, 10.0, norm_threshold=8.0, space="native", form="diffusers", cfg_steps=2, cfg_scale=3.5)
APG_OPTIONS = {
    "adaptive_projected_guidance_momentum": -0.5,
    "adaptive_projected_guidance_rescale": 8.0,
    "eta": 0.3,
}
ORIGINAL = {"guidance_scale": W - 1, "use_original_formulation": True}

# name -> (their guider, our rule, dimensions of the predictions)
PAIRS = {
    "cfg": (functools.partial(guiders.ClassifierFreeGuidance, guidance_scale=W), CFG(W), (3, 4, 5)),
    "cfg, original": (functools.partial(guiders.ClassifierFreeGuidance, **ORIGINAL), CFG(W), (3, 4, 5)),
    "zero star": (
        functools.partial(guiders.ClassifierFreeZeroStarGuidance, guidance_scale=W, zero_init_steps=2),
        ZeroStar(W, zero_steps=2),
        (3, 4, 5),
    ),
    "zero star, original": (
        functools.partial(guiders.ClassifierFreeZeroStarGuidance, zero_init_steps=0, **ORIGINAL),
        ZeroStar(W, zero_steps=0),
        (3, 4, 5),
    ),
    "apg": (
        functools.partial(guiders.AdaptiveProjectedGuidance, guidance_scale=W, **APG_OPTIONS),
        native(eta=0.3, norm_threshold=8.0, form="diffusers"),
        (3, 4, 5),
    ),
    "apg, original": (
        functools.partial(guiders.AdaptiveProjectedGuidance, **ORIGINAL, **APG_OPTIONS),
        native(eta=0.3, norm_threshold=8.0),
        (3, 4, 5),
    ),
    "apg, without momentum": (
        functools.partial(guiders.AdaptiveProjectedGuidance, guidance_scale=W, eta=0.0),
        native(momentum=0.0, norm_threshold=15.0, form="diffusers"),
        (3, 4, 5),
    ),
    "apg mix": (
        functools.partial(
            guiders.AdaptiveProjectedMixGuidance,
            guidance_scale=3.5,
            adaptive_projected_guidance_scale=10.0,
            adaptive_projected_guidance_rescale=8.0,
            adaptive_projected_guidance_start_step=1,
        ),
        hunyuan(),
        (3, 4, 5),
    ),
    "tcfg": (functools.partial(guiders.TangentialClassifierFreeGuidance, guidance_scale=W), TCFG(W), (3, 4, 5)),
    "tcfg, original": (functools.partial(guiders.TangentialClassifierFreeGuidance, **ORIGINAL), TCFG(W), (3, 4, 5)),
    "mag": (functools.partial(guiders.MagnitudeAwareGuidance, alpha=0.9), MaG(10.0, alpha=0.9), (3, 4, 5)),
    "mag, original": (
        functools.partial(guiders.MagnitudeAwareGuidance, alpha=0.9, **ORIGINAL),
        MaG(W, alpha=0.9),
        (3, 4, 5),
    ),
}
# name -> (options of FrequencyDecoupledGuidance, our rule); it needs kornia, and four dimensions
FREQUENCY = {
    "two levels": ({"guidance_scales": [10.0, 5.0]}, FDG()),
    "three levels": ({"guidance_scales": [9.0, 4.0, 2.0]}, FDG((9.0, 4.0, 2.0))),
    "projected": (
        {
            "guidance_scales": [9.0, 3.0],
            "use_original_formulation": True,
            "parallel_weights": [0.2, 0.5],
        },
        FDG((10.0, 4.0), parallel=(0.2, 0.5), space="native"),
    ),
}
SHAPES = {3: (2, 6, 32), 4: (2, 4, 8, 8), 5: (2, 4, 3, 4, 4)}
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-12}


@contextlib.contextmanager
def as_meant(dtype):
    """Their code, where it runs: Zero* and TCFG convert all to float32, so at float64 .float() gives float64, and
    MagnitudeAwareGuidance's torch.norm(x, dim=[1, 2, 3]) is an error in torch 2.14 (a matrix norm over three dimensions)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "norm", torch.linalg.vector_norm)
        if dtype == torch.float64:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def compare(guider, rule, shape, dtype, start, stop, phi):
    if (start, stop) != (0.0, 1.0):  # their zero-init acts outside the interval too
        inside = functools.partial(Interval, start=start, stop=stop)
        rule = ZeroStar(inside(rule.rule), rule.zero_steps) if isinstance(rule, ZeroStar) else inside(rule)
    if phi:
        rule = Rescale(rule, phi)
    state, guided = {}, 0
    for i in range(STEPS):
        c, u = torch.randn(2, *shape, generator=torch.Generator().manual_seed(i), dtype=dtype).unbind()
        u = u + 0.7 * c  # similar, as predictions are
        guider.set_state(i, STEPS, torch.tensor(1000 - 200 * i))
        guider.prepare_inputs({})  # empties the momentum at step 0
        with as_meant(dtype):
            theirs = guider.forward(c, u).pred
        ours = rule(c, u, StepInfo(i, STEPS, 0, Level.flow(0.5), "flow_prediction", c, state))
        if phi and not ours.any():  # zero-init, rescaled: 0 / 0 of theirs
            assert theirs.isnan().all()
            continue
        assert ours.dtype == dtype
        assert float((ours - theirs).abs().max()) <= TOLERANCE[dtype] * float(theirs.abs().max()), i
        guided += not torch.allclose(ours, c)
    assert guided >= 2


@pytest.mark.parametrize("phi", [0.0, 0.7])
@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (0.2, 0.8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "ndim"), [(name, ndim) for name, pair in PAIRS.items() for ndim in pair[2]])
def test_a_guider_of_diffusers_and_our_rule_agree_over_five_steps(name, ndim, dtype, start, stop, phi):
    guider, rule, _ = PAIRS[name]
    guider = guider(start=start, stop=stop, guidance_rescale=phi)
    compare(guider, rule, SHAPES[ndim], dtype, start, stop, phi)


@pytest.mark.parametrize("phi", [0.0, 0.7])
@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (0.2, 0.8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(FREQUENCY))
def test_frequency_decoupled_guidance_and_ours_agree_over_five_steps(name, dtype, start, stop, phi):
    pytest.importorskip("kornia")
    options, rule = FREQUENCY[name]
    guider = guiders.FrequencyDecoupledGuidance(**options, start=start, stop=stop, guidance_rescale=phi)
    compare(guider, rule, (2, 4, 16, 16), dtype, start, stop, phi)


def test_the_defaults_of_a_guider_that_we_keep_are_still_its_defaults():
    assert (MaG().scale, MaG().alpha) == (10.0, 8.0)
    mag = guiders.MagnitudeAwareGuidance()
    assert (mag.guidance_scale, mag.alpha) == (10.0, 8.0)
    assert guiders.ClassifierFreeZeroStarGuidance().zero_init_steps == ZeroStar(W).zero_steps == 1
    mix = guiders.AdaptiveProjectedMixGuidance()
    assert mix.adaptive_projected_guidance_start_step == 5  # cfg_steps=6
    assert mix.guidance_scale == APG().cfg_scale == 3.5
