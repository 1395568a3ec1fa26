"""The registry: names, options, and what it says about unknown ones."""

import dataclasses

import pytest

from diffgen import registry
from diffgen.registry import STAGES, build, get, methods, register


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """Methods registered by a test are gone after it."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


SHIPPED = [m for m in methods() if m.function.__module__.startswith("diffgen.") and not m.name.startswith("test_")]


@pytest.mark.parametrize("method", SHIPPED, ids=lambda m: f"{m.stage}-{m.name}")
def test_every_method_has_a_summary_and_options_with_defaults(method):
    assert 10 < len(method.summary) <= 130
    assert "\n" not in method.summary
    assert not method.required
    with pytest.raises(ValueError, match=rf"{method.stage} '{method.name}' has no option 'optoin'"):
        build(method.stage, method.name, {"optoin": 1})
    built = build(method.stage, method.name)
    assert callable(built)
    for option, default in method.options.items():  # a default is a valid value
        build(method.stage, method.name, {option: default})


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_method(stage):
    assert [m for m in SHIPPED if m.stage == stage]


def test_methods_are_ordered_and_of_one_stage_if_asked():
    found = methods()
    assert found == sorted(found, key=lambda m: (m.stage, m.name))
    assert {m.stage for m in methods("objective")} == {"objective"}


def test_an_unknown_name_fails_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"advantage 'gruop' is unknown: did you mean 'group'\? \(valid: .*group"):
        get("advantage", "gruop")
    with pytest.raises(ValueError, match=r"stage 'reward_' is unknown: did you mean 'reward'"):
        register("reward_", "x")


def test_an_unknown_option_fails_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"objective 'clipped' has no option 'clip_rnge': did you mean 'clip_range'"):
        build("objective", "clipped", {"clip_rnge": 1})


@pytest.mark.parametrize(
    ("value", "bound"), [("1e-4", 1e-4), (3, 3.0), ("0.5", 0.5), (None, None), ("abc", ValueError), ([1], ValueError)]
)
def test_options_are_converted_by_their_annotation(value, bound):
    if bound is ValueError:
        with pytest.raises(ValueError, match=r"objective 'clipped': option 'clip_range_high': .*number.*, got "):
            build("objective", "clipped", {"clip_range_high": value})
    else:
        assert build("objective", "clipped", {"clip_range_high": value}).keywords == {"clip_range_high": bound}


def test_options_without_annotation_are_passed_as_they_are():
    @register("objective", "test_plain")
    def plain(logp, old_logp, advantage, *, thing=None, other: "NoSuchName" = 1):  # noqa: F821
        """Anything goes."""

    assert build("objective", "test_plain", {"thing": [1], "other": "x"}).keywords == {"thing": [1], "other": "x"}


def test_an_option_without_default_must_be_given():
    @register("objective", "test_needs")
    def needs(logp, old_logp, advantage, *, beta: float):
        """Needs beta."""

    assert get("objective", "test_needs").required == {"beta"}
    with pytest.raises(ValueError, match="objective 'test_needs' needs the option beta, which has no default"):
        build("objective", "test_needs")
    assert build("objective", "test_needs", {"beta": 2}).keywords == {"beta": 2}


def test_a_class_is_constructed_with_its_options():
    @register("guidance", "test_rule")
    @dataclasses.dataclass
    class Rule:
        """A rule."""

        scale: float = 2.0

    assert build("guidance", "test_rule", {"scale": "3"}) == Rule(3.0)
    assert get("guidance", "test_rule").options == {"scale": 2.0}


def test_a_callable_is_imported_by_its_path():
    assert get("reward", "math:sqrt").function(9) == 3
    for name in ("math:sqroot", "no_such_module:f"):
        with pytest.raises(ValueError, match=rf"reward '{name}' could not be imported"):
            get("reward", name)


def test_a_name_belongs_to_one_function():
    def make():
        @register("select", "test_same")
        def same(advantage, rollout):
            """One."""

        return same

    make()
    make()  # the same function once more, as on a reload

    def other(advantage, rollout):
        """Another."""

    with pytest.raises(ValueError, match="select 'test_same' is registered already, by"):
        register("select", "test_same")(other)
