import json

import pytest
import torch

from diffgen.eval import compare, functional
from diffgen.eval.extractors import get_extractor
from diffgen.grid import to_uint8

GENERATOR = torch.Generator().manual_seed(0)
A, REFERENCE = (to_uint8(torch.rand(60, 3, 1, 1, generator=GENERATOR).expand(-1, -1, 8, 8)) for _ in range(2))
SIMILAR, GREY = (A // 2 * 2), (A.float().mean(1, keepdim=True).expand(-1, 3, -1, -1)).byte()
PIXELS = "pixels/2"


def test_differences_and_intervals_are_those_of_the_plain_function():
    found = compare(A, GREY, REFERENCE, metrics=["fd", "vendi", "saturation"], extractor=PIXELS, ci_samples=10, seed=3)
    a, b, y = (get_extractor(PIXELS)(images) for images in (A, GREY, REFERENCE))
    for name, fn, rest in (("fd", functional.fd, y), ("vendi", functional.vendi, None)):
        gap, sd = functional.paired_bootstrap_difference(fn, a, b, rest, samples=10, seed=3)
        d = found.differences[name]
        assert (d.difference, d.low, d.high) == pytest.approx((gap, gap - 1.96 * sd, gap + 1.96 * sd))
    values = functional.saturation(A) - functional.saturation(GREY)
    d = found.differences["saturation"]
    assert (d.difference, d.high - d.low) == pytest.approx(
        (float(values.mean()), 2 * 1.96 * float(values.std()) / 60**0.5)
    )


def test_the_better_one_is_named_where_the_interval_leaves_out_0():
    found = compare(A, GREY, REFERENCE, metrics=["fd", "kid", "prdc", "pairwise"], extractor=PIXELS, ci_samples=20)
    assert {d.better for name, d in found.differences.items() if name in ("fd", "pairwise")} == {"a"}
    assert "A is better" in found.table()
    assert found.differences["kid"].interval == "half-sampling"
    turned = compare(GREY, A, REFERENCE, metrics=["fd"], extractor=PIXELS, ci_samples=20).differences["fd"]
    assert turned.better == "b"
    assert turned.difference == -found.difference("fd")


def test_what_differs_by_nothing_much_is_not_distinguishable():
    found = compare(A, SIMILAR, REFERENCE, metrics=["fd", "kid"], extractor=PIXELS)
    assert [d.distinguishable for d in found.differences.values()] == [False, False]
    assert "not distinguishable" in found.table()
    far = compare(A, SIMILAR, REFERENCE // 16, metrics=["fd"], extractor=PIXELS, ci_samples=0)
    assert any("less than 2%" in note for note in far.notes)
    same = compare(A, A, metrics=["vendi"], extractor=PIXELS)
    assert (same.difference("vendi"), same.differences["vendi"].distinguishable) == (0, False)
    assert "a and b are the same images" in same.notes


def test_scorers_are_compared_image_by_image_and_whole_prompts_when_prompts_repeat():
    prompts = [f"prompt {i // 6}" for i in range(60)]
    found = compare(A, GREY, prompts=prompts, metrics=["intra_prompt"], scorers=["saturation"], extractor=PIXELS)
    assert found.differences["saturation"].interval == "bootstrap"
    a, b = (functional.intra_prompt(get_extractor(PIXELS)(images), prompts).value for images in (A, GREY))
    assert found.difference("intra_prompt") == pytest.approx(a - b)


def test_json_markdown_and_page_hold_what_the_comparison_holds(tmp_path):
    found = compare(A, GREY, REFERENCE, metrics=["fd"], extractor=PIXELS, ci_samples=3, out=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["differences"]["fd"]["difference"] == found.difference("fd")
    assert "| fd | ↓ |" in (tmp_path / "report.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert "http" not in page
    assert "A is better" in page


def test_sets_that_are_not_paired_and_absent_inputs_are_errors():
    with pytest.raises(ValueError, match="paired image by image; got 60 and 50 images"):
        compare(A, GREY[:50], metrics=["vendi"], extractor=PIXELS)
    with pytest.raises(ValueError, match="metric 'fd' needs reference"):
        compare(A, GREY, metrics=["fd"], extractor=PIXELS)
    with pytest.raises(KeyError, match="'fd' was not compared; there are vendi"):
        compare(A, A, metrics=["vendi"], extractor=PIXELS, ci_samples=0).difference("fd")
