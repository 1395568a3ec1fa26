"""draw(pipe, rule, prompts): images, what they cost, and the same seeds for every rule."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffgen.grid import to_uint8
from diffgen.pipelines.base import Guidance, batches
from diffgen.pipelines.guide import guide
from diffgen.seeding import generator


@dataclass(frozen=True)
class Drawn:
    """images uint8 [N, 3, H, W] on the CPU (of a video, its middle frame); nfe: denoiser rows a sample; seconds a sample."""

    images: torch.Tensor
    nfe: float
    seconds: float


def draw(
    pipe: Any,
    rule: Guidance,
    prompts: Sequence[str],
    seed: int = 0,
    *,
    batch_size: int = 64,
    tick: Callable[[int], Any] = lambda n: None,
    **call: Any,
) -> Drawn:
    """One image a prompt under a rule. Image i has its own noise, a function of (seed, i): the same for every rule.

    call: further arguments of the pipeline's call. tick(n): called after every n images.
    """
    parts = batches(prompts, batch_size)
    images, nfe, seconds, first = [], 0.0, 0.0, 0
    with guide(pipe, rule) as run, torch.no_grad():
        for batch in parts:
            noise = [generator("draw", seed, first + i) for i in range(len(batch))]
            started = time.perf_counter()
            output = pipe(batch, generator=noise, output_type="pt", **call)
            shown = output.images if hasattr(output, "images") else output.frames[:, output.frames.shape[1] // 2]
            images.append(to_uint8(shown))
            seconds += time.perf_counter() - started
            nfe += run.nfe * len(batch)
            first += len(batch)
            tick(len(batch))
    return Drawn(torch.cat(images), nfe / len(prompts), seconds / len(prompts))
