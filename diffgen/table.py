"""The pipeline table: one row a pipeline class, all that diffgen knows of it.

A new pipeline needs a row only where the defaults of `Row` don't fit; `diffgen.check(pipe)` compares CFG through the tap
with the stock pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

DENOISERS = ("transformer", "transformer_2", "unet")

# Arguments of denoisers that carry the batch. Sliced by name: slicing whatever has the batch's length cuts text tokens
# or image ids as soon as their number happens to equal the batch size.
BATCH_ARGUMENTS = frozenset(
    """sample hidden_states x timestep t encoder_hidden_states cap_feats encoder_attention_mask attention_mask
    encoder_hidden_states_mask pooled_projections guidance class_labels timestep_cond added_cond_kwargs original_size
    target_size crop_coords img_shapes image_embeds encoder_hidden_states_image controlnet_block_samples
    controlnet_single_block_samples block_controlnet_hidden_states down_block_additional_residuals
    mid_block_additional_residual down_intrablock_additional_residuals text_embedding_mask encoder_hidden_states_t5
    text_embedding_mask_t5 image_meta_size style""".split()
)
SAMPLE_ARGUMENTS = ("sample", "hidden_states", "x")
# Lists with one entry a sample. All other lists (ControlNet residuals) hold tensors that carry the batch.
SAMPLE_LISTS = frozenset(["sample", "hidden_states", "x", "cap_feats", "img_shapes"])


def _negate(out: torch.Tensor) -> torch.Tensor:
    return -out


def _negate_frame(out: torch.Tensor) -> torch.Tensor:
    return -out.squeeze(2)


def _match_norm_last(guided: torch.Tensor, cond: torch.Tensor, arguments: dict) -> torch.Tensor:
    return guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def _lumina_norm(guided: torch.Tensor, cond: torch.Tensor, arguments: dict) -> torch.Tensor:
    return _match_norm_last(guided, cond, arguments) if arguments.get("cfg_normalization", True) else guided


def _zimage_norm(guided: torch.Tensor, cond: torch.Tensor, arguments: dict) -> torch.Tensor:
    limit = float(arguments.get("cfg_normalization") or 0.0)
    if limit <= 0:
        return guided
    new, old = (x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1)) for x in (guided, cond))
    return torch.where(new > limit * old, guided * (limit * old / new), guided)


@dataclass(frozen=True)
class Row:
    """What a pipeline does around its denoiser.

    layout: "batched" (one call on [uncond, cond]) or "two_calls" (cond, then uncond). cond_first: order inside a batched
    call. scale: the call argument that switches CFG on and scales it. scale_offset: u + w (c - u) has
    w = argument + offset. needs_negative: CFG is off unless a negative prompt is passed. renorm(guided, cond, arguments):
    what the pipeline does with its guided prediction that looks at cond. post(guided): what it does after that, before
    scheduler.step. learned_variance: the denoiser may predict twice the channels, of which the pipeline drops the second
    half. upcast: it guides in float32, whatever the denoiser's dtype. negated: the denoiser predicts minus what
    the scheduler takes (and post negates it); rules see the scheduler's sign.
    """

    layout: str = "batched"
    cond_first: bool = False
    scale: str = "guidance_scale"
    scale_offset: float = 0.0
    needs_negative: bool = False
    renorm: Callable[[torch.Tensor, torch.Tensor, dict], torch.Tensor] | None = None
    post: Callable[[torch.Tensor], torch.Tensor] | None = None
    learned_variance: bool = False
    upcast: bool = False
    negated: bool = False
    known: bool = True


BATCHED = Row()
TWO_CALLS = Row(layout="two_calls")
TRUE_CFG = Row(layout="two_calls", scale="true_cfg_scale", needs_negative=True)

ROWS: dict[str, Row] = {
    "StableDiffusionPipeline": BATCHED,
    "StableDiffusionXLPipeline": BATCHED,
    "StableDiffusion3Pipeline": BATCHED,
    "LTXPipeline": Row(upcast=True),
    "AuraFlowPipeline": BATCHED,
    "SanaPipeline": Row(upcast=True),
    "PixArtSigmaPipeline": Row(learned_variance=True),
    "FluxPipeline": TRUE_CFG,
    "QwenImagePipeline": Row("two_calls", scale="true_cfg_scale", needs_negative=True, renorm=_match_norm_last),
    "WanPipeline": TWO_CALLS,
    "CogView4Pipeline": TWO_CALLS,
    "Lumina2Pipeline": Row("two_calls", renorm=_lumina_norm, post=_negate, negated=True),
    "ZImagePipeline": Row(
        cond_first=True, scale_offset=1.0, renorm=_zimage_norm, post=_negate_frame, upcast=True, negated=True
    ),
}

UNSUPPORTED = {
    "StableDiffusionInstructPix2PixPipeline": "three branches (text, image, none)",
    "StableDiffusionXLInstructPix2PixPipeline": "three branches (text, image, none)",
    "LEditsPPPipelineStableDiffusion": "one branch an edit",
    "LEditsPPPipelineStableDiffusionXL": "one branch an edit",
    "OmniGenPipeline": "three branches (text, image, none)",
    "StableDiffusionPAGPipeline": "its own perturbed third branch; use the plain pipeline",
    "StableDiffusionXLPAGPipeline": "its own perturbed third branch; use the plain pipeline",
    "StableDiffusion3PAGPipeline": "its own perturbed third branch; use the plain pipeline",
    "LatentConsistencyModelPipeline": "guidance is distilled into the model; it never runs CFG",
}


def denoisers(pipe) -> dict[str, torch.nn.Module]:
    """The pipeline's denoisers by attribute name. Raises ValueError where there is none."""
    modules = ((name, getattr(pipe, name, None)) for name in DENOISERS)
    found = {name: module for name, module in modules if isinstance(module, torch.nn.Module)}
    if not found:
        raise ValueError(
            f"{type(pipe).__name__} has no denoiser: expected a torch module in one of the attributes "
            f"{', '.join(DENOISERS)}; found components {sorted(getattr(pipe, 'components', {}))}"
        )
    return found


def row_for(pipe) -> Row:
    """The row of a pipeline's class, or of its nearest base class; for a class in neither, a guess with known=False.

    The guess: true_cfg_scale if the call has it (then a negative prompt is needed), else guidance_scale. Its layout is
    read off the calls. Raises ValueError for classes that cannot be tapped, with the reason.
    """
    denoisers(pipe)
    for cls in type(pipe).__mro__:
        if cls.__name__ in UNSUPPORTED:
            raise ValueError(f"{cls.__name__} cannot be tapped: {UNSUPPORTED[cls.__name__]}")
        if cls.__name__ in ROWS:
            return ROWS[cls.__name__]
    import inspect

    parameters = inspect.signature(type(pipe).__call__).parameters
    if "true_cfg_scale" in parameters:
        return Row("auto", scale="true_cfg_scale", needs_negative=True, known=False)
    if "guidance_scale" in parameters:
        return Row("auto", known=False)
    raise ValueError(
        f"{type(pipe).__name__} has no guidance_scale or true_cfg_scale argument, so it runs no CFG to intercept; known "
        f"pipelines: {', '.join(ROWS)}"
    )
