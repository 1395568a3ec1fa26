"""`diffgen fit` on the command line."""

import json

import pytest
from typer.testing import CliRunner

from diffgen import load
from diffgen.cli import app
from diffgen.pipelines import CFG, LinearAG, guide

FEW = ["-n", "4", "--steps", "3", "--batch", "4"]


def run(*arguments):
    return CliRunner().invoke(app, ["fit", *map(str, arguments)])


def test_linear_ag_fits_says_how_well_and_its_file_works(tmp_path):
    out = tmp_path / "c.json"
    done = run("linear-ag", "--set", "scale=3", *FEW, "--out", out)
    assert done.exit_code == 0, done.output
    assert "R² of the estimate" in done.output
    assert f"--set coefficients={out} scale=3 --steps 3" in done.output
    pipe = load("shapes")
    with guide(pipe, LinearAG(CFG(3), str(out))):
        pipe("a red circle", num_inference_steps=3, output_type="latent")
    done = run("linear-ag", "--set", "scale=3", *FEW, "--out", out, "--json")
    assert json.loads(done.stdout[done.stdout.index("{") :])["prompts"] == 4


def test_its_default_file_is_named_after_the_rule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("linear-ag", "--set", "scale=3", *FEW).exit_code == 0
    assert run("linear-ag", "--set", "scale=3", "--set", "rescale=0.7", *FEW).exit_code == 0
    names = sorted(path.name for path in (tmp_path / "linear_ag").iterdir())
    assert names == ["CFG_scale=3-steps3.json", "CFG_scale=3_rescale=0.7-steps3.json"]


def test_ag_prints_a_line_that_can_be_pasted():
    done = run("ag", "--set", "scale=3", *FEW, "--warmup", "1", "--saving", "0.1")
    assert done.exit_code == 0, done.output
    line = done.output.strip().splitlines()[-1]
    assert line.startswith("--guidance ag+cfg --set threshold=0.")
    assert line.endswith("space=native warmup=1 scale=3 --steps 3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["linear-ag", "--model", "nope"], "--prompts FILE is needed: 'nope' is no world"),
        (["linear-ag", "--prompts", "missing.txt"], "missing.txt.*no such file"),
        (["linear-ag", "--prompts", "empty.txt"], "has no line with a prompt"),
        (["linear-ag", "--prompts", "binary.txt"], "is no UTF-8 text file"),
        (["linear-ag", "--out", "."], "is no regular file"),
        (["linear-ag", "--set", "scalex=3"], "did you mean 'scale'"),
        (["ag", "--saving", "0.6", "-n", "2"], r"saving must be in \(0, 0.5\)"),
    ],
)
def test_bad_input_is_told_before_anything_is_sampled(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises((ValueError, OSError), match=message):
        CliRunner().invoke(app, ["fit", *arguments], catch_exceptions=False)
    assert not list(tmp_path.glob("**/*.json"))
