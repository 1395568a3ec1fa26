"""Guidance for any diffusers pipeline: `guide(pipe, rule)` and the rules."""

from __future__ import annotations

_EXPORTS = {
    "APG": "diffgen.pipelines.apg",
    "CFG": "diffgen.pipelines.cfg",
    "Guidance": "diffgen.pipelines.base",
    "guide": "diffgen.pipelines.guide",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        import importlib

        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value  # the submodule `guide` would shadow the function otherwise
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
