"""Guidance for any diffusers pipeline: `guide(pipe, rule)` and the rules."""

from __future__ import annotations

# Two functions named as their modules. They are imported here, and not on demand like the rest: importing a submodule
# puts it on the package under its name, so later it would stand where the function is expected.
from diffgen.pipelines.check import check as check
from diffgen.pipelines.guide import guide as guide

_EXPORTS = {
    "APG": "diffgen.pipelines.apg",
    "CFG": "diffgen.pipelines.cfg",
    "Experts": "diffgen.pipelines.schedule",
    "Guidance": "diffgen.pipelines.base",
    "Rescale": "diffgen.pipelines.post",
    "Wrapper": "diffgen.pipelines.base",
}
__all__ = sorted([*_EXPORTS, "check", "guide"])


def __getattr__(name: str):
    if name in _EXPORTS:
        import importlib

        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
