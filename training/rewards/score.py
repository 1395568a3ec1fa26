"""Calls rewards and checks what comes back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch


class RewardError(RuntimeError):
    """A reward raised, or returned something that is no reward; the message names it and the sample."""


def score(
    rewards: dict[str, Callable], samples: Any, prompts: list[str], columns: dict[str, list], on_invalid: str = "error"
) -> dict[str, torch.Tensor]:
    """{name: float32 [B]} of every reward. A reward may return a dict, whose entries become name/key.

    on_invalid "error": NaN or infinity raises RewardError; "skip": it becomes NaN, which later stages take as "does not
    apply".
    """
    scores: dict[str, torch.Tensor] = {}
    for name, reward in rewards.items():
        taken = set(getattr(reward, "keywords", {})) & set(columns)
        if taken:
            raise RewardError(
                f"reward {name!r}: {sorted(taken)} is an option of it and a column of the data; rename the column"
            )
        try:
            # copies: what a reward does to its inputs is nobody else's business
            mine = samples.clone() if isinstance(samples, torch.Tensor) else copy.copy(samples)
            result = reward(mine, list(prompts), **{k: list(v) for k, v in columns.items()})
        except Exception as error:
            raise RewardError(
                f"reward {name!r} raised {type(error).__name__}: {error} (batch of {len(prompts)}, first prompt "
                f"{prompts[0]!r})"
            ) from error
        parts = {f"{name}/{k}": v for k, v in result.items()} if isinstance(result, dict) else {name: result}
        for key, value in parts.items():
            scores[key] = _checked(key, value, prompts, on_invalid)
    return scores


def _checked(name: str, value: Any, prompts: list[str], on_invalid: str) -> torch.Tensor:
    try:
        value = torch.as_tensor(value, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(
            f"reward {name!r} must return {len(prompts)} numbers, got {type(value).__name__}: {error}"
        ) from None
    if value.shape != (len(prompts),):
        raise RewardError(f"reward {name!r} must return one number a sample, [{len(prompts)}], got {list(value.shape)}")
    bad = ~value.isfinite()
    if bad.any() and on_invalid == "error":
        i = int(bad.nonzero()[0])
        raise RewardError(
            f"reward {name!r} returned {value[i].item()} for sample {i} (prompt {prompts[i]!r}), {int(bad.sum())} of "
            f"{len(prompts)} in all; set on_invalid_reward: skip to leave such samples out"
        )
    return torch.where(bad, torch.nan, value)
