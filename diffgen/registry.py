"""One registry of methods: a name, a stage, a function with keyword options.

    @register("advantage", "group", paper="2402.03300")
    def group(rewards, group, *, clip=5.0): ...

A config names it as `advantage: group` or `advantage: {name: group, clip: 3}`; options are checked against the signature.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from diffgen.names import nearest

# The modules that fill each stage. A new file of methods is named here.
STAGES: dict[str, tuple[str, ...]] = {
    "guidance": (
        "diffgen.pipelines.cfg",
        "diffgen.pipelines.apg",
        "diffgen.pipelines.post",
        "diffgen.pipelines.schedule",
        "diffgen.pipelines.linear",
        "diffgen.pipelines.adaptive",
        "diffgen.pipelines.perturbed",
        "diffgen.pipelines.directions",
        "diffgen.pipelines.magnitude",
        "diffgen.pipelines.frequency",
    ),
    "reward": ("diffgen.training.rewards.shapes", "diffgen.training.rewards.images"),
    "advantage": ("diffgen.training.advantages",),
    "select": ("diffgen.training.selection",),
    "objective": ("diffgen.training.objectives",),
    "regularizer": ("diffgen.training.regularizers",),
    "optimizer": ("diffgen.training.optimizers",),
}


@dataclass(frozen=True)
class Method:
    name: str
    stage: str
    function: Callable
    paper: str = ""
    needs: frozenset[str] = field(default_factory=frozenset)

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").strip().split("\n")[0]

    @property
    def options(self) -> dict[str, Any]:
        """Options and their defaults: keyword-only parameters, or all of a dataclass's fields."""
        parameters = inspect.signature(self.function).parameters.values()
        keyword = inspect.Parameter.KEYWORD_ONLY
        wanted = [p for p in parameters if p.kind is keyword or isinstance(self.function, type)]
        return {p.name: None if p.default is inspect.Parameter.empty else p.default for p in wanted}

    @property
    def required(self) -> set[str]:
        """Options without a default."""
        parameters = inspect.signature(self.function).parameters
        return {name for name in self.options if parameters[name].default is inspect.Parameter.empty}


_METHODS: dict[tuple[str, str], Method] = {}


def register(stage: str, name: str, *, paper: str = "", needs: set[str] | None = None) -> Callable:
    """Decorator. needs: what the method cannot do without ("gaussian": steps with mean and std; "reference")."""
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is unknown: {nearest(stage, STAGES)}")

    def decorate(function):
        known = _METHODS.get((stage, name))
        if known and (known.function.__module__, known.function.__qualname__) != (
            function.__module__,
            function.__qualname__,
        ):
            raise ValueError(f"{stage} {name!r} is registered already, by {known.function.__module__}")
        _METHODS[stage, name] = Method(name, stage, function, paper, frozenset(needs or ()))
        return function

    return decorate


def methods(stage: str | None = None) -> list[Method]:
    """Every registered method (of a stage), ordered by stage and name."""
    for module in (m for s, modules in STAGES.items() if stage in (None, s) for m in modules):
        importlib.import_module(module)
    return sorted((m for m in _METHODS.values() if stage in (None, m.stage)), key=lambda m: (m.stage, m.name))


def get(stage: str, name: str) -> Method:
    """The method of that name; "module:function" imports a callable. Raises ValueError with the nearest name."""
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{stage} {name!r} could not be imported: {error}") from error
        if not callable(found):
            raise ValueError(f"{stage} {name!r} is a {type(found).__name__}, not a function")
        return Method(name, stage, found)
    known = {m.name: m for m in methods(stage)}
    if name not in known:
        raise ValueError(f"{stage} {name!r} is unknown: {nearest(name, known)}")
    return known[name]


def build(stage: str, name: str, options: dict[str, Any] | None = None, also: Iterable[str] = ()) -> Any:
    """The method with its options bound. A class (guidance rules) is constructed, a function becomes a partial.

    Options are checked, and converted (YAML reads 1e-4 as text), by their annotations. also: keys that a config knows
    beside the options, for the message about an unknown one.
    """
    method, options = get(stage, name), dict(options or {})
    for option, value in options.items():
        if option not in method.options:
            raise ValueError(f"{stage} {name!r} has no option {option!r}: {nearest(option, [*method.options, *also])}")
        options[option] = _inner(value) if (stage, option) == ("guidance", "rule") else _checked(method, option, value)
    if missing := method.required - set(options):
        raise ValueError(f"{stage} {name!r} needs the option {', '.join(sorted(missing))}, which has no default")
    return (
        method.function(**options)
        if isinstance(method.function, type)
        else functools.partial(method.function, **options)
    )


def _inner(value: Any) -> Any:
    """The rule inside a wrapper: in a config a name, or {name: apg, scale: 10}. Anything else the wrapper checks."""
    if isinstance(value, str):
        return build("guidance", value)
    if isinstance(value, dict):
        rest = dict(value)
        if not isinstance(rest.get("name"), str):
            raise ValueError(f"guidance option 'rule': expected a name, or a dict such as {{name: apg}}, got {value!r}")
        return build("guidance", rest.pop("name"), rest)
    return value


def _checked(method: Method, option: str, value: Any) -> Any:
    """The value as the option's annotation says. Raises ValueError."""
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

    try:
        hint = typing.get_type_hints(method.function, include_extras=True)[option]
        rules = method.stage == "guidance"  # they check their numbers themselves, and inf means something to some
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=rules))
    except (KeyError, NameError, TypeError, PydanticUserError):  # not annotated, or by what only a type checker knows
        return value
    number = isinstance(method.options[option], (int, float)) and not isinstance(method.options[option], bool)
    try:
        if number and isinstance(value, bool):
            raise TypeError("expected a number")
        return adapter.validate_python(value)
    except (TypeError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ValueError(
            f"{method.stage} {method.name!r}: option {option!r}: {reason[0].lower()}{reason[1:]}, got {value!r}"
        ) from None
