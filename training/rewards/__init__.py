"""Rewards: `reward(samples, prompts, **columns) -> Tensor [B]` (or {name: [B]}), one short file a family."""
