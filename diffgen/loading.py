"""diffgen.load: a pipeline from an embedded world, a local folder or a hub id."""

from __future__ import annotations

import functools
import inspect
import json
import os
from pathlib import Path
from typing import Any

from diffgen.names import nearest
from diffgen.worlds import WORLDS

DTYPES = ("float32", "bfloat16", "float16", "float64")
TRUSTED = ("diffusers", "transformers", "diffgen")


def load(model: str, *, dtype=None, device=None, trust_remote_code: bool = False, quiet: bool = True):
    """Pipeline of an embedded world ("shapes"), a folder with model_index.json, or a hub id.

    A world's pipeline is the stock class whose call has the world's defaults (steps, guidance scale, text length).
    dtype: torch dtype, or its name, of all components (default float32). Components that were saved as None stay None.
    Classes outside diffusers, transformers and diffgen are refused unless trust_remote_code. Raises FileNotFoundError or
    ValueError.
    """
    import torch

    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is unknown: {nearest(dtype, DTYPES)}")
        dtype = getattr(torch, dtype)
    if quiet:
        _quiet()
    world = WORLDS.get(str(model))
    path = world.path if world else Path(str(model)).expanduser()
    if not path.is_dir():
        if world or str(model).startswith((".", "/", "~")) or str(model).count("/") != 1:
            raise FileNotFoundError(
                f"model {str(model)!r} is neither an embedded world ({', '.join(WORLDS)}), nor a folder, nor a hub id "
                f"'owner/name'; {nearest(str(model), WORLDS)}"
            )
        path = _download(str(model))
    index = _check_index(path, trust_remote_code)
    from diffusers import DiffusionPipeline

    absent = {k: None for k, v in index.items() if isinstance(v, list) and v == [None, None]}
    try:
        pipe = DiffusionPipeline.from_pretrained(
            path,
            dtype=dtype or torch.float32,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
            **absent,
        )
    except Exception as error:  # a damaged file raises whatever its reader does
        raise ValueError(f"{path} could not be loaded: {type(error).__name__}: {error}") from error
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            missing = [key for key, p in module.named_parameters() if p.is_meta or not p.isfinite().all()]
            if missing:
                raise ValueError(
                    f"{path / name}: weights of {len(missing)} parameters are missing or NaN, {missing[0]} first"
                )
            module.eval()
    if device is not None:
        pipe.to(device)
    pipe.set_progress_bar_config(disable=quiet)
    return with_defaults(pipe, **world.call) if world else pipe


def with_defaults(pipe, **defaults):
    """The same pipeline with other defaults for arguments of its call; its class keeps name and saved format."""
    pipe.__class__ = _with_defaults(type(pipe), tuple(sorted(defaults.items())))
    return pipe


@functools.cache
def _with_defaults(base: type, defaults: tuple) -> type:
    signature = inspect.signature(base.__call__)
    unknown = [name for name, _ in defaults if name not in signature.parameters]
    if unknown:
        raise ValueError(f"{base.__name__} has no argument {unknown[0]!r}: {nearest(unknown[0], signature.parameters)}")
    new = dict(defaults)

    def __call__(self, *args, **kwargs):
        given = signature.bind_partial(self, *args).arguments
        return base.__call__(self, *args, **{k: v for k, v in new.items() if k not in given} | kwargs)

    call: Any = functools.wraps(base.__call__)(__call__)
    call.__signature__ = signature.replace(
        parameters=[p.replace(default=new.get(k, p.default)) for k, p in signature.parameters.items()]
    )
    return type(base.__name__, (base,), {"__call__": call, "__module__": base.__module__})


def _check_index(path: Path, trust_remote_code: bool) -> dict:
    """The model_index.json, checked: it is there, is JSON, and names only classes that we trust (loading imports them)."""
    import diffusers

    file = path / "model_index.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} is no diffusers pipeline: it has no model_index.json")
    try:
        index = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(index, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(index).__name__}")
    for name, value in index.items():
        library = value[0] if isinstance(value, list) and value else None
        if name.startswith("_") or not isinstance(library, str) or trust_remote_code:
            continue
        # "stable_diffusion", in the published checkpoints of SD 1, is a folder of diffusers.pipelines
        own = library.isidentifier() and (Path(diffusers.__file__).parent / "pipelines" / library).is_dir()
        if library.split(".")[0] not in TRUSTED and not own:
            raise ValueError(
                f"{file}: component {name!r} names the library {library!r}, and loading would import it; only "
                f"{', '.join(TRUSTED)} are allowed without trust_remote_code=True (--trust-remote-code)"
            )
    for shards in path.rglob("*.index.json"):
        names = set(json.loads(shards.read_text()).get("weight_map", {}).values())
        wrong = [n for n in names if not str(n).endswith(".safetensors") or Path(str(n)).name != n]
        if wrong:
            raise ValueError(f"{shards} names {wrong[0]!r}; only safetensors files beside it are loaded")
    for weights in path.rglob("*"):
        if weights.suffix in {".bin", ".ckpt", ".pt", ".pth", ".pkl"}:
            folder = weights.parent
            if not any(folder.glob("*.safetensors")):
                raise ValueError(f"{weights} is a pickle; only safetensors weights are loaded")
    return index


def _download(model: str) -> Path:
    from diffusers import DiffusionPipeline

    offline = bool(os.environ.get("HF_HUB_OFFLINE"))
    try:
        return Path(DiffusionPipeline.download(model, use_safetensors=True, local_files_only=offline))
    except Exception as error:
        raise FileNotFoundError(
            f"model {model!r} is no embedded world ({', '.join(WORLDS)}) or folder, and could not be fetched from the hub: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def _quiet() -> None:
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
