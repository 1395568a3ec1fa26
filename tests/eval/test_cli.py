import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from PIL import Image

from diffgen import cli
from diffgen.eval import evaluate


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """diffgen eval ARGUMENTS in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("DIFFGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DIFFGEN_TRACEBACK", raising=False)
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for name in ("gen", "ref"):
        (tmp_path / name).mkdir()
        for i in range(10):
            pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["diffgen", "eval", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return (left.value.code or 0, *capsys.readouterr())

    return call


PIXELS = ("-e", "pixels/2", "--ci-samples", "3")


def test_run_prints_the_table_and_writes_every_report(run, tmp_path):
    files = ("--json", "o.json", "--html", "o.html", "--md", "o.md")
    code, out, _ = run("run", "gen", "ref", "-m", "fd,prdc", "-s", "contrast", *PIXELS, *files)
    assert code == 0
    metrics = json.loads((tmp_path / "o.json").read_text())["metrics"]
    assert list(metrics) == ["fd", "precision", "recall", "density", "coverage", "contrast"]
    assert all(name in out for name in metrics)
    assert (tmp_path / "o.html").stat().st_size > 10_000
    assert (tmp_path / "o.md").read_text().startswith("| metric |")


@pytest.mark.parametrize("option", [["--as-json"], ["--json", "-"]])
def test_json_is_printed_on_request(run, option, tmp_path):
    code, out, _ = run("run", "gen", *PIXELS, *option)
    assert (code, list(json.loads(out)["metrics"])) == (0, ["pairwise", "vendi"])
    assert not (tmp_path / "-").exists()


def test_statistics_stand_in_for_the_reference(run, tmp_path):
    assert run("stats", "ref", "-o", "ref.npz", "-e", "pixels/2")[0] == 0
    values = [
        json.loads(run("run", "gen", reference, "-m", "fd", *PIXELS, "--as-json")[1])["metrics"]["fd"]["value"]
        for reference in ("ref", "ref.npz")
    ]
    assert values[0] == pytest.approx(values[1])


def test_compare_prints_paired_differences(run):
    code, out, _ = run("compare", "gen", "ref", "-m", "vendi", *PIXELS, "--as-json")
    assert (code, list(json.loads(out)["differences"])) == (0, ["vendi"])


def test_the_cache_is_listed_and_emptied(run):
    run("run", "gen", *PIXELS)
    listed = json.loads(run("cache", "ls", "--json")[1])
    assert [(entry["n"], entry["extractor"]) for entry in listed] == [(10, "pixels/2")]
    assert run("cache", "rm")[0] == 2
    assert run("cache", "rm", "--all")[0] == 0
    assert json.loads(run("cache", "ls", "--json")[1]) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "nowhere"], 2, "nowhere"),
        (["run", "gen", "-m", "vend"], 2, "nearest is 'vendi'"),
        (["run", "gen", "-m", "fd"], 2, "needs reference"),
        (["run", "gen", "ref", "-m", "prdc", "-n", "3", *PIXELS], 2, "needs at least 6 images with k=5"),
        (["run", "gen", "-s", "ocr:engine"], 2, "name:option=value"),
        (["run", "gen", "--prompts", "two.txt", *PIXELS], 2, "got 2 prompts and 10 images"),
        (["run", "gen", "-e", "pixels/2", "--html", "gen/0.png/x.html"], 2, "--html"),
        (["run", "gen", "-e", "timm:resnet18.a1_in1k"], 3, "not on this machine"),
        (["stats", "gen", "-o", "x.npy"], 2, "written as .npz"),
        (["out"], 2, "No such command"),
    ],
)
def test_bad_input_is_2_and_missing_weights_are_3(run, arguments, code, message, tmp_path):
    (tmp_path / "two.txt").write_text("a\nb\n")
    got, _, error = run(*arguments)
    assert (got, message in error) == (code, True), error


@pytest.mark.filterwarnings("ignore")
def test_two_processes_give_the_numbers_of_one(run, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    prompts = [f"prompt {i // 2}" for i in range(9)]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    command = [sys.executable, "-m", "diffgen", "eval", "run", "gen", "ref", "-m", "fd,vendi,contrast", "-n", "9"]
    command += [*PIXELS, "--prompts", "p.txt", "--json", "o.json", "--no-cache"]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": rank}, stdout=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    out = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "contrast" in out[0]
    assert not out[1]
    report = json.loads((tmp_path / "o.json").read_text())
    one = json.loads(
        evaluate(
            "gen", "ref", metrics=["fd", "vendi", "contrast"], extractor="pixels/2", ci_samples=3, n=9, prompts=prompts
        ).to_json()
    )
    assert report == one
