"""`diffgen sample`."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffgen import cli
from diffgen.pipelines import APG, guide, specs


def sample(*words, out):
    result = CliRunner().invoke(cli.app, ["sample", *words, "--steps", "2", "--out", str(out)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_line_of_the_readers_first_try_works(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        specs, "rule", lambda spec, options, real=specs.rule: seen.append(real(spec, options)) or seen[-1]
    )
    line = ("--model", "shapes", "--prompt", "a red circle", "--guidance", "apg", "--set", "scale=10", "eta=0.5")
    result = sample(*line, out=tmp_path / "s")
    assert result.exit_code == 0, result.output
    assert seen == [APG(scale=10, eta=0.5)]
    assert sorted(p.name for p in tmp_path.rglob("*.png")) == ["000.png", "s-grid.png"]
    assert "NFE 4" in result.output


def test_positional_and_named_prompts_make_one_picture_each_and_a_grid_of_all(tmp_path):
    import diffgen

    words = ("two blue squares", "-p", "a red circle", "-g", "rescale+cfg", "--option", "scale=3", "--set", "phi=0.5")
    sample(*words, out=tmp_path / "s")
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["000.png", "001.png"]  # a set that can be evaluated
    assert Image.open(tmp_path / "s-grid.png").width > 2 * 32
    pipe = diffgen.load("shapes")
    with guide(pipe, specs.rule("rescale+cfg", {"scale": 3, "phi": 0.5})):
        images = pipe(
            ["a red circle", "two blue squares"], generator=torch.Generator().manual_seed(0), num_inference_steps=2
        ).images
    for i, image in enumerate(images):
        assert Image.open(tmp_path / "s" / f"{i:03d}.png").tobytes() == image.tobytes()


def test_a_negative_prompt_changes_the_picture(tmp_path):
    for name, extra in (("with", ("--negative-prompt", "a blue square")), ("without", ())):
        sample("a red circle", *extra, out=tmp_path / name)
    with_it, without = (Image.open(tmp_path / name / "000.png").tobytes() for name in ("with", "without"))
    assert with_it != without


def test_a_word_with_an_equals_sign_is_a_prompt_unless_set_is_there_and_knows_it():
    split = cli._prompts_and_options
    assert split(["eta=0"], False, [], ["eta"]) == (["eta=0"], [])
    assert split(["a = b", "eta=0"], False, ["scale=3"], ["eta"]) == (["a = b"], ["scale=3", "eta=0"])
    # with --prompt no word is meant as a prompt: a misspelt option is told, not drawn
    assert split(["etta=0"], True, ["scale=3"], ["eta"]) == ([], ["scale=3", "etta=0"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no prompt given"),
        (("a red circle", "-g", "apq"), "did you mean 'apg'"),
        (("-p", "a red circle", "-g", "apg", "--set", "scale=3", "etta=1"), "did you mean 'eta'"),
        (("a red circle", "--set", "scale"), "expected KEY=VALUE"),
        (("a red circle", "-g", "cfg+apg"), "'cfg' is not a wrapper"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        sample(*words, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
