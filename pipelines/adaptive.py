"""Adaptive guidance, AG (arXiv 2312.12487): leave the unconditional evaluation out once it agrees with the conditional."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffgen.parametrization import convert, to_x0
from diffgen.pipelines.base import Wrapper, batches, dot, per_sample, real, require, whole, wide
from diffgen.pipelines.perturbed import AutoGuidance
from diffgen.registry import register
from diffgen.seeding import generator
from diffgen.tap import Alter, StepInfo

SPACES = ("native", "x0", "epsilon")


def cosine(cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    """gamma = <c, u> / (|c| |u|) per sample, [B] in float64; 1 where one of them is zero."""
    norms = (dot(cond, cond) * dot(uncond, uncond)).sqrt()
    return torch.where(norms > 0, dot(cond, uncond) / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1.0)


@register("guidance", "ag", paper="2312.12487")
@dataclass
class AdaptiveGuidance(Wrapper):
    """Guides until the two predictions agree, gamma_t = cos(c, u) >= threshold; conditional from the next step on.

    The test is per sample and holds for good; a sample that has passed it leaves the unconditional batch, and once all
    have, that evaluation is gone. With negative prompts u is the negative prediction. run.state["ag_stop"]: the step at
    which each sample passed, -1: never.

    threshold: 0.991 is the paper's for 20 steps, on the model's output; inf never stops, which is the inner rule bit for
    bit, -1 stops after one step. It depends on model, parametrisation and steps: `calibrated` finds it for a wanted
    saving. space: "native" (the paper's), "x0" or "epsilon". In x0 gamma rises to 1 as the noise falls, which makes it
    the better clock for flow models. warmup: steps before which nobody stops (gamma dips in the first two or three).
    after: "cond" (the paper's), or "hold": the last difference guided - cond stays on.
    """

    threshold: float = 0.991
    space: str = "native"
    warmup: int = 0
    after: str = "cond"

    def __post_init__(self):
        super().__post_init__()
        valid = (real(self.threshold) and -1 <= self.threshold <= 1) or self.threshold == math.inf
        require(self, "threshold", valid, "a cosine in [-1, 1], or inf (never stop)")
        require(self, "space", self.space in SPACES, f"one of {', '.join(SPACES)}")
        require(self, "warmup", whole(self.warmup) and self.warmup >= 0, "a whole number of steps >= 0")
        require(self, "after", self.after in ("cond", "hold"), "'cond' or 'hold'")
        without = next((type(r).__name__ for r in self.inside if isinstance(r, AutoGuidance)), None)
        if without:
            raise ValueError(
                f"AdaptiveGuidance leaves out evaluations of the unconditional prediction, and {without} inside "
                "it makes none"
            )
        if any(isinstance(r, AdaptiveGuidance) for r in self.inside):
            raise ValueError(
                "AdaptiveGuidance inside AdaptiveGuidance: one decides, the other would have nothing to decide"
            )

    def begin(self, pipe, step: StepInfo) -> None:
        if self.inner.scale == 1:
            raise ValueError(
                f"AdaptiveGuidance at scale 1: {type(self.inner).__name__} evaluates no unconditional prediction there"
            )
        super().begin(pipe, step)

    def gamma(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        """Cosine of the two predictions in the rule's space, [B]."""
        if self.space != "native":
            x, level = wide(step.x), step.level

            def seen(out):
                if self.space == "x0":
                    return to_x0(wide(out), x, level, step.kind)
                return convert(wide(out), x, level, step.kind, "epsilon")

            cond, uncond = seen(cond), seen(uncond)
        return cosine(cond, uncond)

    def wants_uncond(self, step: StepInfo) -> torch.Tensor | bool:
        wants = self.inner.wants_uncond(step)
        stop = step.state.get("ag_stop")
        return wants if stop is None else torch.as_tensor(wants) & (stop < 0).cpu()

    def extra(self, step: StepInfo) -> dict[str, Alter]:
        stop = step.state.get("ag_stop")
        return {} if stop is not None and bool((stop >= 0).all()) else self.inner.extra(step)

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        stop = step.state.get("ag_stop", torch.full((len(cond),), -1))
        running = stop < 0
        rest = cond + step.state["ag_hold"] if "ag_hold" in step.state else cond
        if not running.any():
            return rest
        evaluated = torch.as_tensor(self.wants_uncond(step)).expand(len(cond))
        guided = self.inner(cond, uncond, step)
        stops = torch.zeros_like(running)
        if step.index >= self.warmup:
            stops = running & evaluated & (self.gamma(cond, uncond, step) >= self.threshold).cpu()
        step.state["ag_stop"] = torch.where(stops, step.index, stop)
        if not running.all():
            guided = torch.where(per_sample(running, cond).to(cond.device), guided, rest)
        if self.after == "hold":
            step.state["ag_hold"] = guided - cond
        return guided

    def calibrated(
        self, pipe: Any, prompts: Sequence[str], saving: float = 0.25, batch_size: int = 16, seed: int = 0, **call
    ) -> AdaptiveGuidance:
        """The rule with the threshold that saves this share of CFG's evaluations, on average over the prompts.

        Runs the inner rule once on every prompt and records gamma; a sample's trajectory before it stops doesn't depend on
        the threshold, so the saving is exact on these prompts. saving: in (0, 1/2), of the inner rule's evaluations; half is
        left out only if nothing is guided. call: arguments of the pipeline's call, num_inference_steps above all: the
        threshold holds for these.
        """
        if not (real(saving) and 0 < saving < 0.5):
            raise ValueError(f"saving must be in (0, 0.5), the share of CFG's evaluations to leave out, got {saving!r}")
        from diffgen.pipelines.guide import guide, refuse_scale

        refuse_scale(pipe, call)

        gammas: list[torch.Tensor] = []
        watch = _Watch(self.inner, space=self.space, threshold=math.inf)
        for i, batch in enumerate(batches(prompts, batch_size)):
            watch.seen = []
            with guide(pipe, watch):
                generators = [generator("fit", seed, i * batch_size + j) for j in range(len(batch))]
                pipe(batch, generator=generators, output_type="latent", **call)
            gammas.append(torch.stack(watch.seen, 1))
        gamma = torch.cat(gammas)  # [prompts, steps], -inf where the inner rule evaluates no u
        steps = gamma.shape[1]
        evaluated = (gamma > -math.inf).double()
        later = evaluated.sum(1, keepdim=True) - evaluated.cumsum(1)  # evaluations of u after each step

        def saved(threshold):
            passed = gamma >= threshold
            passed[:, : self.warmup] = False
            first = passed.int().argmax(1, keepdim=True)
            left_out = torch.where(passed.any(1), later.gather(1, first)[:, 0], 0.0)
            return float(left_out.sum() / (evaluated.sum() + gamma.numel()))

        candidates = gamma[gamma > -math.inf].sort().values
        if not len(candidates):
            raise ValueError(
                f"{type(self.inner).__name__} evaluates no unconditional prediction that AG could leave out"
            )
        low, high = 0, len(candidates) - 1  # saved() falls as the threshold rises
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if saved(candidates[middle]) >= saving else (low, middle - 1)
        threshold = float(candidates[low])
        if saved(threshold) < saving:
            raise ValueError(
                f"saving={saving}: with warmup={self.warmup} and {steps} steps AG saves at most {saved(threshold):.3f}"
            )
        return dataclasses.replace(self, threshold=threshold)


@dataclass
class _Watch(AdaptiveGuidance):
    """Keeps every step's gamma, -inf where there was nothing to compare."""

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        evaluated = torch.as_tensor(self.inner.wants_uncond(step)).cpu().expand(len(cond))
        gamma = torch.where(evaluated, self.gamma(cond, uncond, step).cpu().double(), -math.inf)
        self.seen: list[torch.Tensor] = [*getattr(self, "seen", []), gamma]
        return self.inner(cond, uncond, step)
