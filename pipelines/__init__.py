"""Guidance for any diffusers pipeline: `guide(pipe, rule)` and the rules."""

from __future__ import annotations

# Three functions named as their modules. They are imported here, and not on demand like the rest: importing a submodule
# puts it on the package under its name, so later it would stand where the function is expected.
from diffgen.pipelines.check import check as check
from diffgen.pipelines.draw import draw as draw
from diffgen.pipelines.guide import guide as guide
from diffgen.pipelines.guided import guided as guided

_EXPORTS = {
    "AdaptiveGuidance": "diffgen.pipelines.adaptive",
    "APG": "diffgen.pipelines.apg",
    "AutoGuidance": "diffgen.pipelines.perturbed",
    "CFG": "diffgen.pipelines.cfg",
    "Coefficients": "diffgen.pipelines.linear",
    "DynamicThreshold": "diffgen.pipelines.post",
    "Experts": "diffgen.pipelines.schedule",
    "FDG": "diffgen.pipelines.frequency",
    "Guidance": "diffgen.pipelines.base",
    "GuidedFluxPipeline": "diffgen.pipelines.guided",
    "GuidedStableDiffusion3Pipeline": "diffgen.pipelines.guided",
    "GuidedStableDiffusionPipeline": "diffgen.pipelines.guided",
    "GuidedStableDiffusionXLPipeline": "diffgen.pipelines.guided",
    "Interval": "diffgen.pipelines.schedule",
    "LinearAG": "diffgen.pipelines.linear",
    "MaG": "diffgen.pipelines.magnitude",
    "PAG": "diffgen.pipelines.perturbed",
    "Renorm": "diffgen.pipelines.post",
    "Rescale": "diffgen.pipelines.post",
    "Scheduled": "diffgen.pipelines.schedule",
    "SEG": "diffgen.pipelines.perturbed",
    "SLG": "diffgen.pipelines.perturbed",
    "TCFG": "diffgen.pipelines.directions",
    "Wrapper": "diffgen.pipelines.base",
    "ZeroStar": "diffgen.pipelines.directions",
    "as_guider": "diffgen.pipelines.modular",
    "from_guider": "diffgen.pipelines.modular",
}
__all__ = sorted([*_EXPORTS, "check", "draw", "guide", "guided"])


def __getattr__(name: str):
    if name in _EXPORTS:
        import importlib

        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
