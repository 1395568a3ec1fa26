"""The trainer end to end on tiny pipelines: what a run leaves behind, that it learns, and how it fails."""

import inspect
import json
import pathlib
import warnings

import pytest
import torch

from diffgen.tiny import call_kwargs
from diffgen.training import ConfigError, Trainer, load_config
from diffgen.training.policy import swapped

PIPELINES = [
    ("StableDiffusion3Pipeline", {"t5": True}),
    ("StableDiffusion3Pipeline", {"t5": False}),
    ("FluxPipeline", {"guidance_embeds": True}),
    ("FluxPipeline", {"guidance_embeds": False}),
    ("StableDiffusionPipeline", {}),
]
IDS = ["sd3", "sd3-without-t5", "flux-distilled", "flux", "sd"]


def render(pipe, name):
    """Float images of the pipeline as it is, without guidance."""
    off = {"true_cfg_scale": 1.0} if name == "FluxPipeline" else {"guidance_scale": 1.0}
    with torch.no_grad():
        return pipe(
            ["a red circle", "two blue squares"],
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
            **off,
            **call_kwargs(name),
        )[0]


@pytest.mark.parametrize(("name", "variants"), PIPELINES, ids=IDS)
def test_stock_diffusers_loads_the_lora_and_draws_the_trained_images(name, variants, trainer):
    from diffusers import DiffusionPipeline

    run = trainer(name, variants)
    run.fit()
    final = run.folder / "final"
    with swapped(run.params.values(), run.ema):
        expected = render(run.policy.pipe, name)
    with run.policy.reference():
        base = render(run.policy.pipe, name)

    absent = {} if variants.get("t5", True) else {"text_encoder_3": None, "tokenizer_3": None}
    stock = DiffusionPipeline.from_pretrained(run.config.model, **absent)
    stock.set_progress_bar_config(disable=True)
    assert torch.equal(render(stock, name), base)
    stock.load_lora_weights(final)
    torch.testing.assert_close(render(stock, name), expected, atol=1e-5, rtol=0)
    assert (expected - base).abs().max() > 1e-3
    (adapter,) = (stock.unet if hasattr(stock, "unet") else stock.transformer).peft_config.values()
    assert (adapter.r, adapter.lora_alpha) == (4, 6)


@pytest.mark.parametrize(("name", "variants"), PIPELINES, ids=IDS)
def test_stock_diffusers_loads_the_fully_fine_tuned_pipeline(name, variants, trainer):
    from diffusers import DiffusionPipeline

    run = trainer(name, variants, lora=None, optimizer={"lr": 1e-3})
    base = render(run.policy.pipe, name)
    run.fit()
    with swapped(run.params.values(), run.ema):
        expected = render(run.policy.pipe, name)
    absent = {} if variants.get("t5", True) else {"text_encoder_3": None, "tokenizer_3": None}
    stock = DiffusionPipeline.from_pretrained(run.folder / "final", **absent)
    stock.set_progress_bar_config(disable=True)
    torch.testing.assert_close(render(stock, name), expected, atol=1e-5, rtol=0)
    assert (expected - base).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "first", "steps", "options"),
    [
        ("StableDiffusion3Pipeline", 0, 20, {"lora": None, "optimizer": {"lr": 3e-3}}),
        ("FluxPipeline", 0, 20, {"lora": {"rank": 8, "alpha": 16}, "optimizer": {"lr": 0.02}}),
        ("StableDiffusionPipeline", 1, 50, {"lora": None, "optimizer": {"lr": 2e-3}}),
    ],
    ids=["sd3-full", "flux-lora", "sd-full"],
)
def test_training_moves_the_evaluation_reward_the_way_it_is_asked_to(name, first, steps, options, trainer, tmp_path):
    """Updates of 32 samples; the spread of the reward between samples of the base model is the yardstick."""
    change = {}
    for sign in (1.0, -1.0):
        run = trainer(
            name,
            **options,
            output_dir=str(tmp_path / f"run{sign}"),
            rewards=[{"name": "test_red", "sign": sign}],
            rollout={
                "prompts_per_update": 4, "group_size": 8, "num_inference_steps": 4, "noise_level": 1.0,
                "window": {"size": 2, "range": [first, max(first, 1)]}, "call": call_kwargs(name),
            },
            train={"steps": steps},
            evaluation={"every": steps, "n": 16},
            checkpoint={"every": 0},
        )  # fmt: skip
        images = run.draw(["a red circle"] * 32).float().mean((2, 3)) / 255
        spread = (images[:, 0] - images[:, 1:].mean(1)).std().item()
        run.fit()
        log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
        assert [line["update"] for line in log] == list(range(steps + 1))
        change[sign] = sign * (log[-1]["eval/test_red"] - log[0]["eval/test_red"])
    assert change[1.0] > spread
    assert change[-1.0] < -spread


def test_a_run_leaves_its_config_log_images_checkpoints_and_weights(trainer):
    run = trainer(evaluation={"every": 1, "images": 2}, logging={"tracker": "tensorboard"}, checkpoint={"every": 1})
    metrics = run.fit()
    names = {p.name for p in run.folder.iterdir()}
    assert {"config.json", "log.jsonl", "images", "checkpoints", "final"} <= names
    assert load_config(json.loads((run.folder / "config.json").read_text())) == run.config
    log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in log] == [0, 1, 2]
    assert {"update": 2, **metrics} == log[-1]
    assert {"loss", "grad_norm", "ratio/mean", "reward/test_red", "eval/test_red", "time/train"} <= set(log[-1])
    assert sorted(p.name for p in (run.folder / "images").iterdir()) == [f"eval-{i:06d}.png" for i in range(3)]
    assert list(run.folder.rglob("events.out.tfevents*"))
    pickles = [p for p in run.folder.rglob("*") if p.suffix in {".pt", ".pth", ".bin", ".pkl", ".ckpt"}]
    assert not pickles
    heads = [p.read_bytes()[:4] for p in run.folder.rglob("*") if p.is_file() and "tfevents" not in p.name]
    assert not any(head[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05") or head == b"PK\x03\x04" for head in heads)


def test_two_runs_of_one_config_are_equal_and_another_seed_is_another_run(trainer, tmp_path):
    runs = [trainer(output_dir=str(tmp_path / f"{i}"), seed=seed) for i, seed in enumerate((3, 3, 4))]
    first = [{k: p.detach().clone() for k, p in run.params.items()} for run in runs]
    assert all(torch.equal(first[0][k], first[1][k]) for k in first[0])
    assert not all(torch.equal(first[0][k], first[2][k]) for k in first[0])  # LoRA's first weights are of the seed too
    losses = [{k: v for k, v in run.fit().items() if not k.startswith("time/")} for run in runs]
    assert losses[0] == losses[1] != losses[2]
    assert all(torch.equal(p, runs[1].params[k]) for k, p in runs[0].params.items())


def test_a_run_with_an_equal_reward_for_all_trains_nothing_and_says_so(trainer):
    run = trainer(rewards=["test_constant"])
    before = {k: p.detach().clone() for k, p in run.params.items()}
    metrics = run.fit()
    assert metrics["advantage/kept"] == 0
    assert all(torch.equal(p, before[k]) for k, p in run.params.items())


def test_minibatches_and_inner_epochs_make_ratios_leave_one(trainer):
    run = trainer(train={"minibatch_size": 2, "inner_epochs": 2, "steps": 1})
    assert run.fit()["ratio/std"] > 0


def test_actions_per_backward_changes_memory_and_not_the_result(trainer, tmp_path):
    runs = [
        trainer(output_dir=str(tmp_path / f"{n}"), train={"actions_per_backward": n}, regularizers=["kl"])
        for n in (1, 2)
    ]
    for run in runs:
        run.fit()
    for key, p in runs[0].params.items():
        torch.testing.assert_close(p, runs[1].params[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 6}, None], ids=["lora", "full"])
def test_the_kl_term_holds_the_policy_near_the_reference(lora, trainer, tmp_path):
    distance = []
    for i, coef in enumerate((0.0, 1000.0)):
        run = trainer(
            output_dir=str(tmp_path / f"{i}"), lora=lora, optimizer={"lr": 1e-3},
            regularizers=[{"name": "kl", "coef": coef}], train={"steps": 6},
        )  # fmt: skip
        base = render(run.policy.pipe, "StableDiffusion3Pipeline")
        run.fit()
        distance.append((render(run.policy.pipe, "StableDiffusion3Pipeline") - base).square().mean())
    assert distance[1] < 0.7 * distance[0]


def test_gradient_checkpointing_changes_nothing(trainer, tmp_path):
    runs = [trainer(output_dir=str(tmp_path / f"{on}"), train={"gradient_checkpointing": on}) for on in (False, True)]
    a, b = (run.fit() for run in runs)
    assert a["loss"] == b["loss"]
    for key, p in runs[0].params.items():
        torch.testing.assert_close(p, runs[1].params[key], atol=1e-6, rtol=1e-5)


def test_evaluation_uses_the_ema_weights_and_gives_the_trained_ones_back(trainer):
    run = trainer(train={"steps": 1}, ema={"decay": 0.5})
    start = {k: p.detach().clone() for k, p in run.params.items()}
    run.fit()
    trained = {k: p.detach().clone() for k, p in run.params.items()}
    decay = min(0.5, 2 / 11)
    for (key, p), ema in zip(trained.items(), run.ema):
        torch.testing.assert_close(ema, decay * start[key] + (1 - decay) * p)
    drawn = run.draw(["a red circle"])
    assert all(torch.equal(p, trained[k]) for k, p in run.params.items())
    with swapped(run.params.values(), run.ema):
        own = run.policy.sample(["a red circle"], [("eval", 0, 0)], num_inference_steps=3)
    assert torch.equal(drawn, own)


# --- losses that are not finite -------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_leaves_the_weights_alone(trainer):
    run = trainer(objective="test_nan", train={"steps": 1})
    before = {k: p.detach().clone() for k, p in run.params.items()}
    with (
        pytest.warns(UserWarning, match="update 0: loss or gradient is not finite"),
        pytest.raises(RuntimeError, match=r"last 1 gradient steps were not finite; nothing is exported"),
    ):
        run.fit()
    assert not (run.folder / "final").exists()
    assert all(torch.equal(p, before[k]) for k, p in run.params.items())


def test_five_such_losses_in_a_row_end_the_run(trainer):
    run = trainer(objective="test_nan", train={"steps": 9}, checkpoint={"every": 1})
    warnings.simplefilter("ignore")  # pytest puts the filters back
    with pytest.raises(RuntimeError, match=r"update 4: .* not finite, for the fifth time"):
        run.fit()
    assert run.update == 4


# --- rewards that fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("nan", r"reward 'test_moody' returned nan for sample 1 \(prompt '.+'\), 1 of 6 in all; set on_invalid_reward"),
        ("inf", r"reward 'test_moody' returned inf for sample 1 \(prompt"),
        ("short", r"reward 'test_moody' must return one number a sample, \[6\], got \[5\]"),
        ("raise", r"reward 'test_moody' raised ZeroDivisionError: ouch \(batch of 6, first prompt '.+'\)"),
        ("text", r"reward 'test_moody' must return 6 numbers, got str"),
        ("none", r"reward 'test_moody' must return 6 numbers, got NoneType"),
        ("column", r"reward 'test_moody' raised TypeError: .*missing 1 required .*'answer'"),
    ],
)
def test_a_failing_reward_stops_the_run_which_can_be_resumed(mode, message, trainer, moody):
    from diffgen.training.checkpoint import newest, verify
    from diffgen.training.rewards.score import RewardError

    moody.update(mode=mode, after=2)
    with pytest.raises(RewardError, match=message):
        trainer(rewards=["test_moody"], train={"steps": 3}).fit()
    moody.update(mode="fine")
    run = trainer(rewards=["test_moody"], train={"steps": 3})
    path = newest(run.folder / "checkpoints")
    assert path.name == "step-000002"
    verify(path)
    run.fit()
    log = [json.loads(line)["update"] for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert log == [1, 2, 3]


def test_invalid_rewards_can_be_skipped(trainer, moody):
    moody.update(mode="nan", after=0)
    run = trainer(rewards=["test_moody"], on_invalid_reward="skip")
    metrics = run.fit()
    assert metrics["advantage/kept"] == pytest.approx(4 / 6)  # 0 . 2 | 3 4 5: the middle one has advantage 0
    assert metrics["reward/test_moody"] == pytest.approx(torch.tensor([0.0, 2, 3, 4, 5]).mean().item())


def test_several_rewards_and_rewards_of_several_numbers_are_weighted_each(trainer):
    run = trainer(rewards=[{"name": "test_red", "weight": 0.0}, {"name": "test_two", "weight": 0.5}])
    metrics = run.fit()
    assert {"reward/test_red", "reward/test_two/a", "reward/test_two/b"} <= set(metrics)
    assert run._weights({"test_red": 0, "test_two/a": 0, "test_two/b": 0}) == {
        "test_red": 0.0, "test_two/a": 0.5, "test_two/b": 0.5
    }  # fmt: skip


def test_columns_of_the_data_reach_the_reward_of_their_own_sample(trainer, tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a red circle", "answer": 3}, {"prompt": "a blue cross", "answer": 5}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = trainer(rewards=["test_answer"], data={"prompts": str(file), "eval_prompts": str(file)})
    rollout = run.sample()
    assert {(p, a) for p, a in zip(rollout.prompts, rollout.columns["answer"])} == {
        ("a red circle", 3),
        ("a blue cross", 5),
    }
    assert run.fit()["reward/test_answer"] == 4


# --- bad places and options -----------------------------------------------------------------------------------------


def test_an_output_folder_that_cannot_be_made_is_named_before_any_model_is_loaded(settings, tmp_path, no_model):
    (tmp_path / "file").write_text("")
    config = load_config(settings(output_dir=str(tmp_path / "file" / "run")))
    with pytest.raises(ConfigError, match=r"output_dir: .*file/run can't be written: "):
        Trainer(config, quiet=True)


def test_a_read_only_output_folder_is_named_before_any_model_is_loaded(settings, monkeypatch, no_model):
    config = load_config(settings())
    pathlib.Path(config.output_dir).mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ConfigError, match=r"output_dir: .*run can't be written: it is read-only"):
        Trainer(config, quiet=True)


def test_a_changed_config_in_one_output_folder_names_the_changed_keys(trainer):
    trainer().fit()
    changed = trainer(
        rollout={"group_size": 4},
        optimizer={"lr": 0.02},
        train={"steps": 3, "inner_epochs": 2},
        checkpoint={"every": 2},
    )
    with pytest.raises(
        ConfigError, match=r"another config; different: rollout.group_size, optimizer.lr, train.inner_epochs. "
    ):
        changed.fit()
    saved = json.loads((changed.folder / "config.json").read_text())
    assert saved["rollout"]["group_size"] == 3  # the refused config didn't take the place of the run's


def test_a_finished_run_can_be_given_more_updates(trainer):
    trainer().fit()
    run = trainer(train={"steps": 3})
    run.fit()
    assert run.update == 3
    assert len((run.folder / "log.jsonl").read_text().splitlines()) == 3


def test_missing_xformers_is_named_before_any_model_is_loaded(settings, monkeypatch, no_model):
    monkeypatch.setitem(__import__("sys").modules, "xformers", None)
    config = load_config(settings(runtime={"attention": "xformers"}))
    with pytest.raises(ConfigError, match=r"runtime.attention: xformers can't be used here .* use sdpa"):
        Trainer(config, quiet=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_an_error_and_not_a_slow_run(settings, no_model):
    with pytest.raises(ConfigError, match=r"runtime.device: cuda, but torch finds no CUDA device"):
        Trainer(load_config(settings(runtime={"device": "cuda"})), quiet=True)


def test_a_missing_prompt_file_is_named_with_its_key_before_any_model_is_loaded(settings, no_model):
    from diffgen.training.data import DataError

    with pytest.raises(DataError, match=r"data.eval_prompts: 'nowhere.txt' is neither 'WORLD:SPLIT'"):
        Trainer(load_config(settings(data={"eval_prompts": "nowhere.txt"})), quiet=True)


def test_a_wrong_argument_of_the_pipelines_call_is_named(settings):
    config = settings()
    config["rollout"]["call"] = {"widht": 16}
    with pytest.raises(ValueError, match=r"rollout.call.widht: .* no such argument; did you mean 'width'"):
        Trainer(load_config(config), quiet=True)


def test_the_public_names_are_there():
    import diffgen.training as t

    for name in t.__all__:
        assert inspect.isclass(getattr(t, name)) or callable(getattr(t, name))
    with pytest.raises(AttributeError, match="Trainr"):
        t.Trainr  # noqa: B018


def test_a_second_run_in_one_output_folder_is_refused(trainer):
    from filelock import FileLock

    from diffgen.training import ConfigError

    run = trainer()
    with FileLock(run.folder / ".lock"), pytest.raises(ConfigError, match="another run is at work in"):
        run.fit()
    run.fit()


def test_a_data_column_named_as_an_option_of_a_reward_is_refused(trainer, tmp_path):
    from diffgen.training.rewards.score import RewardError

    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a red circle", "sign": 1}\n')
    data = {"prompts": str(file), "eval_prompts": str(file)}
    with pytest.raises(RewardError, match=r"'test_red': \['sign'\] is .* option"):
        trainer(data=data, rewards=[{"name": "test_red", "sign": -1.0}]).fit()


def test_full_fine_tuning_of_a_bfloat16_pipeline_trains_float32_weights(trainer):
    run = trainer(lora=None, runtime={"dtype": "bfloat16"}, optimizer={"name": "adamw", "lr": 1e-3})
    assert {p.dtype for p in run.params.values()} == {torch.float32}
    before = [p.detach().clone() for p in run.params.values()]
    run.step()
    metrics = run.step()
    assert metrics["ratio/mean"] == pytest.approx(1, abs=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(before, run.params.values()))


def test_both_experts_of_a_pipeline_get_loras_that_stock_diffusers_loads(trainer, saved):
    import diffgen

    run = trainer("WanPipeline", {"two_experts": True}, rewards=["test_first_frame"])
    run.fit()
    stock = diffgen.load(saved("WanPipeline", two_experts=True))
    stock.load_lora_weights(run.folder / "final")
    stock.load_lora_weights(run.folder / "final" / "transformer_2", load_into_transformer_2=True)
    for name in ("transformer", "transformer_2"):
        keys = [k for k in getattr(stock, name).state_dict() if "lora_B" in k]
        assert keys
        trained = run.policy.modules[name].state_dict()
        assert {k.rsplit(".lora_B", 1)[0] for k in keys} == {
            k.rsplit(".lora_B", 1)[0] for k in trained if "lora_B" in k
        }


def test_what_a_method_needs_is_asked_of_the_policy(trainer):
    from diffgen.training import ConfigError, register

    @register("objective", "test_needs_reference", needs={"reference"})
    def objective(logp, old_logp, advantage, evaluation=None):
        return -(logp - old_logp) * advantage + 0 * torch.stack([s.mean.mean() for s in evaluation.reference])

    @register("objective", "test_needs_tokens", needs={"tokens"})
    def other(logp, old_logp, advantage, evaluation=None):
        return -logp

    trainer(objective="test_needs_reference").fit()
    with pytest.raises(ConfigError, match=r"needs \['tokens'\]; the policy has \['gaussian', 'reference'\]"):
        trainer(objective="test_needs_tokens")


def test_a_model_that_diverged_ends_the_run_and_is_not_exported(trainer):
    run = trainer(lora=None, optimizer={"name": "adamw", "lr": 1e30}, train={"steps": 4})
    with pytest.raises(FloatingPointError, match="not finite"):
        run.fit()
    assert not (run.folder / "final").exists()


def test_going_on_from_an_older_checkpoint_sets_the_newer_ones_aside(trainer):
    run = trainer(train={"steps": 4}, checkpoint={"every": 1, "keep": 4})
    run.fit()
    old = run.folder / "checkpoints" / "step-000002"
    branch = trainer(train={"steps": 3}, checkpoint={"every": 1, "keep": 2, "resume": str(old)})
    branch.fit()
    kept = sorted(p.name for p in (run.folder / "checkpoints").iterdir())
    assert kept == ["abandoned-step-000003", "abandoned-step-000004", "step-000002", "step-000003"]
    again = trainer(train={"steps": 3})
    again.resume()
    assert again.update == 3
    assert all(torch.equal(p, branch.params[k]) for k, p in again.params.items())


def test_what_a_reward_does_to_its_inputs_stays_with_it(trainer):
    from diffgen.training.rewards.score import score

    samples, prompts = torch.ones(2, 3, 4, 4, dtype=torch.uint8), ["a", "b"]

    def spoil(samples, prompts, **columns):
        samples.zero_()
        prompts.clear()
        return torch.ones(2)

    def look(samples, prompts, **columns):
        return samples.float().mean((1, 2, 3)) + len(prompts)

    assert score({"spoil": spoil, "look": look}, samples, prompts, {})["look"].tolist() == [3.0, 3.0]
    assert prompts == ["a", "b"]
