"""Guidance through the tap against the stock pipeline: python -m benchmarks.guidance.

Each variant is timed in pairs with the stock pipeline (same prompts, same seeds, alternating order) in one process; the
ratio is the median over pairs. Denoiser rows are counted inside the model. The last row is the tap's own cost: a pipeline
whose denoiser takes almost no time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from diffgen.loading import load
from diffgen.pipelines import APG, CFG, PAG, AdaptiveGuidance, Guidance, LinearAG, guide
from diffgen.tiny import call_kwargs, tiny_pipeline
from diffgen.worlds import shapes

SCALE = 4.0


class Timed:
    """A pipeline call under a rule (None: stock), with its denoiser's rows counted."""

    def __init__(self, pipe, **call):
        self.pipe, self.call, self.rows = pipe, call, 0
        pipe.transformer.proj_out.register_forward_hook(self._count)

    def _count(self, module, args, output):
        self.rows += len(output)

    @torch.no_grad()
    def __call__(self, rule: Guidance | None) -> tuple[float, int]:
        """(seconds, denoiser rows) of one call."""
        guide(self.pipe, rule)
        noise = [torch.Generator().manual_seed(i) for i in range(len(self.call["prompt"]))]
        scale = {"guidance_scale": SCALE} if rule is None else {}
        self.rows, started = 0, time.perf_counter()
        self.pipe(generator=noise, output_type="latent", **scale, **self.call)
        return time.perf_counter() - started, self.rows

    def against_stock(self, rule: Guidance, pairs: int) -> dict:
        """Median of seconds(rule) / seconds(stock), its quartiles, and the ratio of rows."""
        ratios, rows = [], (0, 0)
        for i in range(pairs):
            order = (None, rule) if i % 2 else (rule, None)
            found = {r is None: self(r) for r in order}
            ratios.append(found[False][0] / found[True][0])
            rows = found[False][1], found[True][1]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return {"time": middle, "quartiles": [low, high], "rows": rows[0] / rows[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    warnings.simplefilter("ignore")

    pipe = load("shapes")
    prompts = shapes.prompts(options.samples, seed=1)
    timed = Timed(pipe, prompt=prompts, num_inference_steps=options.steps)
    calibrate = shapes.prompts(32, seed=2)
    ag = AdaptiveGuidance(SCALE, warmup=2).calibrated(pipe, calibrate, 0.25, num_inference_steps=options.steps)
    linear = LinearAG(SCALE, until=0.4).fitted(pipe, calibrate, num_inference_steps=options.steps)
    rules: dict[str, Guidance] = {
        "CFG": CFG(SCALE),
        "APG": APG(SCALE, norm_threshold="auto"),
        "PAG (a third call)": PAG(SCALE),
        "AG, calibrated to 25%": ag,
        "LinearAG, every 2nd of the first 40%": linear,
    }
    timed(None)
    call_ms = timed(None)[0] / options.steps * 1000
    found = {name: timed.against_stock(rule, options.pairs) for name, rule in rules.items()}

    name = "StableDiffusion3Pipeline"
    tiny = Timed(tiny_pipeline(name), prompt=prompts[:2], num_inference_steps=50, **call_kwargs(name))
    seconds = {rule is None: math.inf for rule in (None, CFG(SCALE))}
    for _ in range(options.pairs):
        for rule in (None, CFG(SCALE)):
            seconds[rule is None] = min(seconds[rule is None], tiny(rule)[0])
    own_ms = (seconds[False] - seconds[True]) / 50 * 1000

    table = Table("against the stock pipeline", "time", "quartiles", "denoiser rows")
    for rule_name, row in found.items():
        quartiles = " to ".join(f"{q:.3f}" for q in row["quartiles"])
        table.add_row(rule_name, f"{row['time']:.3f}", quartiles, f"{row['rows']:.3f}")
    Console().print(table)
    print(
        f"{options.samples} samples, {options.steps} steps, {call_ms:.0f} ms a step; the tap's own cost: {own_ms:.3f} ms a step"
    )
    if options.json:
        numbers = {"rules": found, "step_ms": call_ms, "tap_ms": own_ms}
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
