"""Guidance rules from text."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from diffgen import registry
from diffgen.pipelines import APG, CFG, LinearAG, Rescale, Wrapper
from diffgen.pipelines.specs import assignments, fit, option_names, parse, rule


@dataclass
class Late(Wrapper):
    """A wrapper with an option that CFG has too."""

    rescale: float = 0.25
    late: int = 3


@pytest.fixture(autouse=True)
def late(monkeypatch):
    registry.methods("guidance")
    monkeypatch.setitem(registry._METHODS, ("guidance", "late"), registry.Method("late", "guidance", Late))


def test_a_name_is_the_registered_rule_with_its_options():
    assert rule("apg") == APG()
    assert rule("apg", {"scale": 10, "eta": 0.5}) == APG(scale=10, eta=0.5)


def test_a_chain_is_read_from_the_outside_in_and_scale_reaches_the_innermost_rule():
    built = rule("late + rescale+apg", {"phi": 0.3, "scale": 10, "eta": 1, "late": 5})
    assert built == Late(Rescale(APG(scale=10, eta=1), phi=0.3), late=5)
    assert built.scale == 10


def test_a_chain_that_ends_with_a_wrapper_wraps_cfg():
    assert rule("rescale", {"scale": 4}) == Rescale(CFG(4))


def test_an_option_of_two_links_goes_to_the_outer_one():
    assert rule("late+cfg", {"rescale": 0.5}) == Late(CFG(), rescale=0.5)


def test_unknown_options_and_names_are_told_with_the_nearest_valid_ones():
    with pytest.raises(ValueError, match=r"'rescale\+apg' has no option 'etta': did you mean 'eta'.*momentum.*phi"):
        rule("rescale+apg", {"etta": 1})
    with pytest.raises(ValueError, match=r"the rule inside is named in the chain, such as rescale\+apg"):
        rule("rescale+apg", {"rule": 1})
    for spec in ("apq", "rescale+apq"):
        with pytest.raises(ValueError, match="'apq' is unknown: did you mean 'apg'"):
            rule(spec)
    for spec in ("", "rescale+", "+apg"):
        with pytest.raises(ValueError, match="'' is unknown"):
            rule(spec)


def test_a_rule_that_wraps_nothing_can_only_stand_last():
    with pytest.raises(ValueError, match=r"'apg\+rescale': 'apg' is not a wrapper.*wrappers: .*rescale"):
        rule("apg+rescale")


def test_values_are_checked_by_their_types_and_by_the_rule():
    with pytest.raises(ValueError, match="option 'scale'"):
        rule("rescale+cfg", {"scale": "much"})
    with pytest.raises(ValueError, match=r"Rescale\.phi must be in \[0, 1\]"):
        rule("rescale", {"phi": 2})


def test_option_names_are_those_of_the_whole_chain():
    assert option_names("rescale+cfg") == ["phi", "scale", "rescale"]


def test_parse_splits_a_spec_from_its_options():
    assert parse("rescale+apg:eta=0.5:norm_threshold=auto") == ("rescale+apg", {"eta": 0.5, "norm_threshold": "auto"})
    assert parse("diffgen.pipelines.apg:APG:eta=1") == ("diffgen.pipelines.apg:APG", {"eta": 1})
    assert rule(*parse("diffgen.pipelines.apg:APG:eta=1")) == APG(eta=1)
    for pair in ("eta", "=3"):
        with pytest.raises(ValueError, match="expected KEY=VALUE"):
            assignments([pair])
    with pytest.raises(ValueError, match="YAML"):
        assignments(["eta=[1"])


def test_fit_reaches_a_rule_inside_wrappers():
    class Learned(LinearAG):
        def fitted(self, pipe, prompts, num_inference_steps):
            return CFG(self.scale, rescale=num_inference_steps / 10)

    assert fit(Rescale(Learned(4.0)), None, ["a"], num_inference_steps=5) == Rescale(CFG(4.0, rescale=0.5))
    plain = Rescale(CFG(4.0))
    assert fit(plain, None, ["a"], num_inference_steps=5) is plain


def test_options_name_their_link_and_lists_come_in_several_forms():
    built = rule("interval+slg", {"start": 0.1, "slg.start": 0.0, "layers": "7,8", "scale": 4})
    assert (built.start, built.inner.start, built.inner.layers, built.scale) == (0.1, 0.0, (7, 8), 4.0)
    assert rule("pag", {"layers": 1}).layers == (1,)
    assert rule("pag", {"layers": "transformer_blocks.1"}).layers == ("transformer_blocks.1",)
    assert rule("fdg", {"scales": "(8, 3)"}).scales == (8.0, 3.0)
    assert rule("fdg", {"scales": [8, 3]}).scales == (8.0, 3.0)
    with pytest.raises(ValueError, match=r"has no option 'pag.start'"):
        rule("interval+slg", {"pag.start": 0.0})
