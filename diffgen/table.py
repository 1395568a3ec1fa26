"""The pipeline table: one row a pipeline class, all that diffgen knows of it.

A new pipeline needs a row only where the defaults of `Row` don't fit; `diffgen.check(pipe)` compares CFG through the tap
with the stock pipeline.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

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
    text_embedding_mask_t5 image_meta_size style control_hidden_states additional_t_cond video_coords text_bth text_lens
    text_encoder_layers prior_token_id prior_token_drop context_latents ip_adapter_image_embeds ip_hidden_states""".split()
)
CONTAINERS = frozenset(
    ["joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs"]
)  # may hold some of them
SAMPLE_ARGUMENTS = ("sample", "hidden_states", "x")
# Lists with one entry a sample. All other lists (ControlNet residuals) hold tensors that carry the batch.
SAMPLE_LISTS = frozenset(["sample", "hidden_states", "x", "cap_feats", "img_shapes"])


def _negate(out: torch.Tensor, call: dict) -> torch.Tensor:
    return -out


def _negate_frame(out: torch.Tensor, call: dict) -> torch.Tensor:
    return -out.squeeze(2)


def _drop_first(out: torch.Tensor, call: dict) -> torch.Tensor:
    return out[:, 1:]


def _drop_first_frame(out: torch.Tensor, call: dict) -> torch.Tensor:
    return out[:, :, 1:]


def _unpack_and_drop_first_frame(out: torch.Tensor, call: dict) -> torch.Tensor:
    size = [call[name] for name in ("num_frames", "height", "width")]
    return out.unflatten(1, size).permute(0, 4, 1, 2, 3)[:, :, 1:]


def _first_ids(call: dict) -> int:
    """Tokens whose position begins like the first one's; those of reference images begin otherwise."""
    ids = call["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    return int((ids[:, 0] == ids[0, 0]).sum())


def _first_shape(call: dict) -> int:
    return math.prod(call["img_shapes"][0][0])


def _all_but_last_shape(call: dict) -> int:
    return sum(map(math.prod, call["img_shapes"][0][:-1]))


def _match_norm_last(guided: torch.Tensor, cond: torch.Tensor, arguments: dict) -> torch.Tensor:
    norm = guided.norm(dim=-1, keepdim=True)
    if not norm.all():  # the pipeline would divide 0 by 0
        raise ValueError(
            "the pipeline scales each token of the guided prediction to the conditional one's norm, which a prediction of "
            "zero has no answer to; with CFG-Zero*: ZeroStar(rule, zero_steps=0)"
        )
    return guided * (cond.norm(dim=-1, keepdim=True) / norm)


def _lumina_norm(guided: torch.Tensor, cond: torch.Tensor, arguments: dict) -> torch.Tensor:
    return _match_norm_last(guided, cond, arguments) if arguments.get("cfg_normalization", True) else guided


def _layered_norm(guided: torch.Tensor, cond: torch.Tensor, arguments: dict) -> torch.Tensor:
    return _match_norm_last(guided, cond, arguments) if arguments.get("cfg_normalize", False) else guided


def _longcat_norm(guided: torch.Tensor, cond: torch.Tensor, arguments: dict) -> torch.Tensor:
    if not arguments.get("enable_cfg_renorm", True):
        return guided
    ratio = cond.norm(dim=-1, keepdim=True) / (guided.norm(dim=-1, keepdim=True) + 1e-8)
    return guided * ratio.clamp(arguments.get("cfg_renorm_min", 0.0), 1.0)


def _joy_norm(guided: torch.Tensor, cond: torch.Tensor, arguments: dict) -> torch.Tensor:
    return guided * (cond.norm(dim=2, keepdim=True) / guided.norm(dim=2, keepdim=True).clamp_min(1e-6))


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
    what the pipeline does with its guided prediction that looks at cond. post(guided, call): what it does after that,
    before scheduler.step; call: the denoiser's arguments. learned_variance: the denoiser may predict twice the channels,
    of which the pipeline drops the second half ("scheduler": unless the scheduler takes it). tokens(call): how many of the
    denoiser's tokens are the latents'; reference images follow, whose predictions the pipeline drops. upcast: it guides in
    float32, whatever the denoiser's dtype. negated: the denoiser predicts minus what the scheduler takes (and post negates
    it); rules see the scheduler's sign.
    """

    layout: str = "batched"
    cond_first: bool = False
    scale: str = "guidance_scale"
    scale_offset: float = 0.0
    needs_negative: bool = False
    renorm: Callable[[torch.Tensor, torch.Tensor, dict], torch.Tensor] | None = None
    post: Callable[[torch.Tensor, dict], torch.Tensor] | None = None
    learned_variance: bool | str = False
    tokens: Callable[[dict], int] | None = None
    upcast: bool = False
    negated: bool = False
    known: bool = True


BATCHED = Row()
TWO_CALLS = Row(layout="two_calls")
TRUE_CFG = Row(layout="two_calls", scale="true_cfg_scale", needs_negative=True)


def _classes(names: str) -> list[str]:
    """Pipeline classes; "Wan{,VideoToVideo}" stands for WanPipeline and WanVideoToVideoPipeline."""
    found = re.findall(r"([^\s{}]+)(?:{([^\s{}]*)}(\w*))?", names)
    return [f"{head}{middle}{tail}Pipeline" for head, choices, tail in found for middle in choices.split(",")]


_QWEN = replace(TRUE_CFG, renorm=_match_norm_last)
_ZIMAGE = Row(cond_first=True, scale_offset=1.0, renorm=_zimage_norm, post=_negate_frame, upcast=True, negated=True)
_SETS: list[tuple[str, Row]] = [
    (
        """StableDiffusion{,Img2Img,Inpaint,Depth2Img,Upscale,ImageVariation,Adapter,LDM3D}
        StableDiffusionControlNet{,Img2Img,Inpaint} StableUnCLIP{,Img2Img}
        StableDiffusionXL{,Img2Img,Inpaint,Adapter} StableDiffusionXLControlNet{,Img2Img,Inpaint}
        StableDiffusionXLControlNetUnion{,Img2Img,Inpaint} Kolors{,Img2Img}
        StableDiffusion3{,Img2Img,Inpaint,ControlNet,ControlNetInpainting}
        AnimateDiff{,ControlNet,SDXL,SparseControlNet,VideoToVideo,VideoToVideoControlNet} AuraFlow Allegro PRX
        BriaFibo ErnieImage""",
        BATCHED,
    ),
    ("LTX CogVideoX{,ImageToVideo,VideoToVideo,FunControl} CogView3Plus", Row(upcast=True)),
    ("Mochi", Row(upcast=True, negated=True)),  # its scheduler goes from noise at 0 to data at 1 and takes x0 - eps
    ("Sana{,ControlNet,Video}", Row(upcast=True, learned_variance=True)),
    ("LTXImageToVideo", Row(upcast=True, post=_unpack_and_drop_first_frame)),
    ("SanaImageToVideo", Row(upcast=True, learned_variance=True, post=_drop_first_frame)),
    ("LTXCondition", Row(post=_negate)),  # its scheduler counts time backwards here
    ("PixArt{Sigma,Alpha} HunyuanDiT{,ControlNet}", Row(learned_variance=True)),
    (
        """Latte IF{,Img2Img,Inpainting} Kandinsky{,Img2Img,Inpaint}
        KandinskyV22{,Img2Img,Inpaint,Controlnet,ControlnetImg2Img}""",
        Row(learned_variance="scheduler"),
    ),
    ("Kandinsky3{,Img2Img}", Row(scale_offset=1.0)),
    ("BriaFiboEdit", Row(tokens=_first_ids)),
    ("ZImage{,Img2Img,Inpaint,ControlNet,ControlNetInpaint}", _ZIMAGE),
    (
        """Wan{,ImageToVideo,VideoToVideo,VACE} LucyEdit ChronoEdit SkyReelsV2{,ImageToVideo} Chroma{,Img2Img,Inpaint}
        CogView4{,Control} OvisImage Kandinsky5{T2V,T2I,I2I}""",
        TWO_CALLS,
    ),
    ("BriaFibo2 GlmImage", replace(TWO_CALLS, upcast=True)),
    ("Krea2", replace(TWO_CALLS, scale_offset=1.0)),
    ("Kandinsky5I2V", replace(TWO_CALLS, post=_drop_first)),
    ("JoyImageEdit", replace(TWO_CALLS, renorm=_joy_norm)),
    ("LongCatImage", replace(TWO_CALLS, renorm=_longcat_norm)),
    ("LongCatImageEdit Flux2Klein{,Inpaint}", replace(TWO_CALLS, tokens=_first_ids)),
    ("Lumina2", replace(TWO_CALLS, renorm=_lumina_norm, post=_negate, negated=True)),
    ("NucleusMoEImage", replace(TWO_CALLS, renorm=_match_norm_last, post=_negate, negated=True)),
    ("Flux{,Img2Img,Inpaint,ControlNet} HunyuanVideo{,ImageToVideo} HunyuanSkyreelsImageToVideo", TRUE_CFG),
    ("FluxKontext{,Inpaint}", replace(TRUE_CFG, tokens=_first_ids)),
    ("QwenImage{,Img2Img,Inpaint,ControlNet,ControlNetInpaint}", _QWEN),
    ("QwenImageEdit{,Plus,Inpaint}", replace(_QWEN, tokens=_first_shape)),
    ("QwenImageLayered", replace(TRUE_CFG, renorm=_layered_norm, tokens=_all_but_last_shape)),
]
ROWS = {name: row for names, row in _SETS for name in _classes(names)}

# Rows read off the pipelines' source: no test runs these classes, so `guide` says that `check` can.
FROM_SOURCE = frozenset(
    _classes("""StableDiffusion{Depth2Img,Upscale,ImageVariation,LDM3D} StableUnCLIP{,Img2Img} StableDiffusionXLAdapter
    StableDiffusionXLControlNetUnion{,Img2Img,Inpaint} Kolors{,Img2Img} PRX Allegro BriaFibo ErnieImage Mochi CogView3Plus
    AnimateDiff{ControlNet,SDXL,SparseControlNet,VideoToVideo,VideoToVideoControlNet} CogVideoX{VideoToVideo,FunControl}
    Sana{Video,ImageToVideo} HunyuanDiT{,ControlNet} Latte IF{,Img2Img,Inpainting} Kandinsky{,Img2Img,Inpaint}
    KandinskyV22{Img2Img,Inpaint,Controlnet,ControlnetImg2Img} Kandinsky3{,Img2Img} BriaFiboEdit
    ZImage{ControlNet,ControlNetInpaint} LucyEdit ChronoEdit SkyReelsV2{,ImageToVideo} OvisImage Kandinsky5{T2V,T2I,I2I,I2V}
    BriaFibo2 GlmImage Krea2 JoyImageEdit LongCatImage{,Edit} Flux2Klein{,Inpaint} NucleusMoEImage
    HunyuanVideo{,ImageToVideo} HunyuanSkyreelsImageToVideo QwenImageLayered""")
)

_PAG = "its own perturbed third branch; use the plain pipeline with the PAG rule"
_EMBEDDED = "its guidance is embedded in the model (a distilled scale); it never runs CFG"
_GUIDER = "its guider component makes the calls; set pipe.guider instead"
_SEGMENTS = "it goes through the schedule several times in one call"
_OUTSIDE = "it converts the prediction with the latents before or after guidance, outside of the denoiser"
_TWO = "it guides several modalities (video, sound) at once"
_MORE = "further denoiser calls for its edits, which are not the two branches of CFG"
_REASONS: list[tuple[str, str]] = [
    ("StableDiffusion{,XL}InstructPix2Pix OmniGen DreamLite", "three branches (text, image, none)"),
    (
        """StableDiffusion{,3,XL}PAG StableDiffusion{,3,XL}PAGImg2Img StableDiffusion{,XL}PAGInpaint AnimateDiffPAG
        StableDiffusionControlNetPAG{,Inpaint} StableDiffusionXLControlNetPAG{,Img2Img} HunyuanDiTPAG KolorsPAG
        PixArtSigmaPAG SanaPAG""",
        _PAG,
    ),
    (
        """LatentConsistencyModel{,Img2Img} SanaSprint{,Img2Img} Flux2{,KleinKV} FluxFill FluxControl{,Img2Img,Inpaint}
        FluxControlNet{Img2Img,Inpaint} VisualCloze{,Generation} DreamLiteMobile""",
        _EMBEDDED,
    ),
    ("HunyuanImage{,Refiner} HunyuanVideo15{,ImageToVideo} MotifVideo{,Image2Video}", _GUIDER),
    (
        """HunyuanVideoFramepack Helios{,Pyramid} SkyReelsV2DiffusionForcing{,ImageToVideo,VideoToVideo} WanAnimate
        AnyFlowFAR LTXI2VLongMultiPrompt SanaWM StableDiffusionPanorama TextToVideoZero{,SDXL}""",
        _SEGMENTS,
    ),
    ("Cosmos{2TextToImage,2VideoToWorld,2_5_PredictBase,2_5_Transfer} Cosmos{TextTo,VideoTo}World", _OUTSIDE),
    ("PRXPixel StableDiffusionLatentUpscale IF{,Img2Img,Inpainting}SuperResolution", _OUTSIDE),
    ("LTX2{,Condition,HDR,ImageToVideo,InContext} Cosmos3Omni Kandinsky6TI2VA", _TWO),
    (
        """StableDiffusion{SAG,GLIGENTextImage,AttendAndExcite,Pix2PixZero,DiffEdit,Paradigms} CycleDiffusion
        SemanticStableDiffusion""",
        _MORE,
    ),
    (
        "Kandinsky{,Img2Img,Inpaint}Combined KandinskyV22{,Img2Img,Inpaint}Combined",
        "several pipelines in one; guide its decoder_pipe",
    ),
    ("HiDreamImage", "its text features carry the batch in their second dimension"),
    ("ZImageOmni JoyImageEditPlus", "its latents stand between reference images, in nested lists"),
    ("UniDiffuser", _TWO),
    ("AceStep", "its guidance is an APG of its own, which hands over no plain CFG"),
    ("DiT", "it hands both halves of the batch to scheduler.step"),
    ("Lumina", "it guides three of its channels only"),
    ("Ideogram4", "its unconditional predictions come from a model of their own"),
    ("QwenImage21", "the latents' tokens follow those of the reference images"),
    ("StableVideoDiffusion", "its scale differs from frame to frame"),
    ("Amused{,Img2Img,Inpaint} VQDiffusion", "it samples discrete tokens"),
]
UNSUPPORTED: dict[str, str] = {
    "LEditsPPPipelineStableDiffusion": "one branch an edit",
    "LEditsPPPipelineStableDiffusionXL": "one branch an edit",
    "StableDiffusionPipelineSafe": "a third branch for its safety guidance",
} | {name: reason for names, reason in _REASONS for name in _classes(names)}


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
    """The row of a pipeline's class (`row_of`). Raises ValueError where it has no denoiser or cannot be tapped."""
    denoisers(pipe)
    return row_of(type(pipe))


def row_of(pipeline: type) -> Row:
    """The row of a pipeline class, or of its nearest base class; for a class in neither, a guess with known=False.

    The guess: true_cfg_scale if the call has it (then a negative prompt is needed), else guidance_scale. Its layout is
    read off the calls. Raises ValueError for classes that cannot be tapped, with the reason.
    """
    for cls in pipeline.__mro__:
        if cls.__name__ in UNSUPPORTED:
            raise ValueError(f"{cls.__name__} cannot be tapped: {UNSUPPORTED[cls.__name__]}")
        if cls.__name__ in ROWS:
            return ROWS[cls.__name__]
    import inspect

    parameters = inspect.signature(pipeline.__call__).parameters
    if "true_cfg_scale" in parameters:
        return Row("auto", scale="true_cfg_scale", needs_negative=True, known=False)
    if "guidance_scale" in parameters:
        return Row("auto", known=False)
    raise ValueError(
        f"{pipeline.__name__} has no guidance_scale or true_cfg_scale argument, so it runs no CFG to intercept; the pipelines "
        "that are known stand in diffgen/table.py"
    )
