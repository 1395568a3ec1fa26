"""LinearAG (arXiv 2312.12487, section 5): some unconditional evaluations replaced by an affine function of past predictions.

    u_t ~ a + sum_{k=0..K} b_k c_{t-k} + sum_{k=1..K} d_k u_{t-k}

with scalar coefficients per step, shared by pixels, samples and prompts: ordinary least squares on guided trajectories.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffgen.files import write_text
from diffgen.pipelines.base import Guidance, Wrapper, batches, real, require, whole, wide
from diffgen.registry import register
from diffgen.seeding import generator
from diffgen.tap import Alter, StepInfo


@dataclass
class Coefficients:
    """What `fit` found, for one (model, scheduler with its steps, inner rule).

    cond[t]: weights of c_t, c_{t-1}, ...; uncond[t]: of u_{t-1}, u_{t-2}, ...; intercept[t]. r2[t]: share of the variance
    of u_t explained, r2_cond[t] and r2_last[t]: by u_t = c_t and by u_t = u_{t-1} (NaN at step 0, which is never replaced).
    made_for: what they hold for, compared before every use.
    """

    cond: list[list[float]]
    uncond: list[list[float]]
    intercept: list[float]
    r2: list[float]
    r2_cond: list[float]
    r2_last: list[float]
    made_for: dict[str, Any]
    prompts: int = 0
    version: int = 1

    def __post_init__(self):
        def check(name: str, valid: bool, expected: str) -> None:
            if not valid:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r:.80}")

        def numbers_in(values: object) -> bool:
            return isinstance(values, list) and all(map(real, values))

        check("version", self.version == 1 and self.version is not True, "1, the only one known")
        keys = {"model", "weights", "scheduler", "timesteps", "rule"}
        made_for = self.made_for if isinstance(self.made_for, dict) else {}
        valid = set(made_for) == keys and all(isinstance(made_for[k], str) for k in ("model", "scheduler", "rule"))
        valid = valid and numbers_in(made_for["timesteps"]) and isinstance(made_for["weights"], list)
        check("made_for", valid, f"a dict of {', '.join(sorted(keys))}")
        steps = len(made_for["timesteps"])
        check("intercept", numbers_in(self.intercept) and len(self.intercept) == steps, f"{steps} finite numbers")
        for name in ("cond", "uncond"):
            rows = getattr(self, name)
            valid = isinstance(rows, list) and len(rows) == steps and all(map(numbers_in, rows))
            check(name, valid, f"{steps} lists of finite numbers, one a step")
        valid = all(len(u) <= t and len(c) == len(u) + 1 for t, (c, u) in enumerate(zip(self.cond, self.uncond)))
        check("uncond", valid, "one number shorter than cond at each step, and no longer than the past")

    def save(self, path: Path | str) -> Path:
        """JSON, written under a temporary name and renamed."""
        return write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Coefficients:
        try:
            content = json.loads(Path(path).read_text())
            return cls(**content)
        except OSError as error:
            raise ValueError(f"LinearAG.coefficients {str(path)!r} cannot be read: {error.strerror}") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"LinearAG.coefficients {str(path)!r} is no file written by LinearAG: {error}") from None

    def estimate(self, t: int, cond: torch.Tensor, past_c: torch.Tensor, past_u: torch.Tensor) -> torch.Tensor:
        """u_t [B, ...] from c_t [B, ...] and the past ones [B, k, ...], newest first."""
        b, d = self.cond[t], self.uncond[t]
        estimate = self.intercept[t] + b[0] * wide(cond)
        for k, weight in enumerate(b[1:]):
            estimate = estimate + weight * wide(past_c[:, k])
        for k, weight in enumerate(d):
            estimate = estimate + weight * wide(past_u[:, k])
        return estimate.to(cond.dtype)


def describe(pipe: Any, step: StepInfo, rule: Guidance) -> dict[str, Any]:
    """What coefficients depend on. weights: numbers of sixteen of the model's tensors, which tell two models apart."""
    model = getattr(pipe, step.denoiser)
    parameters = [p for p in model.parameters() if p.numel()]
    config = {k: v for k, v in dict(model.config).items() if not k.startswith("_")}
    chosen = [parameters[i * (len(parameters) - 1) // 15] for i in range(16)]
    return {
        "model": f"{type(model).__name__} {hashlib.sha256(repr(sorted(config.items())).encode()).hexdigest()[:12]}",
        "weights": [number for p in chosen for number in _print(p)],
        "scheduler": type(pipe.scheduler).__name__.removeprefix("Stochastic"),
        "timesteps": [round(float(t), 3) for t in pipe.scheduler.timesteps[-step.num_steps :]],
        "rule": brief(rule),
    }


def _print(parameter: torch.Tensor) -> list[float | None]:
    """Norm of up to 4,096 of a tensor's values, and their mean weighted by position over it. None where it is offloaded."""
    if parameter.is_meta:
        return [None, None]
    flat = parameter.detach().flatten()
    some = flat[:: -(-len(flat) // 4096)].float()
    norm = some.norm()
    ramp = torch.linspace(-1, 1, len(some), device=some.device)
    return [float(norm), float((some * ramp).sum() / norm.clamp_min(1e-12))]


def brief(rule: Guidance) -> str:
    """The rule with those of its options that are not the defaults, so that a new option makes no other rule of it."""

    def text(value: Any) -> str:
        return (
            brief(value) if isinstance(value, Guidance) else f"{value:g}" if isinstance(value, float) else repr(value)
        )

    given = [(f.name, getattr(rule, f.name), f.default) for f in dataclasses.fields(rule) if f.init]
    return (
        f"{type(rule).__name__}({', '.join(f'{k}={text(v)}' for k, v, d in given if k in ('rule', 'scale') or v != d)})"
    )


def _differs(name: str, made_for: Any, found: Any) -> bool:
    if name in ("weights", "timesteps") and isinstance(made_for, list) and len(made_for) == len(found):
        pairs = [(a, b) for a, b in zip(made_for, found) if a is not None and b is not None]
        return any(not math.isclose(a, b, rel_tol=1e-2, abs_tol=1e-2) for a, b in pairs)
    return made_for != found


@register("guidance", "linear_ag", paper="2312.12487")
@dataclass
class LinearAG(Wrapper):
    """The unconditional prediction is evaluated at every `every`-th step and estimated from past predictions at the others.

    until: fraction of the steps after which only the conditional prediction is used. The paper's policy is every = 2,
    until = 0.5: 25 evaluations in 20 steps, where CFG makes 40 (Table 1). warmup: steps at the start that are evaluated in
    any case; the first one always is. Estimates stand in for the past of later ones.

    coefficients: from `fit`, or a file of them; None looks beside the model (<model>/linear_ag/*.json, where `diffgen fit
    linear-ag` puts them). They hold for one model, scheduler, number of steps and inner rule, and are refused for others.
    every = 1, until = 1 is the inner rule bit for bit.
    """

    coefficients: Coefficients | str | None = None
    every: int = 2
    until: float = 0.5
    warmup: int = 1

    def __post_init__(self):
        super().__post_init__()
        valid = self.coefficients is None or isinstance(self.coefficients, (Coefficients, str, Path))
        require(self, "coefficients", valid, "Coefficients, a file of them, or None")
        if isinstance(self.coefficients, (str, Path)):
            self.coefficients = Coefficients.load(self.coefficients)
        for name in ("every", "warmup"):
            require(self, name, whole(getattr(self, name)) and getattr(self, name) >= 1, "a whole number >= 1")
        if any(isinstance(r, LinearAG) for r in self.inside):
            raise ValueError("LinearAG inside LinearAG: there is one unconditional prediction to estimate")
        require(self, "until", real(self.until) and 0 < self.until <= 1, "a fraction of the steps in (0, 1]")

    def with_scale(self, scale: float) -> Guidance:
        return self if scale == self.scale else super().with_scale(scale)

    def _plan(self, step: StepInfo) -> str:
        """What this step does: "cfg", "linear" or "cond"."""
        if step.index < self.warmup:
            return "cfg"
        if step.index >= int(self.until * step.num_steps):
            return "cond"
        if step.index % self.every == 0:
            return "cfg"
        past = step.state.get("linear_u")  # shorter than fitted where a rule around this one left out the first steps
        return "linear" if past is not None and past.shape[1] >= len(self._used.uncond[step.index]) else "cfg"

    def begin(self, pipe, step: StepInfo) -> None:
        super().begin(pipe, step)
        if self.every == 1:
            return
        found = describe(pipe, step, self.inner)
        given = self.coefficients
        self._found = given if isinstance(given, Coefficients) else _beside(pipe, found)
        made_for = self._found.made_for
        for name, value in found.items():
            if _differs(name, made_for.get(name), value):
                if name == "timesteps" and len(value) != len(made_for[name]):
                    name, value, made_for = "number of steps", len(value), {"number of steps": len(made_for[name])}
                raise ValueError(
                    f"LinearAG.coefficients were fitted for another {name}: {made_for.get(name)}; this run has {value}. "
                    "Fit them again: diffgen fit linear-ag, or LinearAG.fitted(pipe, prompts, ...)"
                )

    @property
    def _used(self) -> Coefficients:
        found = getattr(self, "_found", None)
        if found is None:
            raise ValueError(
                "LinearAG cannot stand inside a rule that changes its scale on the way, such as Scheduled; put it outside: "
                "LinearAG(Scheduled(...))"
            )
        return found

    def wants_uncond(self, step: StepInfo) -> torch.Tensor | bool:
        return self.inner.wants_uncond(step) if self._plan(step) == "cfg" else False

    def extra(self, step: StepInfo) -> dict[str, Alter]:
        return {} if self._plan(step) == "cond" else self.inner.extra(step)

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        plan = self._plan(step)
        if plan == "cond":
            for name in ("linear_c", "linear_u"):
                step.state.pop(name, None)
            return cond
        if plan == "linear":
            uncond = self._used.estimate(step.index, cond, step.state["linear_c"], step.state["linear_u"])
        if self.every > 1:
            _remember(step, cond, uncond, max(map(len, self._used.uncond)))
        return self.inner(cond, uncond, step)

    def fitted(
        self,
        pipe: Any,
        prompts: Sequence[str],
        *,
        history: int = 3,
        intercept: bool = False,
        batch_size: int = 16,
        seed: int = 0,
        **call,
    ) -> LinearAG:
        """The rule with coefficients fitted on the inner rule's trajectories for these prompts.

        history K: how many past steps are regressors. call: arguments of the pipeline's call; the coefficients hold for its
        num_inference_steps. Sums of products are kept, trajectories aren't. The paper fits on about 200 prompts.
        """
        return dataclasses.replace(
            self,
            coefficients=fit(
                pipe,
                self.inner,
                prompts,
                history=history,
                intercept=intercept,
                batch_size=batch_size,
                seed=seed,
                **call,
            ),
        )


def _remember(step: StepInfo, cond: torch.Tensor, uncond: torch.Tensor, history: int) -> None:
    """The newest predictions first, in step.state as [B, k, ...]."""
    for name, new in (("linear_c", cond), ("linear_u", uncond)):
        past = step.state.get(name)
        stacked = new[:, None] if past is None else torch.cat([new[:, None], past], 1)
        step.state[name] = stacked[:, :history]


def _beside(pipe: Any, found: dict[str, Any]) -> Coefficients:
    """The coefficients beside the model that fit this run."""
    folder = (
        Path(str(getattr(pipe, "config", {}).get("_name_or_path", ""))) / "linear_ag"
    )  # a modular guider knows none
    known = [Coefficients.load(path) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []
    have = []
    for coefficients in known:
        made_for = coefficients.made_for
        other = [name for name, value in found.items() if _differs(name, made_for[name], value)]
        if not other:
            return coefficients
        have.append(f"{len(made_for['timesteps'])} steps with {made_for['rule']} (other {', '.join(other)})")
    raise ValueError(
        f"LinearAG.coefficients: none given, and none in {folder} for {len(found['timesteps'])} steps of "
        f"{found['scheduler']} with {found['rule']}"
        + (f"; there are {'; '.join(have)}" if have else "")
        + ". Fit them: diffgen fit linear-ag, or LinearAG(rule).fitted(pipe, prompts, num_inference_steps=...)"
    )


@dataclass
class _Collect(Wrapper):
    """Runs the inner rule and adds up, per step, the products of regressors and target."""

    history: int = 3
    intercept: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.sums: dict[int, torch.Tensor] = {}  # step -> Gram matrix of [c_t, c_past, u_past, 1, u_t] in float64
        self.counts: dict[int, int] = {}
        self.made_for: dict[str, Any] = {}

    def begin(self, pipe, step: StepInfo) -> None:
        super().begin(pipe, step)
        self.made_for = describe(pipe, step, self.inner)

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        rows = [cond]
        for name in ("linear_c", "linear_u"):
            rows += step.state[name].unbind(1) if name in step.state else []
        columns = torch.stack([wide(r).flatten() for r in (*rows, torch.ones_like(cond), uncond)])
        gram = (columns @ columns.T).cpu()
        self.sums[step.index] = self.sums.get(step.index, torch.zeros_like(gram)) + gram
        self.counts[step.index] = self.counts.get(step.index, 0) + columns.shape[1]
        _remember(step, cond, uncond, self.history)
        return self.inner(cond, uncond, step)


def fit(
    pipe: Any,
    rule: Guidance,
    prompts: Sequence[str],
    *,
    history: int = 3,
    intercept: bool = False,
    batch_size: int = 16,
    seed: int = 0,
    quiet: bool = False,
    **call,
) -> Coefficients:
    """Least squares of u_t on c_t and the K = history past pairs, at every step of `rule`'s trajectories (see `fitted`)."""
    from tqdm import tqdm

    from diffgen.pipelines.guide import guide, refuse_scale

    if not whole(history) or history < 1:
        raise ValueError(f"history must be a whole number >= 1, got {history!r}")
    refuse_scale(pipe, call)
    collect = _Collect(rule, history=history, intercept=intercept)
    parts = batches(prompts, batch_size)
    for i, batch in enumerate(tqdm(parts, desc="fit", disable=quiet or len(parts) < 3)):
        generators = [generator("fit", seed, i * batch_size + j) for j in range(len(batch))]
        with guide(pipe, collect):
            pipe(batch, generator=generators, output_type="latent", **call)
    if not collect.sums:
        raise ValueError(f"{type(pipe).__name__} ran no guided step at scale {rule.scale:g}: nothing to fit")
    found = [_solve(collect.sums[t], collect.counts[t], intercept) for t in sorted(collect.sums)]
    return Coefficients(
        cond=[f["cond"] for f in found],
        uncond=[f["uncond"] for f in found],
        intercept=[f["intercept"] for f in found],
        r2=[f["r2"] for f in found],
        r2_cond=[f["r2_cond"] for f in found],
        r2_last=[f["r2_last"] for f in found],
        made_for=collect.made_for,
        prompts=len(prompts),
    )


def _solve(gram: torch.Tensor, count: int, intercept: bool) -> dict[str, Any]:
    """Coefficients of one step from the Gram matrix of [c_t, K past c, K past u, 1, u_t]."""
    size = len(gram) - 2
    lags = (size - 1) // 2
    used = [*range(size), *([size] if intercept else [])]
    xx, xy, yy = gram[used][:, used], gram[used, -1], gram[-1, -1]
    ridge = 1e-8 * xx.diagonal().mean() * torch.eye(len(used), dtype=xx.dtype)  # regressors are nearly collinear
    b = torch.linalg.lstsq(xx + ridge, xy, driver="gelsd").solution
    total = (yy - gram[-2, -1] ** 2 / count).clamp_min(1e-300)

    def r2(weights: torch.Tensor, columns: list[int]) -> float:
        residual = yy - 2 * weights @ gram[columns, -1] + weights @ gram[columns][:, columns] @ weights
        return float(1 - residual / total)

    one = torch.ones(1, dtype=b.dtype)
    return {
        "cond": b[: lags + 1].tolist(),
        "uncond": b[lags + 1 : size].tolist(),
        "intercept": float(b[size]) if intercept else 0.0,
        "r2": r2(b, used) if lags else math.nan,
        "r2_cond": r2(one, [0]),
        "r2_last": r2(one, [lags + 1]) if lags else math.nan,
    }
