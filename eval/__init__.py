"""Evaluation: `evaluate(generated, reference)` and `compare(a, b)` for reports, `functional` for metrics as plain functions."""

from __future__ import annotations

import importlib

_HOME = {"evaluate": "run", "EvalResult": "result", "compare": "paired", "Comparison": "paired"}

__all__ = ["Comparison", "EvalResult", "compare", "evaluate", "functional"]


def __getattr__(name: str):
    if name == "functional":
        return importlib.import_module("diffgen.eval.functional")
    if name in _HOME:
        return getattr(importlib.import_module(f"diffgen.eval.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
