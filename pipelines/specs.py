"""Guidance rules from text: "apg", a chain of wrappers "ag+apg" (outermost first), options "ag+apg:eta=0.5:scale=10"."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import yaml

from diffgen import registry
from diffgen.names import nearest
from diffgen.pipelines.base import Guidance, Wrapper
from diffgen.pipelines.linear import LinearAG


def rule(spec: str, options: dict[str, Any] | None = None) -> Guidance:
    """The rule that a chain of registered names stands for: "ag+apg" is AdaptiveGuidance(APG()).

    Each option goes to the first link that has one of that name, so that scale reaches the innermost rule; "slg.start"
    names the link. A chain that ends with a wrapper wraps CFG. Raises ValueError for a name or an option that isn't there,
    with the nearest valid one.
    """
    chain = _chain(spec)
    own: list[dict[str, Any]] = [{} for _ in chain]
    for given, value in (options or {}).items():
        name, _, option = given.rpartition(".")  # "slg.start", where the first that has a start is another
        links = [i for i, m in enumerate(chain) if option in _options(m) and name in ("", m.name)]
        link = links[0] if links else None
        if option == "rule":
            raise ValueError(
                f"guidance {spec!r}: the rule inside is named in the chain, such as {chain[0].name}+apg, and its scale is scale"
            )
        if link is None:
            raise ValueError(f"guidance {spec!r} has no option {given!r}: {nearest(given, option_names(spec))}")
        own[link][option] = _listed(chain[link], option, value)
    built = None
    for method, given in reversed(list(zip(chain, own))):
        built = registry.build("guidance", method.name, given if built is None else {**given, "rule": built})
        if not isinstance(built, Guidance):
            raise ValueError(f"guidance {method.name!r} gives a {type(built).__name__}, not a Guidance")
    assert built is not None
    return built


def option_names(spec: str) -> list[str]:
    """The options of all links of a chain."""
    return list(dict.fromkeys(option for method in _chain(spec) for option in _options(method)))


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """ "apg:eta=0.5:momentum=0" -> ("apg", {"eta": 0.5, "momentum": 0})."""
    spec, *pairs = text.strip().split(":")
    if pairs and "=" not in pairs[0] and "." in spec:  # "package.module:function"
        spec += ":" + pairs.pop(0)
    return spec, assignments(pairs)


def assignments(pairs: list[str]) -> dict[str, Any]:
    """["scale=10", "space=x0"] -> {"scale": 10, "space": "x0"}; values are YAML."""
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"option {pair!r}: expected KEY=VALUE, for example scale=10")
        try:
            options[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"option {pair!r}: {value!r} is not a value that YAML can read") from None
    return options


def fit(built: Guidance, pipe, prompts: list[str], **call: Any) -> Guidance:
    """The rule with what it has to learn from such calls (LinearAG's coefficients, where none are given), also in wrappers."""
    if isinstance(built, LinearAG) and built.coefficients is None:
        return built.fitted(pipe, prompts, **call)
    if isinstance(built, Wrapper):
        inner = fit(built.inner, pipe, prompts, **call)
        return built if inner is built.inner else dataclasses.replace(built, rule=inner)
    return built


def _listed(method: registry.Method, option: str, value: Any) -> Any:
    """For an option that is a tuple: 1, "8,3" and "(8, 3)" are lists too."""
    if option != "layers" and "tuple" not in str(inspect.signature(method.function).parameters[option].annotation):
        return value
    if isinstance(value, str):
        return [yaml.safe_load(part) for part in value.strip("()[] ").split(",") if part.strip()]
    return value if isinstance(value, (list, tuple)) or value is None else [value]


def _chain(spec: str) -> list[registry.Method]:
    chain = [registry.get("guidance", name.strip()) for name in spec.split("+")]
    for method in chain[:-1]:
        if not _wraps(method):
            raise ValueError(
                f"guidance {spec!r}: {method.name!r} is not a wrapper, so it can only stand last in a chain; wrappers: "
                f"{', '.join(m.name for m in registry.methods('guidance') if _wraps(m))}"
            )
    return [*chain, registry.get("guidance", "cfg")] if _wraps(chain[-1]) else chain


def _wraps(method: registry.Method) -> bool:
    return "rule" in method.options


def _options(method: registry.Method) -> list[str]:
    return [option for option in method.options if option != "rule"]
