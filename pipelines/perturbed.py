"""Rules with another kind of denoiser call: SLG, PAG (arXiv 2403.17377), SEG (2408.00760), AutoGuidance (2406.02507).

The further call is made on the conditional rows, by the denoiser with some of its blocks altered for its duration, or by
another model. `layers` names the blocks: an index counts the transformer blocks in the order of the model's modules
(Flux: the double blocks, then the single ones), a pattern such as "up_blocks.1.*" is matched against their names. By default it
is the middle block of a transformer, and a UNet's mid_block.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from diffgen.names import nearest
from diffgen.pipelines.base import Wrapper, real, require
from diffgen.registry import register
from diffgen.table import denoisers
from diffgen.tap import Alter, StepInfo

Layers = tuple[int | str, ...] | None

# Where a block's outputs stand, (hidden_states, encoder_hidden_states), for those that diffusers' registry lacks.
_OUTPUTS = {
    "SanaTransformerBlock": (None, None),
    "Lumina2TransformerBlock": (None, None),
    "AuraFlowJointTransformerBlock": (1, 0),
    "AuraFlowSingleTransformerBlock": (None, None),
}


def blocks(module: Any) -> dict[str, torch.nn.Module]:
    """The transformer blocks of a denoiser by name, in the order of its modules; refiners of the text are left out."""
    module = getattr(module, "_orig_mod", module)
    module = module.get_base_model() if hasattr(module, "get_base_model") else module
    return {
        name: block
        for name, block in module.named_modules()
        if (type(block).__name__.endswith("TransformerBlock") or _registered(type(block))) and "refiner" not in name
    }


def _registered(cls: type) -> Any:
    """What diffusers knows about a block class, or None."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        return TransformerBlockRegistry.get(cls)
    except ValueError:
        return None


def chosen(module: torch.nn.Module, layers: Layers) -> dict[str, torch.nn.Module]:
    """The blocks that `layers` means. Raises ValueError where it means none."""
    known = blocks(module)
    if not known:
        raise ValueError(f"{type(module).__name__} has no transformer blocks that a rule could alter")
    names = list(known)
    if layers is None:
        found = [name for name in names if name.startswith("mid_block.")] or [names[len(names) // 2]]
        return {name: known[name] for name in found}
    wanted: dict[str, torch.nn.Module] = {}
    for layer in layers:
        if isinstance(layer, int):
            found = names[layer : layer + 1] if 0 <= layer < len(names) else []
            hint = f"it has {len(names)}"
        else:
            found = [name for name in names if fnmatch(name, layer) or name == layer]
            hint = nearest(layer, names)
        if not found:
            raise ValueError(f"layers: {type(module).__name__} has no transformer block {layer!r}: {hint}")
        wanted |= {name: known[name] for name in found}
    return wanted


@contextmanager
def _forward(module: torch.nn.Module, replace: Callable) -> Iterator[None]:
    """module.forward is replace(original, ...) meanwhile."""
    had, original = "forward" in vars(module), module.forward
    module.forward = lambda *args, **kwargs: replace(original, *args, **kwargs)
    try:
        yield
    finally:
        if had:
            module.forward = original
        else:
            del module.forward


def skip_blocks(layers: Layers) -> Alter:
    """The denoiser without these blocks: each hands on what it was given."""

    @contextmanager
    def alter(module):
        with ExitStack() as stack:
            for block in chosen(module, layers).values():
                stack.enter_context(_forward(block, _identity(type(block))))
            yield module

    return alter


def _identity(cls: Any) -> Callable:
    signature = inspect.signature(cls.forward)
    hidden_name = list(signature.parameters)[1]
    if cls.__name__ in _OUTPUTS:
        hidden_index, text_index = _OUTPUTS[cls.__name__]
    else:
        known = _registered(cls)
        if known is None:
            raise ValueError(
                f"{cls.__name__} is not in diffusers' TransformerBlockRegistry, so it is not known how to skip it; "
                "PAG and SEG alter its attention instead"
            )
        hidden_index, text_index = known.return_hidden_states_index, known.return_encoder_hidden_states_index

    def identity(original, *args, **kwargs):
        given = signature.bind(None, *args, **kwargs).arguments
        if text_index is None:
            return given[hidden_name]
        outputs = {hidden_index or 0: given[hidden_name], text_index: given["encoder_hidden_states"]}
        return tuple(outputs[i] for i in sorted(outputs))

    return identity


class _Identity(torch.overrides.TorchFunctionMode):
    """softmax(Q K) V is V, where there is a key for each query."""

    met = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args)) | kwargs
            if given["query"].shape[-2] == given["value"].shape[-2]:
                self.met += 1
                return given["value"]
        return func(*args, **kwargs)


def identity_attention(layers: Layers) -> Alter:
    """Self-attention maps of these blocks replaced by the identity: each token attends to itself, the output is V."""

    @contextmanager
    def alter(module):
        mode = _Identity()

        def attention(original, *args, **kwargs):
            with mode:
                return original(*args, **kwargs)

        with ExitStack() as stack:
            for part in _self_attentions(module, layers):
                stack.enter_context(_forward(part, attention))
            yield module
        if not mode.met:
            raise ValueError(
                f"PAG found no attention map to replace in {type(module).__name__}: its self-attention does not go through "
                "torch's scaled_dot_product_attention (linear attention; flash or xformers kernels)"
            )

    return alter


def blurred_queries(layers: Layers, sigma: float, shape: tuple[int, ...]) -> Alter:
    """Queries of these blocks' self-attention blurred over the image by a Gaussian; sigma = inf: their mean.

    shape: of the latents, [B, C, ..., H, W] or packed [B, N, C]; it gives the tokens' aspect ratio.
    """

    @contextmanager
    def alter(module):
        met = []

        def blurred(original, x):
            met.append(1)
            return blur(original(x), sigma, shape)

        with ExitStack() as stack:
            for part in _self_attentions(module, layers):
                if not isinstance(getattr(part, "to_q", None), torch.nn.Module):
                    raise ValueError(f"{type(part).__name__} has no to_q, so SEG cannot blur its queries")
                stack.enter_context(_forward(part.to_q, blurred))
            yield module
        if not met:
            raise ValueError(
                f"SEG blurred no query in {type(module).__name__}: its attention never calls to_q (fused projections? call "
                "unfuse_qkv_projections())"
            )

    return alter


def blur(query: torch.Tensor, sigma: float, shape: tuple[int, ...]) -> torch.Tensor:
    """Queries [B, N, D] of an image's tokens, row by row, through a Gaussian of sigma tokens (reflected at the edges)."""
    if math.isinf(sigma):
        return query.mean(1, keepdim=True).expand_as(query)
    n = query.shape[1]
    ratio = shape[-2] / shape[-1] if len(shape) > 3 else 1.0
    h = round(math.sqrt(n * ratio))
    w = n // max(h, 1)
    if h * w != n:
        raise ValueError(
            f"SEG.sigma={sigma:g} needs the tokens of one image to blur over, but the {n} tokens of this attention are no "
            f"grid of {shape[-2:]} (text or frames among them?); use sigma=inf, or other layers"
        )
    from torchvision.transforms.v2.functional import gaussian_blur

    size = min(2 * math.ceil(3 * sigma) + 1, 2 * min(h, w) - 1)  # reflection reaches no further
    image = query.transpose(1, 2).unflatten(2, (h, w))
    return gaussian_blur(image, [size, size], [sigma, sigma]).flatten(2).transpose(1, 2)


def _self_attentions(module: torch.nn.Module, layers: Layers) -> list[torch.nn.Module]:
    parts = [
        part
        for block in chosen(module, layers).values()
        for part in block.modules()
        if "Attention" in type(part).__name__
        and hasattr(part, "to_v")
        and not getattr(part, "is_cross_attention", False)
    ]
    if not parts:
        raise ValueError(f"{type(module).__name__}: no self-attention in the blocks {list(chosen(module, layers))}")
    return parts


def _check_layers(rule: Any) -> None:
    """rule.layers as a tuple of indices and patterns, or None."""
    if isinstance(rule.layers, (int, str)):
        rule.layers = (rule.layers,)
    if rule.layers is not None:
        valid = isinstance(rule.layers, (list, tuple)) and len(rule.layers) > 0
        valid = valid and all(isinstance(i, (int, str)) and not isinstance(i, bool) for i in rule.layers)
        require(rule, "layers", valid, "block indices or name patterns")
        rule.layers = tuple(rule.layers)


def _key(rule: Wrapper) -> str:
    """Name of a rule's further evaluation: its class and options, the same for what with_scale makes of it."""
    values = [getattr(rule, f.name) for f in fields(rule) if f.name not in ("rule", "scale")]
    return " ".join([type(rule).__name__, *(str(id(v)) if isinstance(v, torch.nn.Module) else repr(v) for v in values)])


@dataclass
class Perturbed(Wrapper):
    """g = rule + strength (c - c_perturbed) while start <= i / N < stop. Base of SLG, PAG and SEG.

    Works without CFG too: around a scale of 1 the unconditional prediction is left out.
    """

    strength: float = 3.0
    layers: Layers = None
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        require(self, "strength", real(self.strength) and 0 <= self.strength <= 1000, "a number in [0, 1000]")
        valid = real(self.start) and real(self.stop) and 0 <= self.start < self.stop <= 1
        require(self, "start", valid, f"a fraction of the steps below stop={self.stop!r}, both in [0, 1]")
        _check_layers(self)

    def begin(self, pipe, step: StepInfo) -> None:
        n = step.num_steps
        if self.strength and not any(self.start <= i / n < self.stop for i in range(n)):
            raise ValueError(
                f"{type(self).__name__} acts from {self.start:g} to {self.stop:g} of the steps, which are none of {n}: nothing "
                "would be perturbed"
            )
        super().begin(pipe, step)

    @property
    def active(self) -> bool:
        return self.strength > 0 or self.inner.active

    def alter(self, step: StepInfo) -> Alter:
        raise NotImplementedError

    def wants_uncond(self, step: StepInfo) -> torch.Tensor | bool:
        return self.inner.wants_uncond(step) if self.inner.active else False

    def extra(self, step: StepInfo) -> dict[str, Alter]:
        acts = self.strength and self.start <= step.index / step.num_steps < self.stop
        return self.inner.extra(step) | ({_key(self): self.alter(step)} if acts else {})

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        guided = self.inner(cond, uncond, step)
        perturbed = step.extra.get(_key(self))
        return guided if perturbed is None else guided + self.strength * (cond - perturbed)


@register("guidance", "slg")
@dataclass
class SLG(Perturbed):
    """Skip-layer guidance: away from the prediction without some blocks, g = rule + s (c - c_skip). From Stability's SD 3.5.

    Defaults are theirs: s 2.8 in the first fifth of the steps but the very first; layers (7, 8, 9) for SD 3.5 medium.
    """

    strength: float = 2.8
    start: float = 0.01
    stop: float = 0.2

    def alter(self, step: StepInfo) -> Alter:
        return skip_blocks(self.layers)


@register("guidance", "pag", paper="2403.17377")
@dataclass
class PAG(Perturbed):
    """Perturbed-attention guidance: away from what self-attention with identity maps predicts, g = rule + s (c - c_perturbed).

    s = 3 at all steps, in a UNet's mid block, as in the paper (arXiv 2403.17377); diffusers' guider acts from 1% to 20%
    of the steps with s = 2.8.
    """

    def alter(self, step: StepInfo) -> Alter:
        return identity_attention(self.layers)


@register("guidance", "seg", paper="2408.00760")
@dataclass
class SEG(Perturbed):
    """Smoothed-energy guidance: away from what self-attention with blurred queries predicts, g = rule + s (c - c_blurred).

    sigma of the Gaussian in tokens, inf: the queries' mean, and s = 3 at all steps, as in the paper (arXiv 2408.00760).
    """

    sigma: float = math.inf

    def __post_init__(self):
        super().__post_init__()
        require(self, "sigma", (real(self.sigma) or self.sigma == math.inf) and self.sigma > 0, "a number > 0, or inf")

    def alter(self, step: StepInfo) -> Alter:
        return blurred_queries(self.layers, self.sigma, tuple(step.x.shape))


@lru_cache(maxsize=1)
def _load(folder: str, dtype: torch.dtype, device: torch.device, changed: int) -> torch.nn.Module:
    """The denoiser in a folder; changed (the time) is part of the cache's key."""
    from diffusers import AutoModel

    return AutoModel.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True).to(device).eval()


@register("guidance", "autoguidance", paper="2406.02507")
@dataclass
class AutoGuidance(Wrapper):
    """Away from a worse version of the model: the rule with D_bad(c) in the unconditional prediction's place.

    g = bad + w (good - bad), both on the same condition (arXiv 2406.02507); the unconditional prediction isn't evaluated.
    weak: the worse denoiser, smaller or less trained, called with the same arguments, or a folder to load it from. Without
    one, the model itself without the blocks `layers` (diffusers' guider drops blocks too, but on the unconditional batch).
    """

    weak: torch.nn.Module | str | None = None
    layers: Layers = None

    def __post_init__(self):
        super().__post_init__()
        valid = self.weak is None or isinstance(self.weak, (torch.nn.Module, str))
        require(self, "weak", valid, "a torch module, a folder, or None")
        require(self, "layers", self.weak is None or self.layers is None, "left out where weak is given")
        _check_layers(self)
        if any(isinstance(r, AutoGuidance) for r in self.inside):
            raise ValueError("AutoGuidance inside AutoGuidance: the inner one replaces what the outer one gives it")

    def begin(self, pipe, step: StepInfo) -> None:
        others = [name for name, module in denoisers(pipe).items() if module is self.weak and name != step.denoiser]
        if others:
            raise ValueError(
                f"AutoGuidance.weak is the pipeline's own {others[0]}, which runs under the same rule; pass a copy"
            )
        if isinstance(self.weak, str) and not Path(self.weak).is_dir():
            raise ValueError(f"AutoGuidance.weak {self.weak!r}: no such folder")
        super().begin(pipe, step)

    def wants_uncond(self, step: StepInfo) -> torch.Tensor | bool:
        return False

    def extra(self, step: StepInfo) -> dict[str, Alter]:
        if not torch.as_tensor(self.inner.wants_uncond(step)).any():
            return self.inner.extra(step)

        def other(module):
            weak = self.weak
            if isinstance(weak, str):
                changed = max(file.stat().st_mtime_ns for file in Path(weak).iterdir())
                weak = _load(weak, module.dtype, step.x.device, changed)
            if weak.training:
                raise ValueError("AutoGuidance.weak is in train mode, where dropout would act: call .eval() on it")
            return nullcontext(weak)

        return self.inner.extra(step) | {_key(self): skip_blocks(self.layers) if self.weak is None else other}

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, step: StepInfo) -> torch.Tensor:
        return self.inner(cond, step.extra.get(_key(self), cond), step)
