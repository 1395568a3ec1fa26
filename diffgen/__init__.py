"""diffgen: guidance, fine-tuning, reinforcement learning and evaluation for diffusers pipelines."""

from __future__ import annotations

__version__ = "0.1.0"

_EXPORTS = {
    "check": "diffgen.pipelines.check",
    "guide": "diffgen.pipelines.guide",
    "load": "diffgen.loading",
    "with_defaults": "diffgen.loading",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name in _EXPORTS:
        import importlib

        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
