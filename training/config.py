"""The run's configuration: YAML + dotted overrides, checked completely before any model is loaded."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from diffgen import registry
from diffgen.names import nearest


class ConfigError(ValueError):
    """A configuration that can't run; the message names every wrong key, what was expected and the nearest valid name."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class Spec(BaseModel):
    """A registered method and its options: `group` or `{name: group, clip: 5}`."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    name: str

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value):
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class Reward(Spec):
    """A reward and its weight in the advantage."""

    weight: float = 1.0


class Runtime(_Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    cpu_threads: Literal["auto"] | PositiveInt = "auto"
    attention: Literal["sdpa", "xformers"] = "sdpa"


class Data(_Section):
    """prompts: "world:split" (endless), or a .txt, .jsonl or .csv file; other columns are passed to the rewards."""

    prompts: str = "shapes:train"
    eval_prompts: str = "shapes:held_out"


class Window(_Section):
    """size stochastic steps, at a start drawn from range (both ends included) at every update."""

    size: int = Field(3, ge=1)
    range: tuple[int, int] = (0, 0)


class Rollout(_Section):
    """prompts_per_update groups of group_size samples, in pipeline calls of at most batch_size samples.

    guidance: a rule, or null for none. window: null trains every step but the last. noise_level: a of Flow-SDE, eta of
    DDIM; null is the published value. share_initial_noise: one x_T a group (default: with a window). call: further
    arguments of the pipeline's call, such as height, width, max_sequence_length.
    """

    prompts_per_update: int = Field(8, ge=1)
    group_size: int = Field(8, ge=2)
    batch_size: int = Field(64, ge=1)
    num_inference_steps: int = Field(10, ge=1)
    guidance: Spec | None = None
    noise_level: float | None = Field(None, gt=0)
    window: Window | None = None
    share_initial_noise: bool | None = None
    call: dict[str, Any] = {}


class Lora(_Section):
    rank: int = Field(32, ge=1)
    alpha: float = Field(64, gt=0)
    init: Literal["gaussian", "default"] = "gaussian"
    target_modules: Annotated[list[str], Field(min_length=1)] = [
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    ]  # fmt: skip


class Train(_Section):
    """steps: updates. minibatch_size: samples a gradient step. inner_epochs: passes over a rollout.

    actions_per_backward: denoising steps in one graph (memory grows with it). grad_uncond: gradient through the
    unconditional prediction under guidance (flow_grpo: no).
    """

    steps: int = Field(100, ge=1)
    minibatch_size: int = Field(64, ge=1)
    inner_epochs: int = Field(1, ge=1)
    actions_per_backward: int = Field(1, ge=1)
    max_grad_norm: float = Field(1.0, gt=0)
    grad_uncond: bool = False
    gradient_checkpointing: bool = False


class Ema(_Section):
    decay: float = Field(0.9, ge=0, lt=1)
    every: int = Field(1, ge=1)


class Evaluation(_Section):
    """n held-out prompts, one sample each, every `every` updates (0: never), without noise, with the EMA weights."""

    every: int = Field(25, ge=0)
    n: int = Field(128, ge=1)
    num_inference_steps: int | None = Field(None, ge=1)
    guidance: Spec | None = None
    images: int = Field(16, ge=0)


class Logging(_Section):
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"


class Checkpoint(_Section):
    """every: updates (0: only at the end). keep: committed checkpoints kept. resume: auto, or a checkpoint's folder."""

    every: int = Field(25, ge=0)
    keep: int = Field(2, ge=2)
    resume: str = "auto"


class Config(_Section):
    """A run. lora null: full fine-tuning of the denoiser."""

    model: str = "shapes"
    output_dir: str = "runs/run"
    seed: int = 0
    algorithm: str | None = None
    plugins: list[str] = []
    trust_remote_code: bool = False
    runtime: Runtime = Runtime()
    data: Data = Data()
    rollout: Rollout = Rollout()
    rewards: list[Reward] = Field(min_length=1)
    on_invalid_reward: Literal["error", "skip"] = "error"
    advantage: Spec = Spec(name="group")
    select: Spec = Spec(name="nonzero")
    objective: Spec = Spec(name="clipped")
    regularizers: list[Spec] = []
    lora: Lora | None = Lora()
    optimizer: Spec = Spec(name="adamw")
    train: Train = Train()
    ema: Ema | None = Ema()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()
    checkpoint: Checkpoint = Checkpoint()

    @field_validator("regularizers", "rewards", mode="before")
    @classmethod
    def _one_is_a_list(cls, value):
        return [value] if isinstance(value, (str, dict)) else value

    @model_validator(mode="before")
    @classmethod
    def _options_of_the_default(cls, value):
        """`optimizer: {lr: 1e-4}` sets an option of the default method."""
        if isinstance(value, dict):
            for key, field in cls.model_fields.items():
                if isinstance(field.default, Spec) and isinstance(value.get(key), dict):
                    value = {**value, key: {"name": field.default.name, **value[key]}}
        return value

    @model_validator(mode="after")
    def _stages_exist(self):
        """Every named method exists and takes the options given."""
        _import_plugins(self.plugins)
        stages = [(f"rewards.{i}", "reward", r) for i, r in enumerate(self.rewards)]
        stages += [(f"regularizers.{i}", "regularizer", r) for i, r in enumerate(self.regularizers)]
        stages += [(s, s, getattr(self, s)) for s in ("advantage", "select", "objective", "optimizer")]
        stages += [(f"{s}.guidance", "guidance", getattr(self, s).guidance) for s in ("rollout", "evaluation")]
        wrong = []
        for key, stage, spec in stages:
            if spec is not None:
                try:
                    registry.build(stage, spec.name, spec.options, also=set(type(spec).model_fields) - {"name"})
                except ValueError as error:
                    wrong.append(f"{key}: {error}")
        if wrong:
            raise ValueError("\n".join(wrong))
        window, steps = self.rollout.window, self.rollout.num_inference_steps
        last = steps - 1 - (window.size if window else 0)  # the last step's tiny std would rule the loss
        if window and not 0 <= window.range[0] <= window.range[1] <= last:
            raise ValueError(
                f"rollout.window: starts {list(window.range)} with size {window.size} do not fit into "
                f"rollout.num_inference_steps = {steps}; expected 0 <= first <= last <= {last} (the last step is never trained)"
            )
        for key in ("rewards", "regularizers"):
            names = [r.name for r in getattr(self, key)]
            if len(set(names)) < len(names):
                raise ValueError(f"{key}: a name occurs twice in {names}")
        return self


def _import_plugins(paths: list[str]) -> None:
    """Runs the user's own Python files, which register methods."""
    import hashlib
    import importlib.util
    import sys

    for path in map(Path, paths):
        digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]  # two files may have one name
        name = f"diffgen_plugin_{path.stem}_{digest}"
        if name in sys.modules:
            continue
        if not path.is_file():
            raise ValueError(f"plugins: {path} does not exist")
        spec: Any = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise ValueError(f"plugins: {path} failed to import: {type(error).__name__}: {error}") from error


CONFIGS = Path(__file__).parent.parent / "configs"


def load_config(source: str | Path | dict, overrides: list[str] | None = None) -> Config:
    """Config from a YAML file (or the name of a shipped recipe, or a dict) and overrides such as "train.steps=50".

    `algorithm: NAME` puts the preset configs/algorithms/NAME.yaml beneath it. Raises ConfigError.
    """
    data = dict(source) if isinstance(source, dict) else _read(_find(source, "", "recipe"))
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r}: expected KEY=VALUE, for example train.steps=50")
        try:
            _set(data, key.strip(), yaml.safe_load(value), override)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    if isinstance(data.get("algorithm"), str):
        data = _merge(_read(_find(data["algorithm"], "algorithms", "algorithm")), data)
    try:
        return Config(**data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from None


def _find(name: str | Path, folder: str, what: str) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    shipped = {p.stem: p for p in (CONFIGS / folder).glob("*.yaml")}
    stem = path.stem if path.suffix in (".yaml", ".yml") else str(name)
    if stem in shipped and path.parent.name in ("", "configs", "algorithms"):
        return shipped[stem]
    raise ConfigError(f"{what} {str(name)!r} does not exist; {nearest(stem, shipped)}")


def _read(path: Path) -> dict:
    try:
        text = path.read_text()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ConfigError(f"{path} uses YAML aliases (*name), which can blow up; write the values out")
        data = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if isinstance(data, dict) and not all(isinstance(key, str) for key in data):
        wrong = next(key for key in data if not isinstance(key, str))
        raise ConfigError(
            f"{path}: key {wrong!r} is no text (YAML reads on, off, yes, no and numbers as values: quote it)"
        )
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, got {type(data).__name__}")
    return data


ONE_METHOD = ("advantage", "select", "objective", "optimizer", "guidance")  # keys that hold one method


def _set(data: dict, key: str, value: Any, override: str) -> None:
    *parents, last = key.split(".")
    for i, part in enumerate(parents):
        node = data.get(part)
        if isinstance(node, str) and part in ONE_METHOD:  # a bare method name, whose option is set
            node = {"name": node}
        if node is not None and not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parents[: i + 1])} is {node!r}, which has no keys")
        data[part] = data = dict(node or {})
    data[last] = value


def _merge(base: dict, over: dict) -> dict:
    """`over` on top of `base`; mappings are merged unless they name another method."""
    merged: dict[str, Any] = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if (
            isinstance(below, dict)
            and isinstance(value, dict)
            and value.get("name", below.get("name")) == below.get("name")
        ):
            value = _merge(below, value)
        merged[key] = value
    return merged


def _fields_at(location: tuple) -> list[str]:
    """Valid keys of the section in which `location` lies."""
    model: Any = Config
    for part in location[:-1]:
        annotation = (
            model.model_fields[part].annotation if isinstance(part, str) and part in model.model_fields else None
        )
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), model)
    return list(model.model_fields)


def _explain(error: Any) -> str:
    key = ".".join(map(str, error["loc"])) or "config"
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; {nearest(str(error['loc'][-1]), _fields_at(error['loc']))}"
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return message
    if error["type"] == "missing":
        return f"{key}: required, but not there"
    return f"{key}: {message[0].lower()}{message[1:]}, got {reprlib.repr(error['input'])}"  # YAML aliases can be huge
