"""Embedded worlds: small real pipelines whose weights ship with the package, each with data and an exact verifier."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path

from diffgen.names import nearest

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class World:
    """module: data and verifier, with prompts(n, seed, split) and verify(images, prompts). call: the pipeline's defaults."""

    name: str
    module: str
    call: dict = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return WEIGHTS / self.name

    def load(self):
        return importlib.import_module(self.module)


WORLDS = {
    world.name: world
    for world in [
        World(
            "shapes",
            "diffgen.worlds.shapes",
            # the T5 slot says nothing here, so two of its tokens do; a stock call would pad it to 256
            call={"num_inference_steps": 10, "guidance_scale": 3.0, "max_sequence_length": 2},
        ),
    ]
}


def world(name: str) -> World:
    if name not in WORLDS:
        raise ValueError(f"world {name!r} is unknown: {nearest(name, WORLDS)}")
    return WORLDS[name]
