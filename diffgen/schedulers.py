"""Drop-in diffusers schedulers that take stochastic steps with a log-prob, and can record them.

They save, load and run in stock pipelines. `stochastic(scheduler)` turns a pipeline's scheduler into its counterpart here:

    pipe.scheduler = stochastic(pipe.scheduler, noise_level=0.7)
    with pipe.scheduler.recording() as transitions:
        pipe(prompt)
    transitions[3].logp                                   # [B]
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

# SchedulerMixin is for DiffusionPipeline.from_pretrained, which loads a component of a foreign module as a scheduler only
# if the module has that name.
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin  # noqa: F401
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

from diffgen import samplers
from diffgen.parametrization import Level, is_flow


@dataclass
class Transition:
    """One recorded step. index counts denoising steps from 0; x, x_next are [B, ...]; logp [B] float32.

    remake(out) is the same step from another model output: `samplers.log_prob(t.x_next, t.remake(out))`.
    """

    index: int
    x: torch.Tensor
    x_next: torch.Tensor
    logp: torch.Tensor
    remake: Callable[..., samplers.Step]


def _extends(parent: type, **extra):
    """Decorator of an __init__(self, **config): its signature becomes the parent's plus `extra` with their defaults.

    diffusers saves and loads the parameters that it finds in the signature, so it must name the parent's.
    """

    def decorate(init):
        own = inspect.signature(parent.__init__)
        added = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=v) for k, v in extra.items()]
        init.__signature__ = own.replace(parameters=[*own.parameters.values(), *added])
        return register_to_config(init)

    return decorate


def _restarting(parent: Any):
    """parent.set_timesteps, which also starts counting steps anew.

    With the parent's signature: pipelines read off it whether a scheduler takes sigmas or timesteps.
    """

    @functools.wraps(parent.set_timesteps)
    def set_timesteps(self, *args, **kwargs):
        parent.set_timesteps(self, *args, **kwargs)
        self._count = 0

    return set_timesteps


class _Stochastic:
    """What both schedulers share: where noise comes from, which steps are stochastic, recording."""

    config: Any

    noise: Callable[[int, torch.Tensor], torch.Tensor] | None = None
    """(step, like [B, ...]) -> standard normal noise; None draws from the step's generator or the global one."""
    _transitions: list[Transition] | None = None
    _count = 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Transition]]:
        """Records the stochastic steps taken inside the block."""
        transitions: list[Transition] = []
        self._transitions = transitions
        try:
            yield transitions
        finally:
            self._transitions = None

    def _is_stochastic(self, index: int) -> bool:
        window = self.config.window
        return window is None or window[0] <= index < window[1]

    def _take(self, remake: Callable[..., samplers.Step], out, sample, generator) -> torch.Tensor:
        step = remake(out)
        noise = None
        if step.std:
            noise = (
                self.noise(self._count, sample)
                if self.noise is not None
                else _randn(sample.shape, generator, sample.device)
            )
        # the log-prob is of the latent that the model sees next, so after the cast to the pipeline's dtype
        x_next = step.sample(noise).to(out.dtype)
        if self._transitions is not None and step.std:
            logp = samplers.log_prob(x_next, step)
            self._transitions.append(Transition(self._count, sample, x_next, logp, remake))
        return x_next


def _randn(shape, generator, device):
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)


class FlowSDEScheduler(_Stochastic, FlowMatchEulerDiscreteScheduler):
    """FlowMatchEulerDiscreteScheduler whose steps are Flow-SDE (arXiv 2505.05470) inside `window`, Euler outside.

    noise_level: a in sigma~ = a sqrt(s / (1 - s)); 0.7 as published; 0 is Euler. window: (start, stop) step indices that
    get noise, None for all.
    """

    @_extends(FlowMatchEulerDiscreteScheduler, noise_level=0.7, window=None)
    def __init__(self, *args, noise_level=0.7, window=None, **config):
        super().__init__(*args, **config)

    set_timesteps = _restarting(FlowMatchEulerDiscreteScheduler)

    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        if not self.config.noise_level or not self._is_stochastic(self._count):
            result = super().step(model_output, timestep, sample, generator=generator, return_dict=return_dict)
            self._count += 1
            return result
        if self.step_index is None:
            self._init_step_index(timestep)
        i = self.step_index
        now, nxt = Level.flow(float(self.sigmas[i])), Level.flow(float(self.sigmas[i + 1]))
        top, level = float(self.sigmas[1]), self.config.noise_level

        def remake(out, rows=slice(None)):
            return samplers.flow_sde(out, sample[rows], now, nxt, noise_level=level, sigma_max=top)

        x_next = self._take(remake, model_output, sample, generator)
        self._step_index += 1
        self._count += 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x_next) if return_dict else (x_next,)


class DDIMSDEScheduler(_Stochastic, DDIMScheduler):
    """DDIMScheduler whose steps have noise eta inside `window` (DDPO, arXiv 2305.13301) and none outside.

    x0 is never clipped or thresholded: a clipped step is no Gaussian in the model's output.
    """

    @_extends(DDIMScheduler, eta=1.0, window=None)
    def __init__(self, *args, eta=1.0, window=None, **config):
        super().__init__(*args, **config)

    set_timesteps = _restarting(DDIMScheduler)

    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")
        timestep = int(timestep)
        before = timestep - self.config.num_train_timesteps // self.num_inference_steps
        bars = [self.alphas_cumprod[timestep], self.alphas_cumprod[before] if before >= 0 else self.final_alpha_cumprod]
        now, nxt = (Level(float(bar) ** 0.5, (1 - float(bar)) ** 0.5) for bar in bars)
        eta = self.config.eta if self._is_stochastic(self._count) else 0.0
        kind = self.config.prediction_type

        def remake(out, rows=slice(None)):
            return samplers.ddim(out, sample[rows], now, nxt, eta=eta, kind=kind)

        x_next = self._take(remake, model_output, sample, generator)
        self._count += 1
        if not return_dict:
            return (x_next, None)
        return DDIMSchedulerOutput(prev_sample=x_next, pred_original_sample=None)


def stochastic(scheduler, *, window: tuple[int, int] | None = None, noise_level: float | None = None):
    """The counterpart of a diffusers scheduler with stochastic steps: FlowSDEScheduler for flow models, else DDIM.

    noise_level: a of Flow-SDE (default 0.7), or eta of DDIM (default 1.0). Schedules (shift, betas, prediction type)
    carry over; a multistep solver (UniPC, DPM++) becomes a one-step one, since only those have a Gaussian step.
    """
    config = dict(scheduler.config)
    if is_flow(scheduler):
        config["stochastic_sampling"] = False  # noise without a log-prob
        if "flow_shift" in config:  # UniPC's and DPM-Solver's name
            config["shift"] = config["flow_shift"]
        return _from_config(FlowSDEScheduler, config, window=window, noise_level=noise_level)
    config |= {"clip_sample": False, "thresholding": False}
    if config.get("timestep_spacing") != "trailing":  # DDIM's step assumes equal distances
        config["timestep_spacing"] = "leading"
    return _from_config(DDIMSDEScheduler, config, window=window, eta=noise_level)


def _from_config(cls: Any, config: dict, *, window, **extra):
    """cls with those entries of another scheduler's config that it has too; extra where it isn't None."""
    known = inspect.signature(cls.__init__).parameters
    config = {k: v for k, v in config.items() if k in known}
    return cls.from_config(config, window=window, **{k: v for k, v in extra.items() if v is not None})
