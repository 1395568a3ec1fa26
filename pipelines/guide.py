"""guide(pipe, rule): swap a pipeline's guidance in one line."""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from typing import Any, overload

import torch

from diffgen.pipelines.base import Guidance, real
from diffgen.pipelines.post import Rescale
from diffgen.pipelines.schedule import Experts
from diffgen.table import FROM_SOURCE, Row, denoisers, row_for
from diffgen.tap import Tap, bind_method


class Run:
    """What `guide` returns. As a context manager it takes the rule off again at the end.

    nfe: denoiser rows evaluated per sample in the last call (CFG at 20 steps: 40). state: the rule's memory at its end,
    tensors [B, ...] by name.
    """

    def __init__(self, pipe, rule: Guidance, row: Row, previous: Run | None):
        self._pipe = weakref.ref(pipe)  # the pipeline holds the run
        self.rule, self.row, self._previous = rule, row, previous
        self.nfe = 0.0
        self.state: dict[str, torch.Tensor] = {}
        self._entered = 0  # `with` blocks that are open on it
        self._closed = False

    def __enter__(self) -> Run:
        self._entered += 1
        self._closed = False
        if (pipe := self._pipe()) is not None:
            _set(pipe, self)
        return self

    def __exit__(self, *exc) -> None:
        self._entered -= 1
        if self._entered:
            return
        self._closed = True
        pipe, previous = self._pipe(), self._previous
        while previous is not None and previous._closed:  # blocks that were left in another order
            previous = previous._previous
        if pipe is not None and vars(pipe).get("_guidance_run") is self:
            _set(pipe, previous)

    def __getstate__(self):
        return vars(self) | {"_pipe": None, "_previous": None}

    def __setstate__(self, state):
        vars(self).update(state, _pipe=lambda: None)


@overload
def guide(pipe: Any, rule: Guidance) -> Run: ...
@overload
def guide(pipe: Any, rule: None) -> None: ...
def guide(pipe: Any, rule: Guidance | None) -> Run | None:
    """Every call of `pipe` is guided by `rule`, until guide(pipe, None), or the end of a `with` block.

        with guide(pipe, APG(scale=10)) as run:
            image = pipe("a red circle").images[0]

    CFG is switched on, at the rule's scale, whatever the pipeline's default; a guidance_scale (or true_cfg_scale) in a call
    takes the rule's place for that call. Pipelines whose CFG needs a negative prompt get "". A rule given inside another's
    `with` block replaces it until its own block ends. Raises ValueError for a pipeline that cannot be guided.
    """
    if rule is None:
        _set(pipe, None)
        return None
    if not isinstance(rule, Guidance):
        hint = "; for a guider of diffusers: from_guider(guider)" if hasattr(rule, "set_state") else ""
        raise TypeError(f"rule must be a Guidance such as CFG(scale=4) or APG(scale=10), got {rule!r:.60}{hint}")
    row = row_for(pipe)
    for name, module in denoisers(pipe).items():
        config = getattr(module, "config", {})
        if config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                f"{name} is guidance-distilled (time_cond_proj_dim is set, as in LCM): the pipeline never runs the "
                "unconditional branch that a guidance rule needs"
            )
        if config.get("guidance_embeds") and row.scale == "guidance_scale":
            raise ValueError(
                f"{name} is guidance-distilled (guidance_embeds) and {type(pipe).__name__} has no true_cfg_scale: it runs no "
                "CFG that a rule could guide"
            )
        if config.get("guidance_embeds"):
            warnings.warn(
                f"{name} is guidance-distilled (guidance_embeds): guidance_scale stays the embedded guidance; "
                f"{type(rule).__name__} guides on top of it, as true CFG does, with further evaluations at each step",
                stacklevel=2,
            )
    if not row.known:
        warnings.warn(
            f"{type(pipe).__name__} is not in the pipeline table; its layout is guessed from its calls. "
            "diffgen.check(pipe, prompt) compares CFG through the tap with the stock pipeline",
            stacklevel=2,
        )
    if any(cls.__name__ in FROM_SOURCE for cls in type(pipe).__mro__):
        warnings.warn(
            f"the row of {type(pipe).__name__} in the pipeline table was read off its source; no test runs this class. "
            "diffgen.check(pipe, prompt) compares CFG through the tap with the stock pipeline",
            stacklevel=2,
        )
    previous: Run | None = vars(pipe).get("_guidance_run")
    if previous is not None and not previous._entered:
        previous._previous = None  # replaced for good: nothing goes back beyond it
    run = Run(pipe, rule, row, previous)
    _set(pipe, run)
    return run


def _set(pipe, run: Run | None) -> None:
    base: Any = getattr(type(pipe), "_unguided", type(pipe))
    pipe.__class__ = base if run is None else _guided_class(base)
    if run is None:
        vars(pipe).pop("_guidance_run", None)
    else:
        vars(pipe)["_guidance_run"] = run


@functools.cache
def _guided_class(base: Any) -> type:
    """A subclass of the same name whose call is guided, so that saving and isinstance are as before."""

    @functools.wraps(base.__call__)
    def __call__(self, *args, **kwargs):
        run: Run = vars(self)["_guidance_run"]
        arguments = bind(base, args, kwargs)
        rule, arguments = apply_rule(run.row, run.rule, arguments)
        with tap(self, rule, run.row, arguments) as opened:
            try:
                result = base.__call__(self, **arguments)
            finally:
                run.nfe, run.state = opened.nfe, opened.state
        if rule.active and not opened.guided_steps:
            raise RuntimeError(
                f"{base.__name__} never predicted for the negative prompt, so {type(rule).__name__} had nothing to guide: at "
                f"{run.row.scale}={arguments[run.row.scale]} it runs no CFG (its {run.row.scale} may be a distilled guidance)"
            )
        return result

    def __reduce_ex__(self, protocol):  # pickle finds classes by name, and would find the unguided one
        return _new_guided, (base,), vars(self).copy()

    members: dict[str, Any] = {
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "_unguided": base,
    }
    return type(base.__name__, (base,), members)


def _new_guided(base: type):
    guided: Any = _guided_class(base)
    return guided.__new__(guided)


def refuse_scale(pipe, call: dict) -> None:
    """What is fitted for a rule is fitted at the rule's scale: raises ValueError where the call gives another."""
    name = row_for(pipe).scale
    if name in call:
        raise ValueError(f"{name}={call[name]!r}: give the scale to the rule, not to the call")


def bind(base: type, args: tuple, kwargs: dict) -> dict:
    """Positional and keyword arguments of base.__call__ -> a dict of the arguments given."""
    return bind_method(inspect.signature(base.__call__), args, kwargs)


def tap(pipe, rule: Guidance | None, row: Row, arguments: dict, **options) -> Tap:
    """The tap for one call with these arguments."""
    return Tap(pipe, rule, row=row, batch=batch_size(arguments), arguments=arguments, **options)


def batch_size(arguments: dict) -> int | None:
    """Samples that a call makes: prompts times images (or videos) per prompt. None where it can't be told."""
    for name in ("prompt", "prompt_embeds"):
        value = arguments.get(name)
        if value is not None:
            prompts = 1 if isinstance(value, str) else len(value)
            per_prompt = arguments.get("num_images_per_prompt") or arguments.get("num_videos_per_prompt") or 1
            return prompts * per_prompt
    return None


def apply_rule(row: Row, rule: Guidance | None, arguments: dict) -> tuple[Guidance | None, dict]:
    """(rule for this call, call arguments that switch the pipeline's CFG on for it). rule None: CFG off."""
    arguments = dict(arguments)
    if rule is None:
        return None, arguments | {row.scale: 1.0 - row.scale_offset}
    given = rule
    for name in (row.scale, "guidance_scale_2"):
        if arguments.get(name) is not None and not real(arguments[name]):
            raise ValueError(f"{name} must be a finite number, got {arguments[name]!r}")
    if arguments.get(row.scale) is not None:
        rule = rule.with_scale(arguments[row.scale] + row.scale_offset)
    if rule.scale < 1:
        raise ValueError(
            f"scale {rule.scale:g}: pipelines run no CFG below 1 (1: conditional only), so it would be ignored"
        )
    if arguments.get("guidance_scale_2") is not None:
        rule = Experts(rule, given.with_scale(arguments["guidance_scale_2"]))
    if arguments.get("guidance_rescale"):  # the pipeline would compare the guided prediction with itself
        rule = Rescale(rule, arguments["guidance_rescale"])
        arguments["guidance_rescale"] = 0.0
    # at 2 the pipeline runs CFG, which a rule like PAG(1) needs; what scale it thinks of has no effect on u + w (g - g)
    arguments[row.scale] = (rule.scale if rule.scale > 1 or not rule.active else 2.0) - row.scale_offset
    if (
        row.needs_negative
        and rule.active
        and not any(arguments.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
    ):
        arguments["negative_prompt"] = ""
    return rule, arguments
