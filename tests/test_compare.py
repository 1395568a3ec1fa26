"""`diffgen compare`: the page, its numbers, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from html import unescape

import pytest
import torch
from typer.testing import CliRunner

from diffgen import registry
from diffgen.cli import app
from diffgen.compare import _finding, _ranking, apart, compare, front, plan
from diffgen.compare_page import Measured
from diffgen.pipelines import CFG
from diffgen.tiny import tiny_pipeline

PROMPTS = ["a red circle", "two blue squares"]


@dataclass
class Broken(CFG):
    """A rule that this pipeline cannot run above scale 3."""

    def begin(self, pipe, step):
        if self.scale > 3:
            raise ValueError("needs <layers> that aren't there")


@pytest.fixture(autouse=True, scope="module")
def broken():
    registry.methods("guidance")
    registry._METHODS["guidance", "broken"] = registry.Method("broken", "guidance", Broken)
    yield
    del registry._METHODS["guidance", "broken"]


def small(out, **options):
    return plan(
        **{"rules": "cfg,rescale+apg:eta=0.5,broken", "scales": "2,4", "prompts": PROMPTS, "steps": 2, "out": out}
        | options
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "new" / "folder"
    numbers = compare(small(out), quiet=True)
    return numbers, out


def page_of(out) -> str:
    return (out / "compare.html").read_text()


def test_the_page_needs_nothing_else(made):
    page = page_of(made[1])
    assert not re.search(r"https?://|@import|<script|<link|url\(", page)
    sources = re.findall(r'(?:src|srcset|href)="([^"]{0,22})', page)
    assert sources
    assert all(source == "data:image/png;base64," for source in sources)
    assert "prefers-color-scheme: dark" in page
    assert sorted(p.name for p in made[1].iterdir()) == ["compare.html", "compare.json"]


def test_every_cell_is_there_and_can_be_reached_by_keyboard(made):
    page, cells = page_of(made[1]), made[0]["cells"]
    labels = re.findall(r'<div class="cell[^>]*tabindex="0"[^>]*aria-label="([^"]*)" aria-describedby="([^"]*)"', page)
    assert [label for label, _ in labels] == [f"{c['rule']}, scale {c['scale']:g}" for c in cells]
    assert len(cells) == 6
    assert all(page.count(f'id="{tip}"') == 1 for _, tip in labels)
    assert page.count('<div class="mosaic"') == 5
    assert page.count('alt="two blue squares"') == 5


def test_the_numbers_of_the_page_are_those_of_the_json(made):
    page, (numbers, out) = page_of(made[1]), made
    assert json.loads((out / "compare.json").read_text()) == numbers
    table = re.search(r"<tbody>(.*?)</tbody>", page, re.S)[1]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table, re.S)]
    for cell, (rule, scale, nfe, _, verified, saturation, contrast, clipping, psnr, ssim) in zip(
        numbers["cells"], rows
    ):
        assert (rule.replace("<wbr>", ""), scale) == (cell["rule"], f"{cell['scale']:g}")
        if cell["error"]:
            assert nfe == "failed"
            continue
        assert nfe == "4"  # CFG, two steps
        assert verified.startswith(f"{cell['verified']['value']:.1%} [")
        assert (saturation, contrast) == (f"{cell['saturation']['value']:.3f}", f"{cell['contrast']['value']:.3f}")
        assert clipping == f"{cell['clipping']['value']:.1%}"
        if rule == "cfg":
            assert (psnr, ssim) == ("–", "–")
        elif rule == "broken":  # CFG, as far as it goes: the reference's images
            assert (psnr, ssim) == ("same images", "1.000")
            assert cell["psnr"] is None
        else:
            assert (psnr, ssim) == (f"{cell['psnr']:.1f} dB", f"{cell['ssim']:.3f}")
    assert len(rows) == 6


def test_the_command_on_the_page_makes_the_same_numbers(made, tmp_path):
    numbers, _ = made
    shown = unescape(re.search(r"<pre>(.*?)</pre>", page_of(made[1]), re.S)[1])
    assert shown.replace(" \\\n ", "") == numbers["command"] != shown
    words = [*shlex.split(numbers["command"])[1:-1], str(tmp_path / "page.html"), "--json", "--quiet"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    again = json.loads(result.stdout)
    assert _but_times(again) == _but_times(numbers)
    assert {p.name for p in tmp_path.iterdir()} == {"page.html", "page.json"}


def test_another_seed_gives_other_images(made, tmp_path):
    other = compare(small(tmp_path, rules="cfg", scales="2", seed=1), quiet=True)
    assert other["cells"][0]["saturation"] != made[0]["cells"][0]["saturation"]


def _but_times(numbers: dict) -> dict:
    cells = [{k: v for k, v in cell.items() if k != "seconds_per_image"} for cell in numbers["cells"]]
    return {**{k: v for k, v in numbers.items() if k != "command"}, "cells": cells}


def test_a_rule_that_fails_is_shown_in_its_cell(made):
    failed = made[0]["cells"][-1]
    assert failed["error"] == "ValueError: needs <layers> that aren't there"
    assert failed["saturation"] is None
    page = page_of(made[1])
    assert "needs &lt;layers&gt; that aren" in page
    assert page.count("This cell failed") == 1
    assert "1 of 6 cells failed" in page


def test_nothing_is_written_where_every_cell_fails(tmp_path):
    with pytest.raises(RuntimeError, match=r"no rule could run on 'shapes'.*layers"):
        compare(small(tmp_path / "out", rules="broken", scales="4,5"), quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": "cfg,apq"}, "'apq' is unknown: did you mean 'apg'"),
        ({"rules": "apg:etta=1"}, "no option 'etta': did you mean 'eta'"),
        ({"rules": "apg:eta"}, "apg:eta"),
        ({"rules": "apg:scale=3"}, "given by --scales"),
        ({"rules": "cfg,cfg"}, "names 'cfg' twice"),
        ({"rules": " "}, "--rules is empty"),
        ({"rules": "cfg,,apg"}, "item 2 is empty"),
        ({"scales": ""}, "--scales is empty"),
        ({"scales": "2,two"}, "'two' is not a number"),
        ({"scales": "2,nan"}, "nan must be a finite number above 1"),
        ({"scales": "1"}, "must be a finite number above 1"),
        ({"scales": "inf"}, "must be a finite number above 1"),
        ({"scales": "2000"}, "CFG.scale must be"),
        ({"images_per_prompt": 0}, "images-per-prompt must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"prompts": ["a red circel"]}, "is not of the world 'shapes'"),
        ({"prompts": ["  "]}, "must not be empty"),
        ({"prompts": None, "model": "some/model"}, "needs --prompt"),
        ({"clip": "nowhere"}, "expected a folder with a CLIP model"),
    ],
)
def test_bad_input_is_told_before_anything_is_sampled(tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        small(tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_told_before_anything_is_sampled(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="can't write in"):
        small(tmp_path / "file" / "page.html")
    (tmp_path / "page.html").mkdir()
    with pytest.raises(IsADirectoryError):
        small(tmp_path / "page.html")


def test_lists_inside_an_option_keep_their_commas(tmp_path):
    todo = small(tmp_path, rules="cfg,slg:layers=[1, 2]")
    assert list(todo.rules) == ["cfg", "slg:layers=[1, 2]"]


def test_the_front_is_what_no_other_point_beats():
    assert front([(1, 1), (2, 3), (3, 3), (2, 3), (4, 4), (5, 2)]) == [0, 1, 3, 4]


def test_apart_means_more_than_chance_on_the_same_prompts():
    def bits(ones: int) -> torch.Tensor:
        return (torch.arange(64) < ones).double()

    assert not apart(bits(5), bits(0))  # exact McNemar: 5 to 0 is p = 0.0625, 6 to 0 is 0.031
    assert apart(bits(6), bits(0))
    assert apart(bits(0), bits(6))
    assert not apart(bits(30), bits(30))
    assert not apart(bits(40), 1 - bits(30))  # 40 to 34, but each wins where the other loses
    scores = 10 * torch.rand(20, generator=torch.Generator().manual_seed(0))
    assert apart(scores + 0.1 + 0.01 * bits(10)[:20], scores)  # paired: the spread of the prompts is no noise
    assert not apart(scores[:1] + 3, scores[:1])


@pytest.mark.parametrize(
    ("verified", "best", "words"),
    [
        ((60, 30, 20), True, "The other 2 measured lower beyond the noise of 64 images."),
        ((60, 58, 20), False, "With 64 images 1 of the other 2 cannot be told apart from it."),
        ((60, 58, 57), False, "With 64 images the other 2 cannot be told apart from it."),
        ((60, 60, 20), False, "2 settings tie at the highest share verified, 93.8% [85.0%, 97.5%]: cfg at scale"),
        ((60,), None, "cfg at scale 2: share verified 93.8% [85.0%, 97.5%], 4 evaluations an image."),
    ],
)
def test_a_winner_is_named_only_beyond_the_noise(tmp_path, verified, best, words):
    from diffgen.eval.functional import wilson

    todo = small(tmp_path, prompts=None, rules="cfg", scales="2,3,4")
    cells = []
    for scale, ones in zip(todo.scales, verified):
        low, high = wilson(ones, 64)
        value = {"value": ones / 64, "low": low, "high": high}
        results = (torch.arange(64) < ones).double()
        cells.append(Measured("cfg", scale, nfe=4.0, verified=value, results=results))
    ranking = _ranking(todo, cells)
    assert (ranking and ranking["best"]) == (None if not best else ["cfg", 2.0])
    assert (ranking is None) == (best is None)
    assert words in _finding(todo, cells, ranking)


def test_one_image_a_cell_is_not_ranked(tmp_path):
    numbers = compare(small(tmp_path, rules="cfg,ag+apg", prompts=PROMPTS[:1]), quiet=True)
    assert numbers["ranking"] is None
    assert numbers["pareto"] == {"nfe": [], "saturation": []}
    assert "too few to rank" in numbers["finding"]
    assert 'class="cell best"' not in page_of(tmp_path)


def test_what_was_fitted_is_told(tmp_path):
    numbers = compare(small(tmp_path, rules="linear_ag,ag,ag+apg:threshold=0.9,cfg", scales="4"), quiet=True)
    fitted = [cell["fitted"] for cell in numbers["cells"]]
    assert fitted[0] == {"linear_ag": {"prompts": 64, "other_prompts": True}}
    assert fitted[1:] == [
        {"ag": {"threshold": "0.991", "default": True}},
        {"ag": {"threshold": "0.9", "default": False}},
        {},
    ]
    page = page_of(tmp_path)
    assert "linear_ag: coefficients fitted on 64 other prompts at each scale, not counted in NFE or time." in page
    assert "ag: threshold 0.991, the default, not calibrated" in page
    assert "threshold=0.9: threshold 0.9, as given." in page
    assert "ag+<wbr>apg:<wbr>threshold=0.9" in page


@pytest.mark.parametrize(
    ("n", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (6, 3), (7, 3), (8, 4), (12, 4), (13, 4), (16, 4)]
)
def test_a_mosaic_has_no_empty_place_where_it_can(n, columns):
    from diffgen.eval.report import Cell, Figure

    assert Cell([Figure("", "")] * n).columns == columns


def test_similarity_counts_equal_images_as_60_db():
    from diffgen.eval.similarity import similarity

    a = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    b = a.clone()
    b[1] = (a[1].int() + torch.where(a[1] < 128, 16, -16)).to(torch.uint8)
    assert similarity(a, a) == {"psnr": 60.0, "ssim": pytest.approx(1.0)}
    one = 20 * torch.log10(torch.tensor(255 / 16)).item()
    assert similarity(a, b)["psnr"] == pytest.approx((60 + one) / 2, rel=1e-5)


def test_another_model_is_compared_by_similarity_and_by_clip(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    import diffgen

    tiny_pipeline("StableDiffusionPipeline").save_pretrained(tmp_path / "sd")
    call = {"model": str(tmp_path / "sd"), "rules": "cfg,apg", "scales": "4", "images_per_prompt": 2}
    plain = compare(small(tmp_path / "a", **call), quiet=True)
    assert plain["quality"]["measure"] == "psnr"
    assert plain["cells"][0]["verified"] is plain["cells"][0]["clip"] is None
    assert plain["cells"][1]["psnr"] > 5
    assert "verified" not in page_of(tmp_path / "a")

    tokenizer = diffgen.load("shapes").tokenizer
    layer = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 8}
    vision = layer | {"image_size": 32, "patch_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=layer | text, vision_config=vision, projection_dim=8))
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    model.save_pretrained(tmp_path / "clip")
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(tmp_path / "clip")
    scored = compare(small(tmp_path / "b", **call, clip=tmp_path / "clip"), quiet=True)
    assert scored["quality"]["measure"] == "clip"
    value = scored["cells"][0]["clip"]
    assert value["low"] <= value["value"] <= value["high"]
    assert 0 <= value["value"] <= 100
    assert "CLIP score" in page_of(tmp_path / "b")
