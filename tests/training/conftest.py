"""Tiny pipelines on disk, runs of a second, and rewards that tests name in a config."""

import functools

import pytest
import torch

from diffgen.registry import register


@register("reward", "test_red")
def red(samples, prompts, *, sign: float = 1.0, **columns):
    """Mean of the red channel minus that of the others, in [-1, 1]."""
    x = samples.float().mean((2, 3)) / 255
    return sign * (x[:, 0] - x[:, 1:].mean(1))


@register("reward", "test_first_frame")
def first_frame(samples, prompts, **columns):
    """Brightness of a video's first frame."""
    return samples[:, 0].float().mean((1, 2, 3)) / 255


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """saved(name, **variants) -> folder of that tiny pipeline."""
    from diffgen.tiny import tiny_pipeline

    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def save(name, **variants):
        path = folder / "-".join([name, *(f"{k}={v}" for k, v in variants.items())])
        tiny_pipeline(name, **variants).save_pretrained(path)
        return str(path)

    return save


@pytest.fixture
def settings(saved, tmp_path):
    """settings(name, section=...) -> a config dict: 2 updates of 2 groups of 3 samples in 3 steps, no trackers."""
    from diffgen.tiny import call_kwargs
    from diffgen.training.config import _merge

    def make(pipeline="StableDiffusion3Pipeline", variants=None, **sections):
        base = {
            "model": saved(pipeline, **(variants or {})),
            "output_dir": str(tmp_path / "run"),
            "rollout": {
                "prompts_per_update": 2,
                "group_size": 3,
                "num_inference_steps": 3,
                "call": call_kwargs(pipeline),
            },
            "rewards": ["test_red"],
            "lora": {"rank": 4, "alpha": 6},
            "optimizer": {"name": "adamw", "lr": 0.01},
            "train": {"steps": 2},
            "evaluation": {"every": 0, "images": 0, "n": 2},
            "checkpoint": {"every": 1},
            "logging": {"tracker": "none"},
        }
        return _merge(base, sections)

    return make


@pytest.fixture
def trainer(settings):
    """trainer(name, section=...) -> a Trainer of settings(...)."""
    from diffgen.training import Trainer, load_config

    def make(*args, **sections):
        return Trainer(load_config(settings(*args, **sections)), quiet=True)

    return make


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# --- rewards and objectives that misbehave ------------------------------------------------------------------------------

_moody = {}


@pytest.fixture
def moody():
    """How the reward test_moody fails, from its call number `after` on."""
    _moody.clear()
    _moody.update(mode="fine", after=0, calls=0)
    return _moody


@register("reward", "test_moody")
def _moody_reward(samples, prompts, **columns):
    """Counts 0, 1, 2 ..., until it fails."""
    values = torch.arange(len(prompts)).float()
    _moody["calls"] += 1
    mode = _moody["mode"] if _moody["calls"] > _moody["after"] else "fine"
    if mode in ("nan", "inf"):
        values[1] = float(mode)
    if mode == "raise":
        raise ZeroDivisionError("ouch")
    if mode == "column":
        return _answer_reward(samples, prompts, **columns)
    return {"short": values[1:], "text": "good", "none": None}.get(mode, values)


@register("reward", "test_answer")
def _answer_reward(samples, prompts, answer, **columns):
    """The column itself."""
    return torch.tensor(answer).float()


@register("reward", "test_constant")
def _constant_reward(samples, prompts, **columns):
    """0.3 for all."""
    return [0.3] * len(prompts)


@register("reward", "test_two")
def _two_rewards(samples, prompts, **columns):
    """Two numbers a sample."""
    values = torch.arange(len(prompts))
    return {"a": values, "b": values % 2 == 0}


@register("objective", "test_nan")
def _nan_objective(logp, old_logp, advantage, evaluation):
    """NaN."""
    return logp * torch.nan


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""
    import diffusers

    import diffgen.loading

    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(diffgen.loading, "load", fail)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", fail)
