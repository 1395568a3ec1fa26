"""Rules in diffusers' modular pipelines (`as_guider`), and diffusers' guiders as rules here (`from_guider`)."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput

from diffgen import parametrization, registry
from diffgen.names import nearest
from diffgen.parametrization import Level
from diffgen.pipelines.base import Guidance
from diffgen.tap import Call, StepInfo, _with_prediction, bind_method, prediction

_TWO = ["pred_cond", "pred_uncond"]
_OURS = {
    "SkipLayerGuidance": "SLG",
    "PerturbedAttentionGuidance": "PAG",
    "SmoothedEnergyGuidance": "SEG",
    "AutoGuidance": "AutoGuidance",
}


def as_guider(rule: Guidance, scheduler=None) -> RuleGuider:
    """The rule as a guider: `modular.update_components(guider=as_guider(APG(10), scheduler=modular.scheduler))`.

    A guider isn't told the noise level, so rules that need it (x0 space, intervals in sigma) take it from the scheduler,
    which must be the one that the pipeline runs. Evaluations that the rule doesn't want are left out, sample by sample, as
    under `guide`. Give the pipeline a negative_prompt, "" if there is none.

    Flux' modular pipeline has no guider (diffusers only logs that it ignores one), and LTX-2 takes no other than its own.
    Qwen-Image-Edit shows its guider the tokens of the reference images too, which norms and projections then take in.
    """
    return RuleGuider(rule, scheduler)


def from_guider(guider) -> Guidance:
    """A diffusers guider with two branches as a rule: `guide(pipe, from_guider(ClassifierFreeZeroStarGuidance(4)))`.

    The guider is copied. It works on the denoiser's raw output, as in a modular pipeline. Raises ValueError for guiders that
    alter the denoiser or need more predictions: SLG, PAG, SEG and AutoGuidance stand for those.
    """
    return guider.rule if isinstance(guider, RuleGuider) else FromGuider(guider)


class RuleGuider(BaseGuidance):
    """A rule as diffusers' modular pipelines want it. Its config is the rule's registered name and options.

    The pipeline iterates over the list of conditions that it got; conditions are appended once the first denoiser call has
    shown x, which not all pipelines hand to their guider. To see it, and to run some of the rows only, the denoiser's
    forward is wrapped for one call.
    """

    _input_predictions = _TWO

    def __init__(self, rule: Guidance | Mapping[str, Any], scheduler=None):
        super().__init__()
        self.rule: Guidance = _rebuilt(rule)
        if not isinstance(self.rule, Guidance):
            raise TypeError(f"rule must be a Guidance such as CFG(scale=4) or APG(scale=10), got {rule!r}")
        self.scheduler = scheduler
        self.register_to_config(rule=_described(self.rule))
        self._state: dict[str, torch.Tensor] = {}
        self._begun = False
        self._seen: StepInfo | None = None  # the running step, once its first call has been made
        self._undo: Callable[[], None] = lambda: None

    def new(self, **kwargs) -> RuleGuider:
        return super().new(**{"scheduler": self.scheduler, **kwargs})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rule!r})"

    @property
    def active(self) -> bool:
        return self._enabled and self.rule.active

    @property
    def num_conditions(self) -> int:  # pipelines ask before a run, whether to encode the negative prompt
        return 1 + self.active

    @property
    def is_conditional(self) -> bool:
        return not self._count_prepared or self._identifier(self._count_prepared - 1) != "pred_uncond"

    def _identifier(self, i: int) -> str:
        return getattr(self._batches[i], self._identifier_key)

    # --- what a pipeline calls at each step, in this order ------------------------------------------------------------

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor) -> None:
        self._undo()  # an exception outside the denoiser (in a ControlNet) may have left it wrapped
        if self._step is None or step <= self._step:  # a new run; Wan 2.2's second guider never sees step 0
            self._state, self._begun = {}, False
        self._seen = None
        super().set_state(step, num_inference_steps, timestep)

    def prepare_inputs(self, data):
        return self._prepare(lambda index, name: self._prepare_batch(data, index, name))

    def prepare_inputs_from_block_state(self, data, input_fields):
        return self._prepare(lambda index, name: self._prepare_batch_from_block_state(input_fields, data, index, name))

    def _prepare(self, make: Callable[[int, str], Any]) -> list:
        self._make, self._batches = make, [make(0, "pred_cond")]
        return self._batches

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        super().prepare_models(denoiser)
        # as the tap does it: a module compiled in place is entered through _compiled_call_impl
        attribute = "forward" if getattr(denoiser, "_compiled_call_impl", None) is None else "_compiled_call_impl"
        had, original = attribute in vars(denoiser), getattr(denoiser, attribute)
        base: Any = getattr(denoiser, "_orig_mod", denoiser)
        base = base.get_base_model() if hasattr(base, "get_base_model") else base
        signature = inspect.signature(type(base).forward)
        name = self._identifier(self._count_prepared - 1)

        @functools.wraps(original)
        def wrapper(*args, **kwargs):
            self._undo()
            return self._call(name, Call(denoiser, bind_method(signature, args, kwargs), original))

        def undo():
            self._undo = lambda: None
            if had:
                setattr(denoiser, attribute, original)
            else:
                delattr(denoiser, attribute)

        setattr(denoiser, attribute, wrapper)
        self._undo = undo

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        self._undo()

    def __call__(self, data: list) -> GuiderOutput:
        if self._seen is None or len(data) != len(self._batches):
            raise RuntimeError(
                "this pipeline does not call its denoiser once for each condition that its guider prepared, between "
                "prepare_models and cleanup_models, so a rule cannot guide it"
            )
        return self.forward(**{getattr(d, self._identifier_key): d.noise_pred for d in data})

    def forward(self, pred_cond, pred_uncond=None, **extra) -> GuiderOutput:
        guided, step = pred_cond, self._seen
        if self.active and step is not None:
            if step.x.numel() == pred_cond.numel():  # Z-Image's latents have a frame axis
                step.x = step.x.reshape(pred_cond.shape)
            elif step.x.ndim == pred_cond.ndim:  # conditions (inpainting, image-to-video) follow the latents
                step.x = step.x[tuple(slice(size) for size in pred_cond.shape)]
            step.extra = extra
            guided = self.rule(pred_cond, pred_cond if pred_uncond is None else pred_uncond, step)
            self._state = step.state
        return GuiderOutput(pred=guided, pred_cond=pred_cond, pred_uncond=pred_uncond)

    # --- the denoiser calls -------------------------------------------------------------------------------------------

    def _call(self, name: str, call: Call):
        if name == "pred_cond":
            output = call.run()
            self._decide(call, output)
            return output
        if name != "pred_uncond":
            with torch.compiler.set_stance("force_eager"), self._extra[name](call.module) as module:
                return call.run() if module is call.module else module(**call.kwargs)
        if self._want.all():
            return call.run()
        output = call.run(self._want.nonzero().flatten())
        full = prediction(
            self._output
        ).clone()  # where it isn't evaluated, the unconditional one is the conditional one
        full[self._want.to(full.device)] = prediction(output)
        return _with_prediction(output, full)

    def _decide(self, call: Call, output) -> None:
        """Which further evaluations this step needs."""
        self._seen = step = self._step_info(call)
        if not self.active:
            return
        if not self._begun:
            known = {step.denoiser: call.module} | ({} if self.scheduler is None else {"scheduler": self.scheduler})
            self.rule.begin(_Pipe(**known), step)
            self._begun = True
        self._output, self._extra = output, self.rule.extra(step)
        self._want = torch.ones(len(step.x), dtype=torch.bool) & torch.as_tensor(self.rule.wants_uncond(step)).cpu()
        if self._want.any():
            uncond = self._make(1, "pred_uncond")
            given, negative = self._batches[0].as_dict(), uncond.as_dict()
            if all(v is None or v is given.get(k) for k, v in negative.items() if k != self._identifier_key):
                raise ValueError(
                    f"{type(self.rule).__name__} has nothing to guide by: give the pipeline a negative_prompt"
                )
            self._batches.append(uncond)
        self._batches += [self._make(0, name) for name in self._extra]

    def _step_info(self, call: Call) -> StepInfo:
        x, scheduler = call.sample, self.scheduler
        known: dict[str, Any] = {
            "index": self._step,
            "num_steps": self._num_inference_steps,
            "timestep": self._timestep,
            "x": torch.stack(list(x)) if isinstance(x, (list, tuple)) else x,
            "state": self._state,
            "denoiser": "unet" if "UNet" in type(call.module).__name__ else "transformer",
        }
        if scheduler is None:
            return _Unscheduled(level=Level(0.0, 0.0), kind="", **known)
        index = getattr(scheduler, "step_index", None)
        index = getattr(scheduler, "begin_index", None) if index is None else index
        timesteps = scheduler.timesteps if index is None else scheduler.timesteps[index : index + 1]
        if not (timesteps.cpu() == torch.as_tensor(self._timestep).cpu()).any():
            raise ValueError(
                f"the scheduler given to as_guider isn't the one that the pipeline runs: timestep {float(self._timestep):g} "
                "is not where it stands; use as_guider(rule, scheduler=pipe.scheduler)"
            )
        order = getattr(scheduler, "order", 1)
        if order > 1:
            known["num_steps"] = len(scheduler.timesteps) - (getattr(scheduler, "begin_index", None) or 0)
        level = parametrization.noise_level(scheduler, self._timestep)
        return StepInfo(level=level, kind=parametrization.prediction_kind(scheduler), order=order, **known)


def _needs_scheduler() -> ValueError:
    return ValueError(
        "this rule needs the noise level or the schedule, which a guider is not told: use "
        "as_guider(rule, scheduler=pipe.scheduler)"
    )


class _Unscheduled(StepInfo):
    """A step whose noise level and parametrisation aren't known."""

    def __getattribute__(self, name: str):
        if name in ("level", "kind"):
            raise _needs_scheduler()
        return super().__getattribute__(name)


class _Pipe(SimpleNamespace):
    """What a guider knows of its pipeline: the denoiser, and the scheduler if it was given."""

    def __getattr__(self, name: str):
        raise _needs_scheduler() if name == "scheduler" else AttributeError(f"a guider knows no {name} of its pipeline")


def _classes() -> dict[str, type[Guidance]]:
    """Rules by registered name, and as "module:class" those that aren't registered but have been imported."""
    found: dict[str, Any] = {}
    new: list[type[Guidance]] = [Guidance]
    while new:
        new = [c for cls in new for c in cls.__subclasses__()]
        found |= {_path(c): c for c in new if not c.__name__.startswith("_")}
    return found | {m.name: m.function for m in registry.methods("guidance")}


def _path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _described(value: Any) -> Any:
    """A rule as {"name": ..., option: ...}, rules within it likewise."""
    if isinstance(value, Guidance):
        names = {m.function: m.name for m in registry.methods("guidance")}
        options = {f.name: _described(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"name": names.get(type(value)) or _path(type(value)), **options}
    return [_described(v) for v in value] if isinstance(value, (list, tuple)) else value


def _rebuilt(value: Any) -> Any:
    """The inverse. Files come from anywhere: only rules are called, and no module is imported for a name."""
    if isinstance(value, Mapping) and "name" in value:
        known, name = _classes(), value["name"]
        if not isinstance(name, str) or name not in known:
            raise ValueError(
                f"guidance {name!r} is unknown, or its module not imported yet: {nearest(str(name), known)}"
            )
        options = [f.name for f in dataclasses.fields(known[name]) if f.init]
        for option in set(value) - {"name", *options}:
            raise ValueError(f"guidance {name!r} has no option {option!r}: {nearest(option, options)}")
        return known[name](**{k: _rebuilt(v) for k, v in value.items() if k != "name"})
    return tuple(_rebuilt(v) for v in value) if isinstance(value, list) else value


@dataclass
class FromGuider(Guidance):
    """A rule that asks a diffusers guider. What the guider sums up over the steps is kept in step.state."""

    scale: float = field(init=False, repr=False, compare=False)
    guider: Any = None

    def __post_init__(self):
        name = type(self.guider).__name__
        if not isinstance(self.guider, BaseGuidance):
            raise TypeError(f"from_guider takes a guider of diffusers, got {name}")
        alters = type(self.guider).prepare_models is not BaseGuidance.prepare_models
        if alters or self.guider._input_predictions != _TWO:
            use = f"use diffgen.pipelines.{_OURS[name]}" if name in _OURS else "no rule here stands for it"
            raise ValueError(
                f"{name} alters the denoiser or needs more than a conditional and an unconditional prediction, which "
                f"a classic pipeline doesn't make for it: {use}"
            )
        self.guider = copy.deepcopy(self.guider)
        # c + w' (c - u) is CFG at w = w' + 1
        self._offset = 1.0 if getattr(self.guider, "use_original_formulation", False) else 0.0
        self.scale = max(getattr(self.guider, "guidance_scales", None) or [self.guider.guidance_scale]) + self._offset
        self._guides = self._at(0, None, None).num_conditions > 1

    @property
    def active(self) -> bool:
        return self._guides

    def _at(self, *state) -> BaseGuidance:
        self.guider.set_state(*state)
        if state[0] == 0:
            self.guider.prepare_inputs({})  # where guiders of diffusers empty their memory
        return self.guider

    def with_scale(self, scale: float) -> Guidance:
        guider = copy.deepcopy(self.guider)
        if hasattr(guider, "guidance_scales"):
            raise ValueError(f"{type(guider).__name__} has guidance_scales, which one guidance_scale cannot replace")
        guider.guidance_scale = scale - self._offset
        return FromGuider(guider)

    def wants_uncond(self, step: StepInfo) -> torch.Tensor | bool:
        return self._at(step.index, step.num_steps, step.timestep).num_conditions > 1

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        guider = self._at(step.index, step.num_steps, step.timestep)
        buffer = getattr(guider, "momentum_buffer", None)
        if buffer is not None:
            buffer.running_average = step.state.get("momentum", 0)
        guided = guider.forward(cond, uncond).pred
        if buffer is not None and isinstance(buffer.running_average, torch.Tensor):
            step.state["momentum"] = buffer.running_average
        return guided
