"""`diffgen doctor`: the traps of an installation, each in one line."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "open_clip_torch",
    "torchmetrics",
)


def diagnose() -> list[dict]:
    """Rows {what, ok, finding}."""
    rows = [_version(name) for name in PACKAGES]
    rows += [_torchvision(), _device(), _weights(), _xformers()]
    return rows


def _row(what: str, ok: bool, finding: str) -> dict:
    return {"what": what, "ok": ok, "finding": finding}


def _version(name: str) -> dict:
    try:
        return _row(name, True, version(name))
    except PackageNotFoundError:
        return _row(name, False, f"not installed; pip install {name}")


def _torchvision() -> dict:
    try:
        importlib.import_module("torchvision")
        return _row("torchvision imports", True, "yes")
    except Exception as error:
        return _row(
            "torchvision imports",
            False,
            f"no ({error}); torch and torchvision come from different builds: reinstall both with one pip command",
        )


def _device() -> dict:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return _row("device", True, name)


def _weights() -> dict:
    from diffgen.worlds import WORLDS

    missing = [w.name for w in WORLDS.values() if not (w.path / "model_index.json").is_file()]
    return _row("embedded worlds", not missing, f"weights missing: {missing}" if missing else ", ".join(WORLDS))


def _xformers() -> dict:
    try:
        importlib.import_module("xformers.ops")
        return _row("xformers (optional)", True, version("xformers"))
    except PackageNotFoundError:
        return _row("xformers (optional)", True, "not installed; attention runs on torch's SDPA")
    except Exception as error:
        kind = "not installed" if isinstance(error, ModuleNotFoundError) else f"does not work here ({error})"
        return _row("xformers (optional)", True, f"{kind}; attention runs on torch's SDPA")
