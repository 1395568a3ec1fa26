"""Training: policies, rollouts, the stages and the trainer."""

from __future__ import annotations

_EXPORTS = {
    "Config": "diffgen.training.config",
    "ConfigError": "diffgen.training.config",
    "DiffusionPolicy": "diffgen.training.policy",
    "Evaluation": "diffgen.training.rollout",
    "Rollout": "diffgen.training.rollout",
    "Trainer": "diffgen.training.trainer",
    "load_config": "diffgen.training.config",
    "register": "diffgen.registry",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        import importlib

        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
