"""Rollout and training step against a plain diffusers loop and against sampling alone: python -m benchmarks.rollout.

Rows do equal work unless they say otherwise; variants run interleaved in one process, ratios are of medians. Denoiser rows
are counted inside the model, peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

from diffgen import samplers
from diffgen.loading import load
from diffgen.parametrization import Level
from diffgen.schedulers import stochastic
from diffgen.training.objectives import clipped
from diffgen.training.policy import DiffusionPolicy
from diffgen.worlds import shapes

STEPS, WINDOW, CALL = 10, (2, 5), {"max_sequence_length": 2}


class Work:
    """One set-up that all variants share: prompts of G groups of K, fixed advantages."""

    def __init__(self, groups: int, k: int):
        self.policy = DiffusionPolicy(load("shapes"), call=CALL)
        self.pipe = self.policy.pipe
        self.k = k
        self.prompts = [p for p in shapes.prompts(groups, 0) for _ in range(k)]
        self.group = torch.arange(groups).repeat_interleave(k)
        self.advantage = torch.randn(groups * k, generator=torch.Generator().manual_seed(0))
        self.rows = 0
        self.pipe.transformer.proj_out.register_forward_hook(self._count)  # inside: what is really evaluated

    def _count(self, module, args, output):
        self.rows += len(output)

    def generators(self):
        return [torch.Generator().manual_seed(i) for i in range(len(self.prompts))]

    # --- sampling ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def stock(self):
        """The stock pipeline's sampling alone."""
        self.pipe(
            self.prompts,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            generator=self.generators(),
            output_type="pt",
            **CALL,
        )

    def record(self):
        """Our rollout: every step but the last stochastic, recorded, with log-probs."""
        return self._rollout(None, shared=False)

    def _rollout(self, window, shared):
        seeds = [(0, int(g), i % self.k) for i, g in enumerate(self.group)]
        return self.policy.rollout(
            self.prompts, self.group, seeds, num_inference_steps=STEPS, window=window, share_initial_noise=shared
        )

    # --- rollout and training step ----------------------------------------------------------------------------------

    def naive(self):
        """What a user writes: a pipeline call a prompt with its scheduler swapped, then log-probs recomputed with gradients."""
        pipe, rollouts = self.pipe, []
        scheduler = pipe.scheduler
        pipe.scheduler = stochastic(scheduler, window=WINDOW)
        for first in range(0, len(self.prompts), self.k):
            prompts = self.prompts[first : first + self.k]
            trajectory = []

            def keep(pipe, i, t, kwargs, trajectory=trajectory):
                trajectory.append(kwargs["latents"])
                return kwargs

            with torch.no_grad():
                context, _, pooled, _ = pipe.encode_prompt(
                    prompts, None, None, do_classifier_free_guidance=False, **CALL
                )
                start = torch.randn(self.k, 24, 8, 8)
                pipe(
                    prompt_embeds=context,
                    pooled_prompt_embeds=pooled,
                    latents=start,
                    num_inference_steps=STEPS,
                    guidance_scale=1.0,
                    output_type="pt",
                    callback_on_step_end=keep,
                    **CALL,
                )
            rollouts.append((context, pooled, [start, *trajectory]))
        sigmas, timesteps = pipe.scheduler.sigmas.tolist(), pipe.scheduler.timesteps
        pipe.scheduler = scheduler
        old = [[self._logp(r, i, sigmas, timesteps).detach() for i in range(*WINDOW)] for r in rollouts]
        for g, r in enumerate(rollouts):
            advantage = self.advantage[g * self.k : (g + 1) * self.k, None]
            for j, i in enumerate(range(*WINDOW)):
                logp = self._logp(r, i, sigmas, timesteps)
                clipped(logp[:, None], old[g][j][:, None], advantage).mean().backward()
        self._finish()

    def _logp(self, rollout, i, sigmas, timesteps):
        context, pooled, latents = rollout
        t = timesteps[i].expand(self.k)
        v = self.pipe.transformer(
            latents[i], timestep=t, encoder_hidden_states=context, pooled_projections=pooled, return_dict=False
        )[0]
        now, nxt = Level.flow(sigmas[i]), Level.flow(sigmas[i + 1])
        step = samplers.flow_sde(v, latents[i], now, nxt, sigma_max=sigmas[1])
        return samplers.log_prob(latents[i + 1], step)

    def ours(self):
        """Our rollout and training step, equal work: independent initial noise."""
        self._train(self._rollout(WINDOW, shared=False))

    def shared(self):
        """The same with a group's common prefix computed once (less work, another algorithm)."""
        self._train(self._rollout(WINDOW, shared=True))

    def _train(self, rollout):
        rows = torch.arange(len(self.prompts))
        for i in range(rollout.logp.shape[1]):
            action = torch.tensor([i])
            logp = self.policy.evaluate(rollout, rows, action).logp
            clipped(logp, rollout.logp[:, action], self.advantage[:, None]).mean().backward()
        self._finish()

    def _finish(self):
        self.pipe.transformer.zero_grad(set_to_none=True)


VARIANTS = ("stock", "record", "naive", "ours", "shared")


def memory(variant: str, groups: int, k: int) -> float:
    """Peak resident memory of a process that runs the variant once, in MB above one that only loads the pipeline."""
    code = f"from benchmarks.rollout import child; child({variant!r}, {groups}, {k})"
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    return float(out.strip().splitlines()[-1])


def child(variant: str, groups: int, k: int) -> None:
    torch.set_num_threads(1)
    work = Work(groups, k)
    work.stock()  # buffers that any use allocates
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark (Linux)
    before = _peak()
    getattr(work, variant)()
    print(_peak() - before)


def _peak() -> float:
    """High-water mark of resident memory, MB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    work, seconds, rows = Work(args.groups, args.group_size), {v: [] for v in VARIANTS}, {}
    for repeat in range(args.repeats + 1):
        for variant in VARIANTS:
            work.rows, started = 0, time.process_time()
            getattr(work, variant)()
            if repeat:  # the first round warms up
                seconds[variant].append(time.process_time() - started)
            rows[variant] = work.rows
    n = len(work.prompts)
    median = {v: statistics.median(seconds[v]) for v in VARIANTS}
    peak = {v: memory(v, args.groups, args.group_size) for v in VARIANTS}
    table = {
        v: {"samples/s": round(n / median[v], 2), "denoiser rows/sample": rows[v] / n, "peak MB": round(peak[v])}
        for v in VARIANTS
    }
    # paired within a round: the machine's mood cancels
    paired = {
        "recording / stock sampling (time)": ("record", "stock"),
        "ours / naive loop, equal work (time)": ("ours", "naive"),
        "ours with shared prefix / naive loop (time)": ("shared", "naive"),
    }
    ratios = {
        k: round(statistics.median(a / b for a, b in zip(seconds[x], seconds[y])), 3) for k, (x, y) in paired.items()
    }
    if args.json:
        print(json.dumps({"variants": table, "ratios": ratios}, indent=1))
        return
    print(
        f"{n} samples, {STEPS} steps, window {WINDOW}, one thread, CPU seconds, median of {args.repeats} interleaved rounds"
    )
    print(f"{'variant':10}" + "".join(f"{column:>22}" for column in table["stock"]))
    for variant, row in table.items():
        print(f"{variant:10}" + "".join(f"{value:>22}" for value in row.values()))
    for name, ratio in ratios.items():
        print(f"{name}: {ratio}")


if __name__ == "__main__":
    main()
