"""check(pipe): does CFG through the tap give what the pipeline's own CFG gives?"""

from __future__ import annotations

import torch

from diffgen.pipelines.cfg import CFG
from diffgen.pipelines.guide import apply_rule, bind, tap
from diffgen.table import row_for

TOLERANCE = 1e-3


def check(pipe, prompt: str = "a photo", scale: float = 4.0, steps: int = 2, **call) -> float:
    """Largest difference between CFG through the tap and the stock pipeline, relative to the largest value.

    For classes that are not in the pipeline table: two runs of `steps` steps from the same seed. `call`: further arguments
    of the pipeline's call (height, width, image, ...). Raises RuntimeError above 1e-3, where the pipeline runs no CFG, and
    where it does something to its guided prediction that the tap doesn't know; ValueError where it cannot be tapped.
    """
    name, row = type(pipe).__name__, row_for(pipe)
    base = getattr(type(pipe), "_unguided", type(pipe))
    call = {"prompt": prompt, "num_inference_steps": steps, "output_type": "latent"} | call
    rule, arguments = apply_rule(row, CFG(scale), bind(base, (), call))

    def run():
        fresh = {
            k: list(v) if isinstance(v, list) else v for k, v in arguments.items()
        }  # Z-Image edits the prompt list
        generator = torch.Generator().manual_seed(0)
        return _tensor(base.__call__(pipe, **{"generator": generator, **fresh, "return_dict": False}))

    stock = run()
    if not torch.equal(stock, run()):
        raise RuntimeError(
            f"{name} gives other images at the same seed, so nothing can be compared (dropout in train mode? call .eval() on "
            "its modules)"
        )
    with tap(pipe, rule, row, arguments) as opened:
        tapped = run()
    if not opened.guided_steps:
        raise RuntimeError(
            f"{name} ran no CFG at {row.scale}={arguments[row.scale]}: it never predicted for the negative prompt"
        )
    difference = float((tapped - stock).abs().max() / stock.abs().max().clamp_min(1e-12))
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"CFG through the tap differs from {name}'s own by {difference:.2g} of the largest value (allowed "
            f"{TOLERANCE:g}); expected {row}; add a row to diffgen/table.py that says what the pipeline does"
        )
    return difference


def _tensor(output) -> torch.Tensor:
    """First output of a pipeline, latents or images, as one float tensor."""
    first = output[0] if isinstance(output, tuple) else output
    if isinstance(first, torch.Tensor):
        return first.float()
    import numpy as np

    return torch.as_tensor(np.stack([np.asarray(x, dtype=np.float32) for x in first]))
