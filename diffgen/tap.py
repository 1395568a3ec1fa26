"""The tap: a pipeline's denoiser calls and its scheduler.step, intercepted while a `Tap` is open.

At each step the tap sees the conditional and the unconditional prediction (two halves of one call, or two calls), asks a
rule for the guided one, and answers so that the pipeline's own formula yields it: u + w (c - u) with u = c = guided is
guided, exactly. It can leave out evaluations that aren't needed, record the calls, and replay them with gradients.
Nothing stays patched once it is closed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from diffgen import parametrization
from diffgen.parametrization import Level
from diffgen.table import BATCH_ARGUMENTS, CONTAINERS, SAMPLE_ARGUMENTS, SAMPLE_LISTS, Row, denoisers, row_for


@dataclass
class StepInfo:
    """One denoising step, as a guidance rule sees it.

    index in 0..num_steps-1; timestep of the scheduler; level (alpha, sigma) of the denoiser's input x [B, ...]; kind: the
    parametrisation of cond and uncond; state: the rule's memory, tensors [B, ...] by name, empty at step 0; order:
    denoiser evaluations that the scheduler makes in one step of the schedule; denoiser: its attribute on the pipeline
    ("transformer", "transformer_2", "unet"); extra: the further predictions [B, ...] that the rule asked for, by name.
    """

    index: int
    num_steps: int
    timestep: Any
    level: Level
    kind: str
    x: torch.Tensor
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    order: int = 1
    denoiser: str = ""
    extra: dict[str, torch.Tensor] = field(default_factory=dict)

    def rows(self, rows) -> StepInfo:
        return replace(self, x=self.x[rows], state={k: v[rows] for k, v in self.state.items()})


# A context manager on the denoiser that yields the module to call in its place: itself, altered meanwhile, or another.
Alter = Callable[[torch.nn.Module], AbstractContextManager[torch.nn.Module]]


class Rule(Protocol):
    """What guides: cond, uncond [B, ...] and the step -> guided [B, ...]. It may keep memory in step.state."""

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor: ...

    def wants_uncond(self, step: StepInfo) -> torch.Tensor | bool:
        """Which samples need their unconditional prediction at this step: bool, or bool [B]."""
        ...

    def extra(self, step: StepInfo) -> dict[str, Alter]:
        """Further evaluations of the conditional rows, by an altered denoiser; the rule finds them in step.extra."""
        ...

    def begin(self, pipe, step: StepInfo) -> None:
        """Called before the first guided step of a run; raises ValueError where the rule doesn't fit the pipeline."""
        ...

    @property
    def active(self) -> bool:
        """Whether the pipeline has to run CFG for this rule."""
        ...


def take(value, rows: torch.Tensor, n: int, per_sample: bool = False):
    """Rows of an argument that carries n samples; tensors, lists and dicts of them. Anything else as it is.

    per_sample: a list has one entry a sample; otherwise it is a list of tensors [n, ...].
    """
    if isinstance(value, torch.Tensor):
        if not value.ndim or not len(value) or len(value) % n:
            return value
        rows = rows.to(value.device)  # several entries in a row may belong to one sample: its video frames
        return value[rows] if len(value) == n else value.unflatten(0, (n, -1))[rows].flatten(0, 1)
    if isinstance(value, dict):
        return {k: take(v, rows, n) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        if per_sample and len(value) == n:
            return [value[i] for i in rows.tolist()]
        return type(value)(take(v, rows, n) for v in value)
    return value


@dataclass
class Call:
    """A denoiser call with its arguments bound to names."""

    module: torch.nn.Module
    kwargs: dict[str, Any]
    forward: Callable
    name: str = ""  # the denoiser's attribute on the pipeline

    @property
    def sample(self):
        return next(self.kwargs[name] for name in SAMPLE_ARGUMENTS if self.kwargs.get(name) is not None)

    def __len__(self) -> int:
        return len(self.sample)

    def select(self, rows: torch.Tensor | None) -> dict[str, Any]:
        n, chosen = len(self), self.kwargs
        if rows is not None:
            chosen = {k: take(v, rows, n, k in SAMPLE_LISTS) if k in BATCH_ARGUMENTS else v for k, v in chosen.items()}
            for name in CONTAINERS & {k for k, v in chosen.items() if isinstance(v, dict)}:
                inside = {k: take(v, rows, n) if k in BATCH_ARGUMENTS else v for k, v in chosen[name].items()}
                chosen[name] = inside
        return _copied(chosen)

    def run(self, rows: torch.Tensor | None = None):
        if rows is not None and len(rows) != len(self) and getattr(self.module, "is_cache_enabled", False):
            raise ValueError(
                f"{type(self.module).__name__} has a cache enabled, which cannot follow single samples that need no further "
                "evaluation; call module.disable_cache(), or use a rule that decides for the whole batch"
            )
        return self.forward(**self.select(rows))

    def replay(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Prediction [len(rows), ...] by the module itself: hooks, compiled code and gradients as usual."""
        return prediction(self.module(**self.select(rows)))

    def altered(self, name: str, alter: Alter, rows: torch.Tensor, replay: bool = False) -> torch.Tensor:
        """Prediction [len(rows), ...] of the denoiser as `alter` makes it; never compiled: its graph wouldn't know."""
        cached = getattr(self.module, "is_cache_enabled", False)  # the pipeline's two branches have caches of their own
        cache = self.module.cache_context(f"diffgen {name}") if cached else nullcontext()  # type: ignore[operator]
        eager = torch.compiler.set_stance("force_eager")
        with eager, cache, _without_checkpointing(self.module), alter(self.module) as module:
            if module is self.module and not replay:
                return prediction(self.run(rows))
            return prediction(module(**self.select(rows)))


@contextmanager
def _without_checkpointing(module: torch.nn.Module) -> Iterator[None]:
    """Gradient checkpointing would run blocks again in the backward pass, when they are no longer altered."""
    parts: list[Any] = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]
    for part in parts:
        part.gradient_checkpointing = False
    try:
        yield
    finally:
        for part in parts:
            part.gradient_checkpointing = True


def _copied(value):
    """Dicts and lists as copies: pipelines (IP-Adapter) and denoisers (T2I-Adapter) change them between calls."""
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value


def bind_method(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments of a method's call by name, without self; those caught by **kwargs stand beside the others."""
    bound = dict(signature.bind(None, *args, **kwargs).arguments)
    bound.pop(next(iter(signature.parameters)))
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return bound


def prediction(output) -> torch.Tensor:
    """First output of a denoiser as one tensor (some return a list of samples)."""
    first = output[0]
    return torch.stack(list(first)) if isinstance(first, (list, tuple)) else first


def _with_prediction(output, new: torch.Tensor):
    """The denoiser's output with its prediction replaced, in the type that the pipeline expects."""
    first = list(new.unbind()) if isinstance(output[0], list) else new
    if isinstance(output, tuple):
        return (first, *output[1:])
    key = next(iter(output.keys()))
    return type(output)(**{**dict(output.items()), key: first})


@dataclass
class Recorded:
    """A recorded step: what is needed to predict it again, for all or some of its samples."""

    step: StepInfo
    cond: Call
    uncond: Call | None  # the same object as cond where both are halves of one call
    cond_rows: torch.Tensor
    uncond_rows: torch.Tensor  # unused where uncond is None
    tap: Tap
    want: torch.Tensor | None = None  # bool [B]: whose unconditional prediction was evaluated; None: everyone's

    def replay(self, rows: torch.Tensor | None = None, grad_uncond: bool = True) -> torch.Tensor:
        """The model output handed to scheduler.step, [len(rows), ...], with gradients.

        grad_uncond=False: no gradient through the unconditional prediction, which then is a call of its own (flow_grpo's
        estimator, at three quarters of the cost). With grad_uncond=True a batched pipeline's call is repeated as it was.
        """
        rows = None if rows is None else rows.cpu()
        step = self.step if rows is None else self.step.rows(rows)
        step = replace(step, state={k: v.clone() for k, v in step.state.items()})
        c_rows = self.cond_rows if rows is None else self.cond_rows[rows]
        if self.uncond is None:
            return self.tap.finish(self.cond.replay(None if rows is None else c_rows), step, self.cond)
        u_rows = self.uncond_rows if rows is None else self.uncond_rows[rows]
        want = None if self.want is None else self.want if rows is None else self.want[rows]
        if want is not None and not want.all():
            c = self.cond.replay(c_rows)
            u = c
            if want.any():
                with torch.set_grad_enabled(grad_uncond and torch.is_grad_enabled()):
                    active = self.uncond.replay(u_rows[want])
                u = c.clone()
                u[want.to(c.device)] = active
        elif self.uncond is self.cond and grad_uncond:
            both = [c_rows, u_rows] if self.tap.row.cond_first else [u_rows, c_rows]
            halves = self.cond.replay(None if rows is None else torch.cat(both)).chunk(2)
            c, u = halves if self.tap.row.cond_first else halves[::-1]
        else:
            with torch.set_grad_enabled(grad_uncond and torch.is_grad_enabled()):
                u = self.uncond.replay(u_rows if self.uncond is self.cond or rows is not None else None)
            c = self.cond.replay(c_rows if self.uncond is self.cond or rows is not None else None)
        with torch.set_grad_enabled(grad_uncond and torch.is_grad_enabled()):
            extra = self.tap.rule.extra(step).items()
            step.extra = {name: self.cond.altered(name, alter, c_rows, replay=True) for name, alter in extra}
        return self.tap.finish(self.tap.combine(c, u, step), step, self.cond)


def _begin(scheduler, call: Call) -> int:
    """Where in scheduler.timesteps a run starts: pipelines that start late (img2img) trim the schedule.

    Most tell the scheduler, where it knows a begin_index (DDIM and DDPM don't); else the call's timestep says it.
    """
    if getattr(scheduler, "begin_index", None) is not None:
        return scheduler.begin_index
    timestep = call.kwargs.get("timestep")
    if timestep is None:
        return 0
    timestep = torch.as_tensor(timestep).flatten()[0].cpu()
    if hasattr(scheduler, "begin_index") and timestep <= 1:  # t / 1000, as many transformers take it
        return 0
    match = (scheduler.timesteps.cpu() == timestep).nonzero()
    return int(match[0]) if len(match) else 0


_open: set[int] = set()  # ids of patched objects


class Tap:
    """Context manager around one pipeline call.

    rule: guides where the pipeline runs CFG; None leaves predictions alone (and then a CFG step can't be recorded).
    batch: samples in the call, None to read it off. arguments: the pipeline's call arguments, for rows whose renorm looks
    at them. record: which step indices to keep in `recorded`. share: [B] for each sample the first one that has the same
    input, and share_until: up to and including that step only those are evaluated.

    rows_evaluated counts denoiser rows; nfe = rows_evaluated / batch. guided_steps counts steps that ran CFG. state: the rule's
    memory.
    """

    def __init__(
        self,
        pipe,
        rule: Rule | None = None,
        *,
        batch: int | None = None,
        arguments: dict | None = None,
        record: Callable[[int], bool] | None = None,
        share: torch.Tensor | None = None,
        share_until: int = -1,
        row: Row | None = None,
    ):
        self.pipe, self.arguments = pipe, arguments or {}
        self.rule: Any = rule
        self.batch = batch or 0  # 0: not known before the first call
        self.record, self.share, self.share_until = record, share, share_until
        self.row = row or row_for(pipe)
        self.recorded: list[Recorded] = []
        self.rows_evaluated = self.guided_steps = 0
        self.index = 0
        self._begin = 0
        self._undo: list[Callable[[], None]] = []
        self._pending: Any = None  # (call, rows, prediction, answer given) of a call whose second one may follow
        self.state: dict[str, torch.Tensor] = {}
        self._answer: Any = None  # (guided, step, call) of the running step
        self._verified = False

    @property
    def nfe(self) -> float:
        return self.rows_evaluated / max(self.batch, 1)

    # --- installing -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Tap:
        modules = denoisers(self.pipe)
        self._targets = [*modules.values(), self.pipe.scheduler]
        if any(id(target) in _open for target in self._targets):
            raise RuntimeError(
                f"{type(self.pipe).__name__} is already being tapped: a pipeline (or one that shares its denoiser or "
                "scheduler) was called inside a guided or recorded call of itself"
            )
        _open.update(map(id, self._targets))
        try:
            for name, module in modules.items():
                self._install(name, module)
            self._wrap(self.pipe.scheduler, "step", self._on_step)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc) -> None:
        while self._undo:
            self._undo.pop()()
        _open.difference_update(map(id, self._targets))
        self._pending = self._answer = None

    def _install(self, name: str, module: torch.nn.Module) -> None:
        # a module compiled in place is entered through _compiled_call_impl; replacing forward would be traced into it
        attribute = "forward" if getattr(module, "_compiled_call_impl", None) is None else "_compiled_call_impl"
        base: Any = getattr(module, "_orig_mod", module)
        base = base.get_base_model() if hasattr(base, "get_base_model") else base
        signature = inspect.signature(type(base).forward)

        def on_call(original, *args, **kwargs):
            return self._on_call(Call(module, _copied(bind_method(signature, args, kwargs)), original, name))

        self._wrap(module, attribute, on_call)

    def _wrap(self, target, attribute: str, handler: Callable) -> None:
        had, original = attribute in vars(target), getattr(target, attribute)

        @functools.wraps(original)
        def wrapper(*args, **kwargs):
            return handler(original, *args, **kwargs)

        def undo():
            if vars(target).get(attribute) is wrapper:
                if had:
                    setattr(target, attribute, original)
                else:
                    delattr(target, attribute)
            elif vars(target).get("_old_forward") is wrapper:  # an accelerate hook was put on top of us
                target._old_forward = original

        setattr(target, attribute, wrapper)
        self._undo.append(undo)

    # --- the two touch points ---------------------------------------------------------------------------------------

    def _on_step(self, original, model_output, *args, **kwargs):
        if self._answer is not None:
            self._verify(model_output)
        elif self._pending is not None:  # a call that no second one followed: the pipeline ran without CFG
            call, rows, cond, _ = self._pending
            self._keep(call, None, rows, rows, self._step_info(call, rows))
            if self._recording:
                self._answer = (cond, self.recorded[-1].step, call)
                self._verify(model_output)
        self._pending = self._answer = None
        self.index += 1
        return original(model_output, *args, **kwargs)

    def _on_call(self, call: Call):
        if call.kwargs.get("skip_layers") is not None:
            raise ValueError(
                "skip_guidance_layers makes a third denoiser call that a guidance rule would misread; use SLG(rule, layers=...)"
            )
        n = len(call)
        if not self.batch:
            self.batch = n // 2 if self.row.layout == "batched" and self.rule is not None and self.rule.active else n
        if n == 3 * self.batch:
            raise ValueError(f"{type(self.pipe).__name__} runs three branches in a call, which no rule here can guide")
        if n == 2 * self.batch:
            return self._on_both(call)
        if n != self.batch:
            raise RuntimeError(
                f"{type(self.pipe).__name__} called its denoiser on {n} rows; expected {self.batch} samples or "
                f"{2 * self.batch} for CFG in one call"
            )
        return self._on_cond(call) if self._pending is None else self._on_uncond(call)

    def _on_both(self, call: Call):
        """One call on both halves."""
        self._expect("batched")
        b = self.batch
        first, second = torch.arange(b), torch.arange(b, 2 * b)
        c_rows, u_rows = (first, second) if self.row.cond_first else (second, first)
        step = self._step_info(call, c_rows)
        if self.rule is None:
            if self._recording:
                raise ValueError("recording a step with CFG needs a rule, for example CFG(scale)")
            self.rows_evaluated += 2 * b
            return call.run()
        want, reps, inverse = self._needed(step)
        self._keep(call, call, c_rows, u_rows, step, want)
        if want.all() and reps is None:
            output = call.run()
            self.rows_evaluated += 2 * b
            halves = prediction(output).chunk(2)
            c, u = halves if self.row.cond_first else halves[::-1]
        else:
            reps = torch.arange(b) if reps is None else reps
            active = reps[want[reps]]
            output = call.run(torch.cat([c_rows[reps], u_rows[active]]))
            self.rows_evaluated += len(reps) + len(active)
            out = prediction(output)
            c, u = self._spread(out[: len(reps)], out[len(reps) :], want, reps, inverse)
        self._evaluate_extra(call, c_rows, step, reps, inverse)
        guided = self.combine(c, u, step)
        self._answered(guided, step, call)
        return _with_prediction(output, torch.cat([guided, guided]))

    def _on_cond(self, call: Call):
        rows = torch.arange(self.batch)
        _, reps, inverse = self._needed(None)
        output = call.run(reps)
        self.rows_evaluated += self.batch if reps is None else len(reps)
        cond = prediction(output)
        if reps is not None:
            cond = cond[inverse]
        # a clone: a cache that keeps the output must not see it overwritten at the second call
        answer = cond.clone()
        self._pending = (call, rows, cond, answer)
        return _with_prediction(output, answer)

    def _on_uncond(self, call: Call):
        """The second call of a step: its answer, and the one already given, become the guided prediction."""
        self._expect("two_calls")
        first, rows, c, answer = self._pending
        step = self._step_info(first, rows)
        if self.rule is None:
            if self._recording:
                raise ValueError("recording a step with CFG needs a rule, for example CFG(scale)")
            self.rows_evaluated += self.batch
            self._pending = None
            return call.run()
        want, reps, inverse = self._needed(step)
        self._keep(first, call, rows, rows, step, want)
        reps = rows if reps is None else reps
        active = reps[want[reps]]
        if len(active):
            output = call.run(None if len(active) == self.batch else active)
            self.rows_evaluated += len(active)
            _, u = self._spread(c[reps], prediction(output), want, reps, inverse)
        else:
            output, u = (c,), c
        self._evaluate_extra(first, rows, step, reps, inverse)
        guided = self.combine(c, u, step)
        answer.copy_(guided)
        self._pending = None
        self._answered(guided, step, first)
        return _with_prediction(output, guided)

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _expect(self, layout: str) -> None:
        if self.row.layout not in (layout, "auto"):
            raise RuntimeError(
                f"{type(self.pipe).__name__}: its row says layout={self.row.layout!r}, its calls say {layout!r}"
            )

    @property
    def _recording(self) -> bool:
        return self.record is not None and self.record(self.index)

    def _step_info(self, call: Call, rows: torch.Tensor) -> StepInfo:
        scheduler = self.pipe.scheduler
        timesteps = scheduler.timesteps
        if self.index == 0:
            self._begin = _begin(scheduler, call)
        timestep = timesteps[min(self._begin + self.index, len(timesteps) - 1)]
        x = call.sample
        x = torch.stack([x[i] for i in rows.tolist()]) if isinstance(x, (list, tuple)) else x[rows.to(x.device)]
        if self.row.tokens is not None:
            x = x[:, : self.row.tokens(call.kwargs)]
        return StepInfo(
            index=self.index,
            num_steps=len(timesteps) - self._begin,
            timestep=timestep,
            level=parametrization.noise_level(scheduler, timestep),
            kind=parametrization.prediction_kind(scheduler),
            x=x,
            state=self.state,
            order=getattr(scheduler, "order", 1),
            denoiser=call.name,
        )

    def _needed(self, step: StepInfo | None):
        """(want uncond [B], evaluated rows or None for all, inverse): evaluated[inverse] is every row again."""
        want = torch.ones(self.batch, dtype=torch.bool)
        if step is not None and self.rule is not None:
            if not self.guided_steps:
                self.rule.begin(self.pipe, step)
            want = want & torch.as_tensor(self.rule.wants_uncond(step)).cpu()
        if self.share is None or self.index > self.share_until:
            return want, None, None
        reps, inverse = torch.unique(self.share, return_inverse=True)
        return want, reps, inverse

    @staticmethod
    def _spread(c, u, want, reps, inverse):
        """Evaluated rows -> all rows; an unconditional prediction that wasn't evaluated is the conditional one."""
        full = c.clone()
        full[want[reps].to(c.device)] = u
        return (c, full) if inverse is None else (c[inverse], full[inverse])

    def _evaluate_extra(self, call: Call, rows: torch.Tensor, step: StepInfo, reps, inverse) -> None:
        for name, alter in self.rule.extra(step).items():
            active = rows if inverse is None else rows[reps]
            out = call.altered(name, alter, active)
            self.rows_evaluated += len(active)
            step.extra[name] = out if inverse is None else out[inverse]

    def combine(self, c: torch.Tensor, u: torch.Tensor, step: StepInfo) -> torch.Tensor:
        """The guided prediction: the rule's, then the pipeline's own renorm. What the rule doesn't see stays conditional."""
        channels = step.x.shape[1]
        more = c.ndim == step.x.ndim and c.shape[1] > channels  # a learned variance, or tokens of reference images
        if c.ndim == step.x.ndim:  # inpainting, image-to-video: conditions follow the latents, in some dimension
            step.x = step.x[tuple(slice(size) for size in c.shape)]

        def seen(out):  # negation is exact, so CFG stays what it is bit for bit
            out = out.float() if self.row.upcast else out
            out = out[:, :channels] if more else out
            return -out if self.row.negated else out

        step.extra = {name: seen(out) for name, out in step.extra.items()}
        guided = self.rule(seen(c), seen(u), step)
        c = c.float() if self.row.upcast else c
        if self.row.negated:
            guided = -guided
        if more:
            guided = torch.cat([guided, c[:, channels:]], 1)
        return guided if self.row.renorm is None else self.row.renorm(guided, c, self.arguments)

    def finish(self, guided: torch.Tensor, step: StepInfo, call: Call) -> torch.Tensor:
        """What the pipeline makes of the guided prediction before it calls scheduler.step."""
        guided = guided.float() if self.row.upcast else guided
        config = getattr(self.pipe.scheduler, "config", {})
        keep = self.row.learned_variance == "scheduler" and config.get("variance_type") in ("learned", "learned_range")
        if self.row.tokens is not None or (self.row.learned_variance and not keep):
            guided = guided[:, : step.x.shape[1]]
        return guided if self.row.post is None else self.row.post(guided, call.kwargs)

    def _keep(self, cond: Call, uncond: Call | None, c_rows, u_rows, step: StepInfo, want=None) -> None:
        if self._recording:
            snapshot = replace(step, state={k: v.clone() for k, v in step.state.items()}, extra={})
            self.recorded.append(Recorded(snapshot, cond, uncond, c_rows, u_rows, self, want))

    def _answered(self, guided: torch.Tensor, step: StepInfo, call: Call) -> None:
        self.state = step.state
        self._answer = (guided, step, call)
        self.guided_steps += 1

    def _verify(self, model_output: torch.Tensor) -> None:
        """Once a run: the scheduler gets what the row says, else the row (or the guess) is wrong."""
        if self._verified:
            return
        expected = self.finish(*self._answer)
        self._verified = bool(expected.any())  # zeros (CFG-Zero*) would pass any row
        if expected.shape == model_output.shape and torch.allclose(
            expected.to(model_output.dtype), model_output, rtol=1e-3, atol=1e-5, equal_nan=True
        ):
            return
        raise RuntimeError(
            f"{type(self.pipe).__name__} changes the guided prediction before scheduler.step in a way that its row in "
            "diffgen/table.py does not describe (post, renorm); switch off the pipeline's own rescaling, or add a row"
        )
