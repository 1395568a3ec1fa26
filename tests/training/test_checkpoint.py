"""Checkpoints survive kills, full disks and damaged files; a resumed run equals the uninterrupted one bit for bit."""

import errno
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from diffgen.training import checkpoint
from diffgen.training.checkpoint import CheckpointError

TENSORS = {"model": {"a": torch.arange(6.0).reshape(2, 3)}, "optimizer": {"0.step": torch.tensor(3.0)}}


def put(folder, *steps, keep=9):
    for step in steps:
        path = checkpoint.save(folder, step, TENSORS, {"update": step}, keep)
    return path


def log_of(folder):
    """The log without its times."""
    lines = [json.loads(line) for line in (pathlib.Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


# --- files ----------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path):
    path = put(tmp_path, 7)
    assert path.name == "step-000007"
    assert checkpoint.newest(tmp_path) == path
    tensors, state = checkpoint.load(path)
    assert state == {"update": 7}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[f][k], v) for f, values in TENSORS.items() for k, v in values.items())
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


def test_the_newest_is_that_of_the_highest_number(tmp_path):
    put(tmp_path, 999_999, 1_000_000, 2)
    assert checkpoint.newest(tmp_path).name == "step-1000000"
    assert checkpoint.newest(tmp_path / "nothing") is None


def test_only_the_newest_are_kept(tmp_path):
    put(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003", "step-000004"]


def test_a_step_that_is_saved_again_replaces_the_old_one(tmp_path):
    put(tmp_path, 1)
    checkpoint.save(tmp_path, 1, TENSORS, {"update": "again"}, 2)
    assert checkpoint.load(checkpoint.newest(tmp_path))[1] == {"update": "again"}


def test_leftovers_of_killed_processes_are_ignored_and_cleared_away(tmp_path):
    """Also those of a process with our own id: in a container a restarted run often has it."""
    put(tmp_path, 1)
    for pid in (os.getpid(), 12345):
        (tmp_path / f"step-000002.tmp-{pid}").mkdir()
        (tmp_path / f"step-000002.tmp-{pid}" / "model.safetensors").write_text("half")
    assert checkpoint.newest(tmp_path).name == "step-000001"
    put(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "COMMIT.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, flip, pathlib.Path.unlink])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_with_a_warning(damage, name, tmp_path):
    path = put(tmp_path, 1, 2)
    damage(path / name)
    with pytest.warns(UserWarning, match=r"step-000002.*trying the one before"):
        assert checkpoint.newest(tmp_path).name == "step-000001"
    with pytest.raises(CheckpointError, match="step-000002"):
        checkpoint.load(path)


def test_no_flipped_bit_of_the_commit_file_can_break_the_search(tmp_path):
    """It says no more than hashes: the checkpoint is intact all the same, or passed over."""
    commit = put(tmp_path, 1, 2) / "COMMIT.json"
    original = commit.read_bytes()
    found = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for position in range(0, len(original), 5):
            for bit in (0x80, 0x01, 0x20):
                commit.write_bytes(original[:position] + bytes([original[position] ^ bit]) + original[position + 1 :])
                found.add(checkpoint.newest(tmp_path).name)
        for text in ("[]", "3", '{"files": 3}', '{"files": {"state.json": 3}}', '{"files": ["state.json"]}', ""):
            commit.write_text(text)
            assert checkpoint.newest(tmp_path).name == "step-000001"
    assert found >= {"step-000001"}


# --- a disk that fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (checkpoint, "save_file", SafetensorError("Error while serializing: I/O error: No space left on device")),
        (checkpoint, "save_file", OSError(errno.ENOSPC, "No space left on device")),
        (os, "fsync", OSError(errno.EIO, "Input/output error")),
        (os, "replace", OSError(errno.EROFS, "Read-only file system")),
    ],
    ids=["safetensors", "enospc", "fsync", "replace"],
)
def test_a_failed_save_is_an_oserror_and_leaves_nothing_behind(owner, name, error, tmp_path, monkeypatch):
    put(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *a, **k: (_ for _ in ()).throw(error))
        with pytest.raises(OSError, match=r"No space|Input/output|Read-only"):
            put(tmp_path, 3, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000002"]
    assert checkpoint.newest(tmp_path).name == "step-000002"


def test_a_disk_that_is_really_full_is_an_oserror(tmp_path):
    """A limit on the size of files stands for it: safetensors reports both by an exception of its own."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"model": {"a": torch.zeros(100_000)}}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        with pytest.raises(OSError, match="too large"):
            checkpoint.save(tmp_path, 1, large, {}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []


def failing(monkeypatch, *numbers):
    """checkpoint.save's calls of these numbers (from 1) find the disk full."""
    original, calls = checkpoint.save_file, []

    def save_file(values, path):
        if pathlib.Path(path).name == "model.safetensors":
            calls.append(path)
        if len(calls) in numbers:
            pathlib.Path(path).write_text("half a fi")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(values, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)


def test_training_goes_on_when_the_disk_is_full_for_a_while(trainer, monkeypatch):
    failing(monkeypatch, 1, 2, 4, 5)
    run = trainer(train={"steps": 6})
    with pytest.warns(
        UserWarning, match=r"checkpoint at update \d could not be written: .*No space.*; going on"
    ) as seen:
        run.fit()
    assert sum("going on" in str(w.message) for w in seen) == 4
    assert sorted(p.name for p in (run.folder / "checkpoints").iterdir()) == ["step-000003", "step-000006"]


def test_the_third_failed_save_in_a_row_ends_the_run(trainer, monkeypatch):
    failing(monkeypatch, 2, 3, 4)
    run = trainer(train={"steps": 9})
    warnings.simplefilter("ignore")  # pytest puts the filters back
    with pytest.raises(RuntimeError, match="checkpoint at update 4 could not be written"):
        run.fit()
    assert run.update == 4
    assert [p.name for p in (run.folder / "checkpoints").iterdir()] == ["step-000001"]


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(trainer, monkeypatch):
    failing(monkeypatch, 2)
    with pytest.raises(RuntimeError, match="checkpoint at update 2 could not be written"):
        trainer().fit()


# --- resuming -------------------------------------------------------------------------------------------------------

RUNS = {
    "sd3-lora": ("StableDiffusion3Pipeline", {}),
    "sd3-full-kl": ("StableDiffusion3Pipeline", {"lora": None, "regularizers": ["kl"], "optimizer": {"lr": 1e-3}}),
    "flux-window-cfg": (
        "FluxPipeline",
        {
            "rollout": {
                "window": {"size": 1, "range": [0, 1]},
                "guidance": {"name": "cfg", "scale": 2.0},
                "num_inference_steps": 3,
            }
        },
    ),
    "sd-minibatches-sgd": (
        "StableDiffusionPipeline",
        {"train": {"minibatch_size": 4, "inner_epochs": 2}, "optimizer": {"name": "sgd", "lr": 0.1}, "ema": None},
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_three_updates_a_stop_and_three_more_equal_six_bit_for_bit(case, trainer, tmp_path):
    name, options = RUNS[case]

    def part(folder, steps):
        # evaluated every update: evaluation must not disturb anything
        extra = {"evaluation": {"every": 1}, "output_dir": str(tmp_path / folder)}
        run = trainer(name, **(options | extra | {"train": options.get("train", {}) | {"steps": steps}}))
        run.fit()
        return run

    whole = part("whole", 6)
    part("parts", 3)
    resumed = part("parts", 6)
    assert log_of(resumed.folder) == log_of(whole.folder)
    assert len(log_of(whole.folder)) == 7
    assert all(torch.equal(p, resumed.params[k]) for k, p in whole.params.items())
    assert all(torch.equal(a, b) for a, b in zip(whole.ema or [], resumed.ema or []))
    states = [run.optimizer.state_dict()["state"] for run in (whole, resumed)]
    assert all(
        torch.equal(torch.as_tensor(v), torch.as_tensor(states[1][i][k]))
        for i, s in states[0].items()
        for k, v in s.items()
    )
    final = [load_file(next((run.folder / "final").rglob("*.safetensors"))) for run in (whole, resumed)]
    assert all(torch.equal(v, final[1][k]) for k, v in final[0].items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_the_same_command_goes_on(number, trainer, tmp_path, monkeypatch):
    whole = trainer(output_dir=str(tmp_path / "whole"), train={"steps": 4})
    whole.fit()
    run = trainer(train={"steps": 4}, checkpoint={"every": 0})
    learn = run.learn
    before = signal.getsignal(number)

    def learn_and_be_stopped(*args):
        if run.update == 1:
            os.kill(os.getpid(), number)
        return learn(*args)

    monkeypatch.setattr(run, "learn", learn_and_be_stopped)
    with pytest.raises(SystemExit) as stop:
        run.fit()
    assert stop.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert not (run.folder / "final").exists()
    assert [p.name for p in (run.folder / "checkpoints").iterdir()] == ["step-000002"]
    again = trainer(train={"steps": 4}, checkpoint={"every": 0})
    again.fit()
    assert log_of(again.folder) == log_of(whole.folder)
    assert all(torch.equal(p, again.params[k]) for k, p in whole.params.items())


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_run_whose_newest_checkpoint_is_damaged_resumes_the_one_before(damage, trainer):
    whole = trainer(train={"steps": 3})
    whole.fit()
    expected = log_of(whole.folder)
    damage(whole.folder / "checkpoints" / "step-000003" / "model.safetensors")
    run = trainer(train={"steps": 3})
    with pytest.warns(UserWarning, match="step-000003.*trying the one before"):
        run.fit()
    assert log_of(run.folder) == expected
    assert all(torch.equal(p, run.params[k]) for k, p in whole.params.items())
    checkpoint.verify(run.folder / "checkpoints" / "step-000003")


def test_a_checkpoint_named_in_the_config_must_be_intact(trainer, tmp_path):
    first = trainer()
    first.fit()
    path = first.folder / "checkpoints" / "step-000001"
    elsewhere = trainer(output_dir=str(tmp_path / "other"), checkpoint={"resume": str(path)})
    elsewhere.fit()
    assert all(torch.equal(p, elsewhere.params[k]) for k, p in first.params.items())
    truncate(path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"step-000001/model.safetensors is missing, cut short or altered"):
        trainer(output_dir=str(tmp_path / "third"), checkpoint={"resume": str(path)}).fit()
    with pytest.raises(CheckpointError, match="nowhere is no committed checkpoint"):
        trainer(output_dir=str(tmp_path / "third"), checkpoint={"resume": str(tmp_path / "nowhere")}).fit()


def test_a_log_line_cut_short_by_a_kill_is_dropped(trainer):
    first = trainer()
    first.fit()
    expected = log_of(first.folder)
    with (first.folder / "log.jsonl").open("a") as stream:
        stream.write('{"update": 3, "loss": 1.0}\n{"update": 2, "lo')
    run = trainer()
    run.fit()
    assert log_of(run.folder) == expected


# --- kill -9 --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory, saved):
    """What kill_driver.py reports, and the folder of its runs."""
    from diffgen.tiny import call_kwargs

    folder = tmp_path_factory.mktemp("kill")
    config = {
        "model": saved("StableDiffusion3Pipeline", t5=False),
        "rollout": {
            "prompts_per_update": 2, "group_size": 2, "num_inference_steps": 2,
            "call": call_kwargs("StableDiffusion3Pipeline"),
        },
        "rewards": ["test_red"], "lora": {"rank": 2, "alpha": 3}, "train": {"steps": 4}, "checkpoint": {"every": 1},
        "evaluation": {"every": 2, "n": 1, "images": 0}, "logging": {"tracker": "none"}, "optimizer": {"lr": 0.01},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    driver = pathlib.Path(__file__).with_name("kill_driver.py")
    done = subprocess.run(
        [sys.executable, driver, folder, folder / "config.json"],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_a_run_killed_at_any_point_is_resumed_and_equals_the_uninterrupted_one(killed):
    folder, report = killed
    assert report["whole"] == 0
    expected = log_of(folder / "whole")
    assert [line["update"] for line in expected] == [0, 1, 2, 3, 4]
    final = load_file(folder / "whole" / "final" / "pytorch_lora_weights.safetensors")
    for i, run in enumerate(report["runs"]):
        by_chance = run["point"][0] == "time"  # may come too late
        assert run["killed"] == signal.SIGKILL or by_chance, run
        assert run["resumed"] == 0, run
        assert log_of(folder / str(i)) == expected, run
        mine = load_file(folder / str(i) / "final" / "pytorch_lora_weights.safetensors")
        assert all(torch.equal(v, mine[k]) for k, v in final.items()), run


def test_a_kill_never_leaves_a_half_written_checkpoint_under_its_final_name(killed):
    """And the points do lie inside of checkpoints: most of them leave a temporary folder behind."""
    folder, report = killed
    assert sum(any(".tmp-" in name for name in run["left"]) for run in report["runs"]) >= 8
    for i in range(len(report["runs"])):
        found = sorted((folder / str(i) / "checkpoints").iterdir())
        # a kill while old ones are deleted may leave one of them
        assert [p.name for p in found[-2:]] == ["step-000003", "step-000004"], report["runs"][i]
        for path in found[-2:]:
            checkpoint.verify(path)


def test_a_folder_whose_checkpoints_are_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path):
    for step in (1, 2):
        path = checkpoint.save(tmp_path, step, {"model": {"w": torch.ones(2)}}, {"update": step}, keep=2)
        (path / "model.safetensors").write_bytes(b"cut")
    with (
        pytest.warns(UserWarning, match="trying the one before"),
        pytest.raises(checkpoint.CheckpointError, match=r"every checkpoint in .* is damaged"),
    ):
        checkpoint.newest(tmp_path)
