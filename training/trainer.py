"""The trainer: one loop, readable top to bottom.

    prompts -> rollout -> rewards -> advantage -> select -> for each minibatch: evaluate -> objective + regularizers ->
    backward -> step -> EMA, log, evaluate, checkpoint

Every random number is a hash of what it is for, so a run resumed from a checkpoint continues as if never stopped.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from diffgen import registry
from diffgen.seeding import seed_of
from diffgen.training import checkpoint
from diffgen.training.advantages import combine
from diffgen.training.config import Config, ConfigError, Spec
from diffgen.training.data import Prompts, columns
from diffgen.training.policy import DiffusionPolicy, swapped
from diffgen.training.rewards.score import score
from diffgen.training.rollout import Rollout


class Trainer:
    """Trainer(config).fit() runs to config.train.steps updates, resuming the newest checkpoint in config.output_dir.

    Writes there: config.json, log.jsonl (a line an update), images/, checkpoints/, tracker files, and at the end final/
    (LoRA weights, or the whole pipeline after full fine-tuning), with the EMA weights where there is an EMA.
    """

    def __init__(self, config: Config, quiet: bool = False):
        self.config, self.quiet = config, quiet
        self.folder = Path(config.output_dir)
        self.data, self.eval_data = Prompts(config.data.prompts), Prompts(config.data.eval_prompts, "data.eval_prompts")
        self._prepare_folder()
        _check_attention(config.runtime.attention)
        self.accelerator = _accelerator(config)
        torch.manual_seed(seed_of(config.seed, "init"))  # LoRA's first weights
        self.policy = self._load_policy()
        self.rewards = {r.name: registry.build("reward", r.name, r.options) for r in config.rewards}
        self.weights = {r.name: r.weight for r in config.rewards}
        self.advantage, self.select, self.objective = (
            _build(s, getattr(config, s)) for s in ("advantage", "select", "objective")
        )
        self.regularizers = {r.name: _build("regularizer", r) for r in config.regularizers}
        used = [(s, getattr(config, s).name) for s in ("advantage", "select", "objective")]
        used += [("regularizer", r.name) for r in config.regularizers]
        needs = {need for stage, name in used for need in registry.get(stage, name).needs}
        if unknown := needs - self.policy.has:
            raise ConfigError(
                f"a method of this config needs {sorted(unknown)}; the policy has {sorted(self.policy.has)}"
            )
        self.needs_reference = "reference" in needs
        if self.needs_reference:
            self.policy.keep_reference()
        self.params = self.policy.named_parameters()
        self.optimizer = registry.build("optimizer", config.optimizer.name, config.optimizer.options)(
            self.params.values()
        )
        self.ema = [p.detach().clone() for p in self.params.values()] if config.ema else None
        self.update = 0
        self.failed_saves = self.failed_steps = 0
        self._stop: int | None = None

    # --- one update -------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """One update: sample, score, learn. Returns what is logged."""
        started = time.perf_counter()
        torch.manual_seed(seed_of(self.config.seed, "update", self.update))
        rollout = self.sample()
        sampled = time.perf_counter()
        rollout.rewards = score(
            self.rewards, rollout.samples, rollout.prompts, rollout.columns, self.config.on_invalid_reward
        )
        scored = time.perf_counter()
        advantage = combine(rollout, self._weights(rollout.rewards), self.advantage)
        keep = self.select(advantage, rollout)
        metrics = self.learn(rollout, advantage, keep)
        for name, values in rollout.rewards.items():
            metrics[f"reward/{name}"] = values.nanmean().item()
        metrics["advantage/kept"] = keep.float().mean().item()
        metrics["time/rollout"] = sampled - started
        metrics["time/reward"] = scored - sampled
        metrics["time/train"] = time.perf_counter() - scored
        self._update_ema()
        self.update += 1
        return metrics

    def sample(self) -> Rollout:
        """Rollout of this update's groups."""
        c = self.config.rollout
        rows = self.data.draw(c.prompts_per_update, self.config.seed, self.update)
        rows = [row for row in rows for _ in range(c.group_size)]
        group = torch.arange(c.prompts_per_update).repeat_interleave(c.group_size)
        seeds = [(self.config.seed, self.update, int(g), i % c.group_size) for i, g in enumerate(group)]
        shared = c.window is not None if c.share_initial_noise is None else c.share_initial_noise
        rollout = self.policy.rollout(
            [row["prompt"] for row in rows],
            group,
            seeds,
            num_inference_steps=c.num_inference_steps,
            guidance=_build("guidance", c.guidance),
            noise_level=c.noise_level,
            window=self._window(),
            share_initial_noise=shared,
            batch_size=c.batch_size,
        )
        rollout.columns = columns(rows)
        return rollout

    def _window(self) -> tuple[int, int] | None:
        window = self.config.rollout.window
        if window is None:
            return None
        first, last = window.range
        start = first + seed_of(self.config.seed, "window", self.update) % (last - first + 1)
        return start, start + window.size

    def learn(self, rollout: Rollout, advantage: torch.Tensor, keep: torch.Tensor) -> dict[str, float]:
        """The gradient steps of one rollout; statistics of the ratio over all trained actions."""
        c = self.config.train
        statistics: dict[str, list[torch.Tensor]] = {"ratio": [], "loss": [], "grad_norm": []}
        kept = keep.nonzero().flatten()
        for epoch in range(c.inner_epochs):
            order = kept[torch.randperm(len(kept))] if c.inner_epochs > 1 or len(kept) > c.minibatch_size else kept
            for rows in order.split(c.minibatch_size) if len(order) else []:
                first = self.update == 0 and epoch == 0 and not statistics["loss"]
                self._minibatch(rollout, rows, advantage, statistics, first)
        ratio = torch.cat(statistics["ratio"]) if statistics["ratio"] else torch.ones(1)
        return {
            "loss": torch.stack(statistics["loss"]).mean().item() if statistics["loss"] else 0.0,
            "grad_norm": torch.stack(statistics["grad_norm"]).mean().item() if statistics["grad_norm"] else 0.0,
            "ratio/mean": ratio.mean().item(),
            "ratio/std": ratio.std(correction=0).item(),
            "ratio/clipped": self._clipped(ratio),
        }

    def _minibatch(self, rollout, rows, advantage, statistics, first: bool) -> None:
        c = self.config.train
        actions = torch.arange(rollout.logp.shape[1])
        trained = rollout.mask[rows].sum().clamp_min(1)
        total = torch.zeros(())
        for part in actions.split(c.actions_per_backward):
            evaluation = self.policy.evaluate(
                rollout, rows, part, grad_uncond=c.grad_uncond, reference=self.needs_reference
            )
            logp, device = evaluation.logp, evaluation.logp.device
            old = rollout.logp[rows][:, part].to(device)
            mask = rollout.mask[rows][:, part].to(device)
            weight = advantage[rows]
            weight = (weight[:, part] if weight.ndim == 2 else weight[:, None].expand(-1, len(part))).to(device)
            loss = self.objective(logp, old, weight, evaluation)
            for regularizer in self.regularizers.values():
                loss = loss + regularizer(evaluation, rollout, rows)
            loss = (loss * mask).sum() / trained
            self.accelerator.backward(loss)
            ratio = torch.exp(logp.detach() - old)[mask]
            statistics["ratio"].append(ratio.cpu())
            total += loss.detach().cpu()
            if first and (ratio - 1).abs().max() > 1e-3:
                warnings.warn(
                    f"the first ratio of the run is off by {(ratio - 1).abs().max().item():.1e}; before any update it "
                    "should be 1: rollout and training compute different things (dropout, dtype, caching)",
                    stacklevel=2,
                )
        norm = torch.nn.utils.clip_grad_norm_(self.params.values(), c.max_grad_norm)
        if torch.isfinite(norm) and torch.isfinite(total):
            self.optimizer.step()
            self.failed_steps = 0
        else:
            self.failed_steps += 1
            if self.failed_steps >= 5:
                raise RuntimeError(f"update {self.update}: loss or gradient is not finite, for the fifth time in a row")
            warnings.warn(f"update {self.update}: loss or gradient is not finite; the step is left out", stacklevel=2)
        self.optimizer.zero_grad(set_to_none=True)
        statistics["loss"].append(total)
        statistics["grad_norm"].append(norm.detach().cpu())

    def _clipped(self, ratio: torch.Tensor) -> float:
        """Share of ratios outside the objective's clip range; 0 for an objective without one."""
        options = registry.get("objective", self.config.objective.name).options | self.config.objective.options
        low = options.get("clip_range")
        if low is None:
            return 0.0
        high = low if options.get("clip_range_high") is None else options["clip_range_high"]
        return ((ratio < 1 - low) | (ratio > 1 + high)).float().mean().item()

    def _weights(self, rewards: dict[str, torch.Tensor]) -> dict[str, float]:
        return {name: self.weights[name.split("/")[0] if name not in self.weights else name] for name in rewards}

    def _update_ema(self) -> None:
        c = self.config.ema
        if self.ema is None or c is None or (self.update + 1) % c.every:
            return
        n = (self.update + 1) / c.every
        decay = min(c.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.params.values()], 1 - decay)

    # --- the run ----------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, float]:
        """Trains to config.train.steps; returns the last logged metrics. Ctrl-C and SIGTERM save a checkpoint first."""
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                return self._fit()
        except Timeout:
            raise ConfigError(f"output_dir: another run is at work in {self.folder}; choose another one") from None

    def _fit(self) -> dict[str, float]:
        c = self.config
        self.resume()
        (self.folder / "config.json").write_text(c.model_dump_json(indent=1))
        if self.update >= c.train.steps:
            self._say(f"{self.folder} already holds {self.update} updates; raise train.steps to go on")
        self._start_trackers()
        handlers = self._catch_signals()
        metrics: dict[str, float] = {}
        bar = tqdm(
            total=c.train.steps,
            initial=self.update,
            desc=Path(c.output_dir).name,
            disable=self.quiet,
            dynamic_ncols=True,
        )
        try:
            if self.update == 0 and c.evaluation.every:
                self._log(self.evaluate(), 0)
            while self.update < c.train.steps and self._stop is None:
                metrics = self.step()
                last = self.update == c.train.steps
                if c.evaluation.every and (self.update % c.evaluation.every == 0 or last):
                    metrics |= self.evaluate()
                self._log(metrics, self.update)
                bar.update()
                bar.set_postfix(self._summary(metrics), refresh=False)
                if last or self._stop is not None or (c.checkpoint.every and self.update % c.checkpoint.every == 0):
                    self.save(required=last or self._stop is not None)
            if self.update >= c.train.steps:
                if self.failed_steps:
                    raise RuntimeError(
                        f"the last {self.failed_steps} gradient steps were not finite; nothing is exported"
                    )
                self.export(self.folder / "final")
        finally:
            bar.close()
            self.accelerator.end_training()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self._stop is not None:
            self._say(f"stopped by signal {self._stop} after {self.update} updates; run the same command to go on")
            raise SystemExit(128 + self._stop)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Mean rewards on the evaluation prompts, sampled without noise with the EMA weights, always the same seeds."""
        c = self.config.evaluation
        rows = self.eval_data.first(c.n)
        prompts = [row["prompt"] for row in rows]
        images = self.draw(prompts)
        scores = score(self.rewards, images, prompts, columns(rows), "skip")
        if c.images and images.ndim == 4:
            from diffgen.grid import save_grid

            save_grid(images[: c.images], self.folder / "images" / f"eval-{self.update:06d}.png")
        return {f"eval/{name}": values.nanmean().item() for name, values in scores.items()}

    def draw(self, prompts: list[str], seed: int = 0) -> torch.Tensor:
        """One image a prompt, uint8, with the EMA weights; the seeds don't depend on the run."""
        c, r = self.config.evaluation, self.config.rollout
        with swapped(self.params.values(), self.ema or [p.detach() for p in self.params.values()]):
            return self.policy.sample(
                prompts,
                eval_seeds(len(prompts), seed),
                num_inference_steps=c.num_inference_steps or r.num_inference_steps,
                guidance=_build("guidance", c.guidance),
                batch_size=r.batch_size,
            )

    def _log(self, metrics: dict[str, float], update: int) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # NaN is no JSON
        try:
            with (self.folder / "log.jsonl").open("a") as stream:
                stream.write(json.dumps({"update": update, **finite}) + "\n")
        except OSError as error:  # a full disk; checkpoints decide whether the run can go on
            warnings.warn(f"update {update} could not be logged: {error}", stacklevel=2)
        self.accelerator.log(metrics, step=update)

    def _summary(self, metrics: dict[str, float]) -> dict[str, str]:
        shown = {k.split("/", 1)[1]: v for k, v in metrics.items() if k.startswith("reward/")}
        shown |= {"ratio": metrics["ratio/mean"], "clip": metrics["ratio/clipped"]}
        return {k: f"{v:.3f}" for k, v in shown.items()}

    # --- state ------------------------------------------------------------------------------------------------------

    def save(self, required: bool = False) -> None:
        """Commits a checkpoint. A failed save (disk full) is reported, and fatal when required or the third in a row."""
        self._check_weights()
        names = list(self.params)
        optimizer, extra = checkpoint.flatten_optimizer(self.optimizer)
        tensors = {"model": {n: p.detach() for n, p in self.params.items()}, "optimizer": optimizer}
        if self.ema is not None:
            tensors["ema"] = dict(zip(names, self.ema))
        if self.policy.lora is None and self.needs_reference:
            tensors["reference"] = dict(zip(names, self.policy.base))
        state = {"update": self.update, "optimizer": extra, "config": self.config.model_dump(mode="json")}
        try:
            checkpoint.save(self.folder / "checkpoints", self.update, tensors, state, self.config.checkpoint.keep)
            self.failed_saves = 0
        except OSError as error:
            self.failed_saves += 1
            if required or self.failed_saves >= 3:
                raise RuntimeError(f"checkpoint at update {self.update} could not be written: {error}") from error
            warnings.warn(f"checkpoint at update {self.update} could not be written: {error}; going on", stacklevel=2)

    def resume(self) -> None:
        """Restores the newest intact checkpoint, or the one that config.checkpoint.resume names; and cuts the log there."""
        wanted = self.config.checkpoint.resume
        path = checkpoint.newest(self.folder / "checkpoints") if wanted == "auto" else Path(wanted)
        log = self.folder / "log.jsonl"
        if path is None:
            if log.is_file():  # of a run that ended before its first checkpoint
                os.replace(log, log.with_suffix(".before.jsonl"))
            return
        tensors, state = checkpoint.load(path)
        self._check_same_run(state["config"], path)
        if set(tensors["model"]) != set(self.params):
            raise checkpoint.CheckpointError(
                f"{path} holds other parameters than this run trains (lora, target_modules?)"
            )
        if wanted != "auto":
            checkpoint.set_aside_after(self.folder / "checkpoints", state["update"])
        for name, parameter in self.params.items():
            parameter.data.copy_(tensors["model"][name])
        checkpoint.restore_optimizer(self.optimizer, tensors["optimizer"], state["optimizer"])
        if self.ema is not None:
            torch._foreach_copy_(self.ema, [tensors["ema"][n] for n in self.params])
        if self.policy.lora is None and self.needs_reference:
            torch._foreach_copy_(self.policy.base, [tensors["reference"][n] for n in self.params])
        self.update = state["update"]
        if log.is_file():
            lines = [line for line in log.read_text().splitlines() if _update_of(line) <= self.update]
            cut = log.with_name(log.name + ".tmp")
            cut.write_text("".join(line + "\n" for line in lines))
            os.replace(cut, log)
        self._say(f"resuming {path} at update {self.update}")

    def _check_weights(self) -> None:
        wrong = [n for n, p in self.params.items() if not p.isfinite().all()]
        if wrong:
            raise FloatingPointError(
                f"update {self.update}: {len(wrong)} parameters are not finite ({wrong[0]} first): the run has diverged; the "
                "last checkpoint is from before (a lower optimizer.lr?)"
            )

    def export(self, folder: Path) -> None:
        """Writes the trained weights (EMA where there is one) under a temporary name, then renames."""
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        with swapped(self.params.values(), self.ema or [p.detach() for p in self.params.values()]):
            self.policy.save(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)

    def _check_same_run(self, saved: dict, path: Path) -> None:
        """What may differ from the checkpoint: how long and how closely the run is watched, where it lives."""
        mine = self.config.model_dump(mode="json")
        free = (
            "output_dir",
            "evaluation",
            "logging",
            "checkpoint",
            "train.steps",
            "runtime.device",
            "runtime.cpu_threads",
        )
        changed = [k for k in _different(mine, saved) if not {k, k.split(".")[0]} & set(free)]
        if changed:
            raise ConfigError(
                f"{path} belongs to a run with another config; different: {', '.join(changed)}. Choose another output_dir"
            )

    # --- set-up -----------------------------------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError("it is read-only")
        except OSError as error:
            raise ConfigError(f"output_dir: {self.folder} can't be written: {error}") from None

    def _load_policy(self) -> DiffusionPolicy:
        from diffgen.loading import load

        c = self.config
        dtype = getattr(torch, c.runtime.dtype)
        pipe = load(
            c.model, dtype=dtype, device=self.accelerator.device, trust_remote_code=c.trust_remote_code, quiet=True
        )
        if c.runtime.attention == "xformers":
            pipe.enable_xformers_memory_efficient_attention()
        return DiffusionPolicy(
            pipe, lora=c.lora, call=c.rollout.call, gradient_checkpointing=c.train.gradient_checkpointing
        )

    def _start_trackers(self) -> None:
        if self.config.logging.tracker != "none":
            self.accelerator.init_trackers("diffgen", init_kwargs={})

    def _catch_signals(self) -> dict[int, Any]:
        """First SIGINT or SIGTERM: finish the update, save, exit. Second: at once."""
        import threading

        if threading.current_thread() is not threading.main_thread():
            return {}

        def handler(number, frame):
            if self._stop is not None:
                raise KeyboardInterrupt
            self._stop = number
            self._say(
                "stopping after this update, with a checkpoint (again: at once, and what came since the last one is lost)"
            )

        return {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}

    def _say(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(text)


def eval_seeds(n: int, seed: int = 0) -> list[tuple]:
    """Seeds of the evaluation's samples: the same for every run and every model."""
    return [("eval", seed, i) for i in range(n)]


def _build(stage: str, spec: Spec | None):
    return registry.build(stage, spec.name, spec.options) if spec else None


def _different(a: Any, b: Any, key: str = "") -> list[str]:
    """Dotted keys at which two nested dicts differ."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [key] if a != b else []
    return [d for k in {**a, **b} for d in _different(a.get(k), b.get(k), f"{key}.{k}".removeprefix("."))]


def _update_of(line: str) -> float:
    try:
        return json.loads(line)["update"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf  # a line cut short by a kill


def _check_tracker(name: str) -> None:
    import importlib.util

    if name != "none" and importlib.util.find_spec(name) is None:
        raise ConfigError(f"logging.tracker: {name} is not installed; pip install {name}, or set logging.tracker=none")


def _accelerator(config: Config):
    from accelerate import Accelerator

    if config.runtime.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("runtime.device: cuda, but torch finds no CUDA device; expected auto or cpu")
    cpu = config.runtime.device == "cpu" or (config.runtime.device == "auto" and not torch.cuda.is_available())
    if cpu:
        cores = os.cpu_count() or 1
        threads = config.runtime.cpu_threads
        # two threads gain 1.2x on an idle machine of two cores and lose 10x on a busy one
        torch.set_num_threads((1 if cores <= 4 else cores // 2) if threads == "auto" else threads)
    _check_tracker(config.logging.tracker)
    tracker = None if config.logging.tracker == "none" else config.logging.tracker
    accelerator = Accelerator(cpu=cpu, log_with=tracker, project_dir=config.output_dir)
    if accelerator.num_processes > 1:
        raise ConfigError(f"one process trains a run; {accelerator.num_processes} were launched")
    return accelerator


def _check_attention(backend: str) -> None:
    if backend == "sdpa":
        return
    try:
        import xformers.ops  # noqa: F401
    except Exception as error:
        raise ConfigError(
            f"runtime.attention: xformers can't be used here ({type(error).__name__}: {error}); use sdpa, the default, or "
            "install a build for this torch: pip install diffgen[xformers]"
        ) from None
