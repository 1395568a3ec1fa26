"""The package as it is installed: what the wheel holds, how little an import costs, the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "diffgen": "diffgen",
    "pipelines": "diffgen/pipelines",
    "training": "diffgen/training",
    "eval": "diffgen/eval",
}


def run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(folder), str(ROOT), cwd=folder)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("diffgen-*.whl"))


def test_the_wheel_holds_every_file_of_the_four_folders_under_diffgen_and_nothing_else(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = set()
    for folder, installed in {**FOLDERS, "configs": "diffgen/configs"}.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(f"{installed}/{path.relative_to(ROOT / folder).as_posix()}")
    assert names == expected


def test_an_installed_wheel_runs_the_demo_and_writes_a_self_contained_report(wheel, tmp_path):
    site, out = tmp_path / "site", tmp_path / "out"
    done = run(
        sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site), str(wheel), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    small = ["train.steps=1", "rollout.prompts_per_update=2", "rollout.group_size=2", "evaluation.n=4"]
    done = run(
        sys.executable,
        "-m",
        "diffgen",
        "demo",
        "--out",
        str(out),
        "--n",
        "8",
        *small,
        cwd=tmp_path,
        PYTHONPATH=str(site),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 7
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    where = run(sys.executable, "-c", "import diffgen; print(diffgen.__file__)", cwd=tmp_path, PYTHONPATH=str(site))
    assert where.stdout.startswith(str(site))


def test_importing_the_packages_and_asking_for_help_loads_no_torch():
    code = (
        "import sys, diffgen, diffgen.eval, diffgen.training, diffgen.cli\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    done = run(sys.executable, "-c", code, cwd=Path("/"))
    assert done.returncode == 0, done.stderr


def test_methods_lists_every_stage_as_json():
    done = run(sys.executable, "-m", "diffgen", "methods", "--json", cwd=Path("/"))
    rows = json.loads(done.stdout)
    assert {"guidance", "reward", "advantage", "select", "objective", "regularizer", "optimizer"} == {
        r["stage"] for r in rows
    }
    assert {"cfg", "apg", "ag", "linear_ag"} <= {r["name"] for r in rows if r["stage"] == "guidance"}
    assert all(r["summary"] for r in rows)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "shapes_flow_grp"], ["recipe", "shapes_flow_grp", "did you mean 'shapes_flow_grpo'"]),
        (["train", "shapes_flow_grpo", "train.step=5"], ["train.step", "unknown key", "did you mean 'steps'"]),
        (["sample", "a red circle", "-g", "cgf"], ["guidance 'cgf'", "did you mean 'cfg'"]),
        (["methods", "advantages"], ["stage 'advantages'", "did you mean 'advantage'"]),
        (["eval", "run", "/nowhere", "-m", "pairwise"], ["/nowhere"]),
        (["claims", "flow_grpo_shape"], ["did you mean 'flow_grpo_shapes'"]),
    ],
)
def test_bad_arguments_end_with_one_message_and_exit_code_2(arguments, parts, tmp_path):
    done = run(sys.executable, "-m", "diffgen", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr
    assert not list(tmp_path.iterdir()), "bad arguments must leave nothing behind"


def test_nothing_is_under_the_wrong_top_level_name():
    code = "import importlib.util as u; print([n for n in ('pipelines', 'training', 'eval') if u.find_spec(n)])"
    assert run(sys.executable, "-c", code, cwd=Path("/")).stdout.strip() == "[]"
