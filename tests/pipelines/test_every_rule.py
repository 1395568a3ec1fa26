"""Every registered rule on every tiny pipeline: it runs, or says why it cannot; where it is neutral, it is CFG."""

import math

import pytest
import torch

from diffgen import registry
from diffgen.parametrization import Level
from diffgen.pipelines import (
    APG,
    CFG,
    FDG,
    PAG,
    SEG,
    SLG,
    AdaptiveGuidance,
    Interval,
    LinearAG,
    MaG,
    Rescale,
    Scheduled,
    guide,
    specs,
)
from diffgen.pipelines.directions import ZeroStar
from diffgen.tap import StepInfo
from diffgen.tiny import TINY

pytestmark = pytest.mark.filterwarnings("ignore:.*guidance-distilled")
NAMES = [method.name for method in registry.methods("guidance")]
PACKED = ("FluxPipeline", "QwenImagePipeline", "LTXPipeline")
CANNOT = {("fdg", name): "FDG .*spatial" for name in PACKED} | {("pag", "SanaPipeline"): "no attention map"}
NO_ZEROS = (
    "QwenImagePipeline",
    "Lumina2Pipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "PixArtSigmaPipeline",
)
CANNOT |= {("zero_star", name): "zero_steps=0" for name in NO_ZEROS}
NFE = {"slg": (6, 9), "pag": (9, 9), "seg": (9, 9)}  # of 6 for CFG in three steps; SLG acts early only


def rule(name, s):
    if name == "slg":
        return SLG(4.0, start=0.0, stop=1.0)
    built = specs.rule(name)
    if isinstance(built, LinearAG):
        call = {k: v for k, v in s.call.items() if k not in ("prompt", "negative_prompt", "output_type", "return_dict")}
        return built.fitted(s.pipe, s.call["prompt"], **call)
    return built


@pytest.mark.parametrize("pipeline", TINY)
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_or_says_why_not(name, pipeline, scene):
    s = scene(pipeline)
    with guide(s.pipe, rule(name, s)) as run:
        if (name, pipeline) in CANNOT:
            with pytest.raises(ValueError, match=CANNOT[name, pipeline]):
                s.run(s.call)
        else:
            once = s.run(s.call)
            assert torch.isfinite(once).all()
            low, high = NFE.get(name, (3, 6))
            assert low <= run.nfe <= high
            assert torch.equal(s.run(s.call), once)  # nothing is carried over from one call to the next
    assert torch.equal(s.run(), s.run())


NEUTRAL = {
    "apg": lambda: APG(4.0, eta=1.0, norm_threshold=0.0, momentum=0.0),
    "ag": lambda: AdaptiveGuidance(4.0, threshold=math.inf),
    "linear_ag": lambda: LinearAG(4.0, every=1, until=1.0),
    "interval": lambda: Interval(4.0, 0.0, 1.0),
    "interval in sigma": lambda: Interval(4.0, 0.0, math.inf, space="sigma"),
    "scheduled": lambda: Scheduled(4.0, shape="constant"),
    "rescale": lambda: Rescale(4.0, phi=0.0),
    "mag": lambda: MaG(4.0, alpha=0.0),
    "fdg": lambda: FDG(scales=(4.0, 4.0)),
    "slg": lambda: SLG(4.0, strength=0.0),
    "pag": lambda: PAG(4.0, strength=0.0),
    "seg": lambda: SEG(4.0, strength=0.0),
    "ag+interval+apg": lambda: AdaptiveGuidance(
        Interval(APG(4.0, eta=1.0, norm_threshold=0.0, momentum=0.0)), threshold=math.inf
    ),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_rule_is_cfg_bit_for_bit(name, scene):
    for pipeline in ("StableDiffusion3Pipeline", "StableDiffusionPipeline", "WanPipeline"):
        s = scene(pipeline)
        with guide(s.pipe, CFG(4.0)):
            cfg = s.run(s.call)
        with guide(s.pipe, NEUTRAL[name]()) as run:
            assert torch.equal(s.run(s.call), cfg)
        assert run.nfe == 6


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("pag", "seg", "slg", "fdg", "dynamic_threshold")])
def test_at_scale_1_it_is_the_conditional_prediction(name, scene):
    """Of the rule itself: a pipeline runs no CFG at scale 1, and then asks no rule."""
    options = {"linear_ag": {"every": 1, "until": 1.0}, "zero_star": {"zero_steps": 0}}
    c, u = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    if name == "ag":
        built = specs.rule(name, {"threshold": math.inf})
        built.inner = built.inner.with_scale(1.0)  # refused when made: it would have nothing to leave out
    else:
        built = specs.rule(name, options.get(name)).with_scale(1.0)
    step = StepInfo(1, 4, 500, Level.flow(0.5), "flow_prediction", c + u, {}, extra={})
    if name == "autoguidance":
        step.extra = dict.fromkeys(built.extra(step), u)
    torch.testing.assert_close(built(c, u, step), c, rtol=1e-6, atol=1e-6)
    s = scene("StableDiffusion3Pipeline")
    if name != "ag":
        with guide(s.pipe, built) as run:
            torch.testing.assert_close(s.run(s.call), s.run(s.plain), rtol=1e-5, atol=1e-5)
        assert run.nfe == 3


def test_memory_does_not_grow_with_the_steps(scene):
    """What a rule keeps between steps has one size, whether the run has five or twenty of them."""
    s = scene("StableDiffusion3Pipeline")
    for build in (
        lambda: APG(4.0),
        lambda: AdaptiveGuidance(APG(4.0), threshold=math.inf, after="hold"),
        lambda: rule("linear_ag", s),
    ):
        kept = []
        for steps in (6, 20):
            seen = []
            arguments = {**s.call, "num_inference_steps": steps}
            built = build()
            if isinstance(built, LinearAG):
                fit = {
                    k: v
                    for k, v in arguments.items()
                    if k not in ("prompt", "negative_prompt", "output_type", "return_dict")
                }
                built = LinearAG(4.0, until=1.0).fitted(s.pipe, s.call["prompt"], **fit)
            inside = type(built).__call__

            class Spy(type(built)):
                def __call__(self, cond, uncond, step, inside=inside, seen=seen):
                    out = inside(self, cond, uncond, step)
                    seen.append(sum(v.numel() for v in step.state.values()))
                    return out

            built.__class__ = Spy
            with guide(s.pipe, built):
                s.run(arguments)
            kept.append(max(seen))
        assert kept[0] == kept[1] > 0


def test_zero_star_composes_with_apg_and_adaptive_guidance(scene):
    s = scene("StableDiffusion3Pipeline")
    with guide(s.pipe, AdaptiveGuidance(ZeroStar(APG(4.0)), threshold=-1.0, warmup=2)) as run:
        assert torch.isfinite(s.run(s.call)).all()
    assert run.nfe == 5  # zero-init needs no unconditional prediction at step 0, and nothing stops before step 2
