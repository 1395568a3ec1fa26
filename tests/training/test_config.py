"""Every mistake in a config is named (key, value, expectation, nearest name) before any model is loaded."""

import json
import re
import subprocess
import sys

import pytest
import torch

from diffgen.training import ConfigError, load_config

GOOD = {"rewards": ["jpeg_compressibility"]}


def merged(extra):
    return {**GOOD, **extra}


@pytest.mark.parametrize(
    ("extra", "messages"),
    [
        ({"trian": {"steps": 3}}, ["trian: unknown key", "did you mean 'train'?"]),
        ({"train": {"stepz": 3}}, ["train.stepz: unknown key", "did you mean 'steps'?"]),
        ({"rollout": {"window": {"sise": 2}}}, ["rollout.window.sise: unknown key", "did you mean 'size'?"]),
        ({"lora": {"rang": 4}}, ["lora.rang: unknown key", "(valid: alpha, init, rank, target_modules)"]),
        ({"rewards": [{"name": "jpeg_compressibility", "wieght": 2}]},
         ["rewards.0: ", "'wieght'", "did you mean 'weight'?"]),
        ({"rewards": ["shapes_verifier", {"name": "jpeg_compressibility", "qality": 2}]},
         ["rewards.1: ", "'qality'", "'quality'"]),
        ({"rewards": ["jpeg_compresibility"]},
         ["rewards.0: ", "'jpeg_compresibility' is unknown", "'jpeg_compressibility'?"]),
        ({"rewards": []}, ["rewards: ", "at least 1 item", "got []"]),
        ({"rewards": [{"weight": 2}]}, ["rewards.0.name: required, but not there"]),
        ({"rewards": ["shapes_verifier", "shapes_verifier"]}, ["rewards: a name occurs twice"]),
        ({"rewards": ["no.module:function"]}, ["rewards.0: ", "'no.module:function' could not be imported"]),
        ({"advantage": {"name": "group", "clipp": 3}},
         ["advantage: ", "has no option 'clipp'", "did you mean 'clip'?"]),
        ({"advantage": {"name": "group", "std": "sample"}},
         ["advantage: ", "'std'", "'population' or 'unbiased'", "got 'sample'"]),
        ({"advantage": {"name": "group", "global_std": "perhaps"}}, ["'global_std'", "boolean", "got 'perhaps'"]),
        ({"objective": "clip"}, ["objective: ", "'clip' is unknown", "did you mean 'clipped'?"]),
        ({"objective": {"name": "clipped", "clip_range": [1]}}, ["'clip_range'", "number", "got [1]"]),
        ({"objective": {"name": "clipped", "clip_range": True}}, ["'clip_range'", "expected a number", "got True"]),
        ({"regularizers": ["kl", "lk"]}, ["regularizers.1: ", "'lk' is unknown", "'kl'"]),
        ({"optimizer": {"name": "adamw", "lr": "fast"}}, ["optimizer: ", "'lr'", "number", "got 'fast'"]),
        ({"optimizer": {"lr": "fast"}}, ["optimizer 'adamw'", "'lr'", "got 'fast'"]),
        ({"optimizer": {"name": "adamw", "betas": [0.9]}}, ["optimizer: ", "'betas'", "got [0.9]"]),
        ({"optimizer": "adam"}, ["optimizer: ", "'adam' is unknown", "did you mean 'adamw'?"]),
        ({"rollout": {"guidance": {"name": "cgf"}}}, ["rollout.guidance: ", "'cgf' is unknown", "did you mean 'cfg'?"]),
        ({"rollout": {"guidance": {"name": "cfg", "scale": -1}}}, ["rollout.guidance: ", "CFG.scale", "in [0, 1000], got -1"]),
        ({"evaluation": {"guidance": {"name": "cfg", "scal": 1}}},
         ["evaluation.guidance: ", "'scal'", "did you mean 'scale'?"]),
        ({"train": {"steps": -3}}, ["train.steps: ", "greater than or equal to 1", "got -3"]),
        ({"train": {"steps": "many"}}, ["train.steps: ", "valid integer", "got 'many'"]),
        ({"train": 5}, ["train: ", "got 5"]),
        ({"train": {"max_grad_norm": 0}}, ["train.max_grad_norm: ", "greater than 0", "got 0"]),
        ({"rollout": {"group_size": 1}}, ["rollout.group_size: ", "greater than or equal to 2", "got 1"]),
        ({"rollout": {"noise_level": 0}}, ["rollout.noise_level: ", "greater than 0"]),
        ({"rollout": {"num_inference_steps": 5, "window": {"size": 3, "range": [0, 3]}}},
         ["rollout.window: ", "[0, 3] with size 3", "num_inference_steps = 5", "last <= 1 (the last step is never trained)"]),
        ({"rollout": {"num_inference_steps": 5, "window": {"size": 3, "range": [2, 1]}}},
         ["rollout.window: ", "first <= last"]),
        ({"rollout": {"num_inference_steps": 5, "window": {"size": 6}}}, ["rollout.window: ", "size 6"]),
        ({"lora": {"rank": 0}}, ["lora.rank: ", "got 0"]),
        ({"ema": {"decay": 1.0}}, ["ema.decay: ", "less than 1", "got 1.0"]),
        ({"checkpoint": {"keep": 1}}, ["checkpoint.keep: ", "greater than or equal to 2", "got 1"]),
        ({"runtime": {"dtype": "fp8"}}, ["runtime.dtype: ", "'bfloat16'", "got 'fp8'"]),
        ({"runtime": {"device": "gpu"}}, ["runtime.device: ", "'cuda'", "got 'gpu'"]),
        ({"runtime": {"cpu_threads": -1}}, ["runtime.cpu_threads", "got -1"]),
        ({"algorithm": "flow_gpro"}, ["algorithm 'flow_gpro' does not exist", "did you mean 'flow_grpo'?"]),
        ({"algorithm": 3}, ["algorithm: ", "got 3"]),
        ({"plugins": ["nowhere/mine.py"]}, ["plugins: nowhere/mine.py does not exist"]),
        ({"on_invalid_reward": "ignore"}, ["on_invalid_reward: ", "'error' or 'skip'", "got 'ignore'"]),
        ({"model": None}, ["model: ", "valid string", "got None"]),
    ],
    ids=lambda v: re.sub(r"[^\w.-]+", "_", json.dumps(v))[:60] if isinstance(v, dict) else "",
)  # fmt: skip
def test_a_mistake_is_named_with_its_key_value_and_what_was_expected(extra, messages, no_model):
    with pytest.raises(ConfigError) as error:
        load_config(merged(extra))
    for message in messages:
        assert message in str(error.value)


def test_several_mistakes_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        load_config({"rewards": ["jepg"], "objective": "clippd"})
    assert "rewards.0" in str(error.value)
    assert "objective" in str(error.value)
    with pytest.raises(ConfigError) as error:
        load_config(merged({"trian": 1, "lora": {"rank": 0}}))
    assert "trian" in str(error.value)
    assert "lora.rank" in str(error.value)


def test_without_rewards_the_message_is_short():
    with pytest.raises(ConfigError, match=r"^rewards: required, but not there$"):
        load_config({"model": "shapes"})


# --- overrides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", r"override 'train.steps': expected KEY=VALUE, for example train.steps=50"),
        ("train.stepz=3", r"train.stepz: unknown key; did you mean 'steps'"),
        ("model.name.x=3", r"override 'model.name.x=3': model is 'shapes', which has no keys"),
        ("seed.x=1", r"override 'seed.x=1': seed is 5, which has no keys"),
        ("rewards.0.weight=1", r"override 'rewards.0.weight=1': rewards is \["),
        ("train.steps=[1", r"override 'train.steps=\[1': the value is not valid YAML"),
        ("advantage.clipp=2", r"advantage 'group' has no option 'clipp': did you mean 'clip'"),
        ("=3", r"unknown key"),
    ],
)
def test_a_wrong_override_is_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(merged({"advantage": "group", "model": "shapes", "seed": 5}), [override])


def test_overrides_reach_nested_keys_and_method_options():
    config = load_config(
        merged({"advantage": "group", "rollout": {"guidance": "cfg"}}),
        [
            "train.steps=7",
            "advantage.clip=3",
            "rollout.guidance.scale=2.5",
            "lora=null",
            "rollout.window.size=2",
            "seed=9",
        ],
    )
    assert config.train.steps == 7
    assert config.advantage.name == "group"
    assert config.advantage.options == {"clip": 3}
    assert config.rollout.guidance.options == {"scale": 2.5}
    assert config.lora is None
    assert config.rollout.window.size == 2
    assert config.seed == 9


@pytest.mark.parametrize("algorithm", [None, "flow_grpo"])
def test_an_option_of_a_method_that_nobody_named_is_the_default_methods(algorithm):
    config = load_config(merged({"algorithm": algorithm}), ["optimizer.lr=1e-3", "advantage.global_std=true"])
    assert config.optimizer.name == "adamw"
    assert config.advantage.name == "group"
    assert config.advantage.options["global_std"] is True


def test_a_number_that_yaml_reads_as_text_is_a_number():
    """YAML 1.1 takes 1e-4 for a string."""
    from diffgen import registry

    config = load_config(merged({}), ["optimizer.lr=1e-4", "objective.clip_range=1e-3"])
    optimizer = registry.build("optimizer", config.optimizer.name, config.optimizer.options)
    assert optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 1e-4
    objective = registry.build("objective", config.objective.name, config.objective.options)
    assert objective.keywords == {"clip_range": 1e-3}


def test_overrides_leave_the_callers_dict_alone():
    source = merged({"train": {"steps": 3}, "rollout": {"window": {"size": 2}}})
    before = json.dumps(source)
    load_config(source, ["train.steps=4", "rollout.window.size=1", "advantage.clip=1"])
    assert json.dumps(source) == before


# --- files and presets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", r"must hold a mapping of keys to values, got list"),
        ("", r"must hold a mapping of keys to values, got NoneType"),
        ("a: [1", r"is not valid YAML"),
        ("rewards: !!python/object/apply:os.system ['true']", r"is not valid YAML"),
        (b"model: \xff\xfe", r"is not valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping_of_plain_values_is_refused(text, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=rf"run.yaml {message}"):
        load_config(file)


def test_a_recipe_that_does_not_exist_is_named_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"recipe 'shapes_flow_gpro' does not exist; did you mean 'shapes_flow_grpo'"):
        load_config("shapes_flow_gpro")
    with pytest.raises(ConfigError, match=r"recipe 'nowhere/run.yaml' does not exist"):
        load_config("nowhere/run.yaml")


def test_the_shipped_recipe_loads_by_name_and_by_path(tmp_path):
    by_name = load_config("shapes_flow_grpo", ["train.steps=3"])
    assert by_name == load_config("configs/shapes_flow_grpo.yaml", ["train.steps=3"])
    assert by_name.train.steps == 3
    file = tmp_path / "copy.yaml"
    file.write_text("algorithm: flow_grpo\nrewards: [shapes_verifier]\nadvantage: {clip: 2}\n")
    config = load_config(file)
    assert config.advantage.options["clip"] == 2
    assert config.advantage.options["std"] == "population"  # the preset lies beneath
    config = load_config(file, ["objective=clipped"])
    assert config.objective.options == {}  # naming a method anew drops the preset's options


def test_a_config_survives_json():
    config = load_config("shapes_flow_grpo")
    assert load_config(json.loads(config.model_dump_json())) == config


# --- plugins --------------------------------------------------------------------------------------------------------

PLUGIN = '''
import torch
from diffgen.registry import register

@register("advantage", "{name}")
def mine(rewards, group, rollout, *, factor: float = 1.0):
    """Rewards themselves."""
    return factor * rewards
'''


def test_a_plugins_method_is_used_by_its_name(trainer, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN.format(name="test_plugin"))
    run = trainer(plugins=[str(file)], advantage={"name": "test_plugin", "factor": 2})
    assert torch.equal(run.advantage(torch.tensor([1.0, 3.0]), None, None), torch.tensor([2.0, 6.0]))
    run.fit()
    with pytest.raises(ConfigError, match=r"advantage 'test_plugin' has no option 'fctor': did you mean 'factor'"):
        load_config(merged({"plugins": [str(file)], "advantage": {"name": "test_plugin", "fctor": 2}}))
    with pytest.raises(ConfigError, match=r"'test_plugn' is unknown: did you mean 'test_plugin'"):
        load_config(merged({"plugins": [str(file)], "advantage": "test_plugn"}))


def test_two_plugins_of_one_file_name_are_both_run(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(PLUGIN.format(name=f"test_same_{folder}"))
    plugins = [str(tmp_path / folder / "same.py") for folder in ("a", "b")]
    for folder in ("a", "b"):
        load_config(merged({"plugins": plugins, "advantage": f"test_same_{folder}"}))


def test_a_plugin_that_raises_is_named_and_can_be_mended(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("1 / 0")
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"plugins: .*broken.py failed to import: ZeroDivisionError: division by zero"
        ):
            load_config(merged({"plugins": [str(file)]}))
    file.write_text("")
    load_config(merged({"plugins": [str(file)]}))


def test_a_plugin_cannot_take_the_name_of_a_method_that_is_there(tmp_path):
    file = tmp_path / "thief.py"
    file.write_text(PLUGIN.format(name="group"))
    with pytest.raises(ConfigError, match=r"advantage 'group' is registered already, by diffgen.training.advantages"):
        load_config(merged({"plugins": [str(file)]}))


def test_checking_a_config_imports_neither_diffusers_nor_transformers():
    code = """
import sys
from diffgen.training import load_config, ConfigError
load_config({"rewards": ["jpeg_compressibility"], "rollout": {"guidance": "cfg"}})
print([m for m in ("diffusers", "transformers", "peft", "accelerate") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_yaml_aliases_which_can_blow_up_are_refused_at_once(tmp_path):
    bomb = tmp_path / "bomb.yaml"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi")]
    bomb.write_text("\n".join([*lines, "model: *i"]))
    with pytest.raises(ConfigError, match="uses YAML aliases"):
        load_config(bomb)


def test_yaml_keys_that_are_no_text_are_named(tmp_path):
    file = tmp_path / "on.yaml"
    file.write_text("on: 1\n")
    with pytest.raises(ConfigError, match=r"key True is no text"):
        load_config(file)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"optimizer": {"name": "adamw", "lr": float("nan")}}, "'lr'"),
        ({"optimizer": {"name": "adamw", "lr": -1}}, "'lr'"),
        ({"objective": {"name": "clipped", "clip_range": -1}}, "'clip_range'"),
        ({"advantage": {"name": "group", "clip": float("inf")}}, "'clip'"),
        ({"regularizers": {"name": "kl", "coef": -0.1}}, "'coef'"),
        ({"regularizers": ["kl", "kl"]}, "regularizers: a name occurs twice"),
        ({"lora": {"alpha": float("inf")}}, "lora.alpha"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_before_any_model_is_loaded(change, part):
    with pytest.raises(ConfigError, match=part):
        load_config(merged(change))
