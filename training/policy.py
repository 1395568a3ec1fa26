"""DiffusionPolicy: a diffusers pipeline that rolls out with log-probs, and evaluates its actions with gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffgen import samplers
from diffgen.grid import to_uint8
from diffgen.names import nearest
from diffgen.pipelines.guide import apply_rule, bind, tap
from diffgen.schedulers import Transition, stochastic
from diffgen.seeding import generator
from diffgen.table import denoisers, row_for
from diffgen.tap import Recorded
from diffgen.training.config import Lora
from diffgen.training.rollout import Evaluation, Rollout


@dataclass
class _Chunk:
    """One pipeline call: rows first..last of the rollout, its recorded denoiser calls and scheduler steps."""

    first: int
    size: int
    recorded: list[Recorded]
    transitions: list[Transition]


class DiffusionPolicy:
    """A pipeline whose denoiser is trained, whole or by LoRA; everything else is frozen.

    Fully fine-tuned weights are float32; where the pipeline's dtype is another, the denoiser runs under autocast to it.

    call: arguments of every pipeline call (height, width, max_sequence_length ...). Trainable parameters are float32.
    """

    has = frozenset({"gaussian", "reference"})  # what methods may need of a policy

    def __init__(
        self, pipe, *, lora: Lora | None = None, call: dict | None = None, gradient_checkpointing: bool = False
    ):
        self.pipe, self.row, self.call = pipe, row_for(pipe), dict(call or {})
        self.modules: dict[str, Any] = dict(denoisers(pipe))
        self.lora = lora
        dtype = next(next(iter(self.modules.values())).parameters()).dtype
        self.autocast = dtype if lora is None and dtype != torch.float32 else None
        self._check_call()
        if lora is not None and not hasattr(pipe, "save_lora_weights"):
            raise ValueError(
                f"lora: {type(pipe).__name__} can't load or save LoRA weights; `lora: null` trains the whole denoiser"
            )
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False)
        for name, module in self.modules.items():
            if lora is None:
                module.requires_grad_(True).float()
            else:
                self._add_adapter(name, module, lora)
            if gradient_checkpointing:
                module.enable_gradient_checkpointing()
        self.base: Any = None  # the weights at the start, a list of tensors, where full fine-tuning needs a reference

    def _check_call(self) -> None:
        import inspect

        parameters = inspect.signature(type(self.pipe).__call__).parameters
        ours = ("prompt", "num_inference_steps", "generator", "latents", "output_type", "return_dict", self.row.scale)
        for name in self.call:
            if name in ours or name.startswith("num_images_per"):
                raise ValueError(
                    f"rollout.call.{name}: set by the trainer (prompts, steps, guidance have keys of their own)"
                )
            if name not in parameters:
                raise ValueError(
                    f"rollout.call.{name}: {type(self.pipe).__name__} has no such argument; {nearest(name, parameters)}"
                )

    def _add_adapter(self, name: str, module, lora: Lora) -> None:
        from peft import LoraConfig

        leaves = {n for n, m in module.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
        suffixes = {".".join(n.split(".")[-k:]) for n in leaves for k in (1, 2)}
        if not any(t in suffixes or any(n.endswith("." + t) for n in leaves) for t in lora.target_modules):
            raise ValueError(
                f"lora.target_modules: none of {lora.target_modules} is a layer of {name}; "
                f"{nearest(lora.target_modules[0], suffixes)}"
            )
        weights = "gaussian" if lora.init == "gaussian" else True
        module.add_adapter(
            LoraConfig(
                r=lora.rank, lora_alpha=lora.alpha, init_lora_weights=weights, target_modules=list(lora.target_modules)
            )
        )
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Trainable parameters by name."""
        return {
            f"{name}.{key}": p
            for name, module in self.modules.items()
            for key, p in module.named_parameters()
            if p.requires_grad
        }

    def _precision(self):
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    @property
    def device(self) -> torch.device:
        return next(next(iter(self.modules.values())).parameters()).device

    # --- sampling ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rollout(
        self,
        prompts: list[str],
        group: torch.Tensor,
        seeds: list[tuple],
        *,
        num_inference_steps: int,
        guidance=None,
        noise_level: float | None = None,
        window: tuple[int, int] | None = None,
        share_initial_noise: bool = False,
        batch_size: int = 64,
    ) -> Rollout:
        """Samples with stochastic steps in `window` (default all but the last, whose tiny std would rule the loss).

        group int64 [B]; seeds: one tuple of parts a sample, of which all but the last are its group's. With
        share_initial_noise a group starts from one x_T, and what it has in common is computed once.
        """
        window = window or (0, max(1, num_inference_steps - 1))
        chunks, images = [], []
        scheduler = self.pipe.scheduler
        try:
            self.pipe.scheduler = stochastic(scheduler, window=window, noise_level=noise_level)
            for first in range(0, len(prompts), batch_size):
                rows = slice(first, first + batch_size)
                out, chunk = self._sample(
                    prompts[rows], group[rows], seeds[rows], num_inference_steps, guidance, window, share_initial_noise
                )
                chunk.first = first
                chunks.append(chunk)
                images.append(out)
        finally:
            self.pipe.scheduler = scheduler
        logp = torch.cat([torch.stack([t.logp.cpu() for t in c.transitions], 1) for c in chunks])
        return Rollout(
            list(prompts), group, torch.cat(images), logp, torch.ones_like(logp, dtype=torch.bool), replay=chunks
        )

    def _sample(self, prompts, group, seeds, steps, guidance, window, shared) -> tuple[torch.Tensor, _Chunk]:
        scheduler = self.pipe.scheduler
        scheduler.noise = lambda step, like: torch.stack(
            [torch.randn(like.shape[1:], generator=generator(*seed, "step", step)) for seed in seeds]
        ).to(like.device)
        first_of_group = {int(g): i for i, g in reversed(list(enumerate(group)))}
        share = torch.tensor([first_of_group[int(g)] for g in group]) if shared else None
        starts = [seed[:-1] if shared else seed for seed in seeds]
        rule, arguments = self._arguments(prompts, guidance, starts, steps)
        with (
            scheduler.recording() as transitions,
            tap(
                self.pipe,
                rule,
                self.row,
                arguments,
                record=lambda i: window[0] <= i < window[1],
                share=share,
                share_until=window[0],
            ) as opened,
            self._precision(),
        ):
            images = to_uint8(self.pipe(**arguments)[0])
        if len(transitions) != len(opened.recorded):
            raise RuntimeError(
                f"{len(opened.recorded)} denoiser steps, but {len(transitions)} scheduler steps were recorded"
            )
        return images, _Chunk(0, len(prompts), opened.recorded, transitions)

    def _arguments(self, prompts, guidance, starts, steps):
        given = {"prompt": list(prompts), "num_inference_steps": steps, "output_type": "pt", **self.call}
        given["generator"] = [generator(*start, "init") for start in starts]
        return apply_rule(self.row, guidance, bind(type(self.pipe), (), given))

    @torch.no_grad()
    def sample(
        self, prompts: list[str], seeds: list[tuple], *, num_inference_steps: int, guidance=None, batch_size: int = 64
    ) -> torch.Tensor:
        """Images uint8 [B, 3, H, W] (videos [B, F, 3, H, W]) with the pipeline's own scheduler, without recording."""
        images = []
        for first in range(0, len(prompts), batch_size):
            rows = slice(first, first + batch_size)
            rule, arguments = self._arguments(prompts[rows], guidance, seeds[rows], num_inference_steps)
            with tap(self.pipe, rule, self.row, arguments), self._precision():
                images.append(to_uint8(self.pipe(**arguments)[0]))
        return torch.cat(images)

    # --- training ---------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        rollout: Rollout,
        rows: torch.Tensor,
        actions: torch.Tensor,
        *,
        grad_uncond: bool = False,
        reference: bool = False,
    ) -> Evaluation:
        """Log-probs [b, t] of a rollout's samples `rows` and denoising steps `actions` under the current weights.

        reference: also the steps of the frozen reference (LoRA off, or the weights at the start), without gradients.
        """
        parts, order = [], []
        for chunk in rollout.replay:
            mine = (rows >= chunk.first) & (rows < chunk.first + chunk.size)
            if mine.any():
                local = rows[mine] - chunk.first
                whole = len(local) == chunk.size and bool((local == torch.arange(chunk.size)).all())
                parts.append(self._evaluate(chunk, None if whole else local, actions, grad_uncond, reference))
                order.append(mine.nonzero().flatten())
        if len(parts) == 1:
            return parts[0]
        inverse = torch.cat(order).argsort().to(parts[0].logp.device)
        logp = torch.cat([p.logp for p in parts])[inverse]
        return Evaluation(logp, _join([p.steps for p in parts], inverse), _join([p.reference for p in parts], inverse))

    def _evaluate(self, chunk: _Chunk, rows, actions, grad_uncond: bool, reference: bool) -> Evaluation:
        logps, steps, references = [], [], []
        for i in actions.tolist():
            recorded, transition = chunk.recorded[i], chunk.transitions[i]
            select = slice(None) if rows is None else rows.to(transition.x.device)
            with self._precision():
                out = recorded.replay(rows, grad_uncond=grad_uncond)
            step = transition.remake(out, select)
            logps.append(samplers.log_prob(transition.x_next[select], step))
            steps.append(step)
            if reference:
                with torch.no_grad(), self.reference(), self._precision():
                    references.append(transition.remake(recorded.replay(rows, grad_uncond=grad_uncond), select))
        return Evaluation(torch.stack(logps, 1), steps, references if reference else None)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The reference policy inside the block: LoRA off; after full fine-tuning, the weights that it started from."""
        if self.lora is not None:
            for module in self.modules.values():
                module.disable_adapters()
            try:
                yield
            finally:
                for module in self.modules.values():
                    module.enable_adapters()
            return
        if self.base is None:
            raise RuntimeError("keep_reference() must be called before full fine-tuning starts")
        with swapped(self.named_parameters().values(), self.base):
            yield

    def keep_reference(self) -> None:
        """Keeps a copy of the weights as the reference of full fine-tuning; LoRA needs none."""
        if self.lora is None and self.base is None:
            self.base = [p.detach().clone() for p in self.named_parameters().values()]

    # --- saving -----------------------------------------------------------------------------------------------------

    def save(self, folder) -> None:
        """LoRA in the format of load_lora_weights; a fully fine-tuned pipeline by save_pretrained."""
        if self.lora is None:
            self.pipe.save_pretrained(folder)
            return
        from peft.utils import get_peft_model_state_dict

        # a second expert's weights: load_lora_weights(folder / "transformer_2", load_into_transformer_2=True)
        for name, module in self.modules.items():
            slot = "unet" if name == "unet" else "transformer"
            type(self.pipe).save_lora_weights(
                save_directory=folder if name == slot else Path(folder) / name,
                **{
                    f"{slot}_lora_layers": get_peft_model_state_dict(module),
                    f"{slot}_lora_adapter_metadata": module.peft_config["default"].to_dict(),
                },
            )


@contextlib.contextmanager
def swapped(params, values) -> Iterator[None]:
    """The parameters hold `values` inside the block."""
    params = [p.data for p in params]
    before = [p.clone() for p in params]
    torch._foreach_copy_(params, list(values))
    try:
        yield
    finally:
        torch._foreach_copy_(params, before)


def _join(parts: list, inverse: torch.Tensor):
    """Steps of several chunks -> steps of all their rows, in the asked order."""
    if parts[0] is None:
        return None
    return [samplers.Step(torch.cat([s.mean for s in same])[inverse], same[0].std, same[0].dt) for same in zip(*parts)]
