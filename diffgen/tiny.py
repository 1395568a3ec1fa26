"""Tiny copies of real diffusers pipelines with random weights, built in code: no files, no downloads.

Each one is the pipeline class of the library itself with the schedulers and the layout of the published checkpoints
(packed latents, list inputs, learned sigmas, ...), only with widths of 8 to 64. They serve conformance tests and
dry-runs: everything that depends on how a pipeline calls its denoiser shows on them in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_LIST = (
    "a an the of and in on with to is photo image red green blue yellow purple cyan white black circle circles square "
    "squares triangle triangles cross crosses two three left right above below small large dark background system user "
    "assistant think describe by detailing color shape size texture quantity text spatial relationships objects you "
    "are designed generate superior images degree alignment based textual prompts or prompt start"
)
WORDS = _LIST.split()
DIM = 32  # width of every text encoder
TOKENS = 16  # padded length of a text


def tiny_pipeline(name: str, seed: int = 0, **variants: Any) -> DiffusionPipeline:
    """The tiny pipeline of class `name`, on the CPU in float32 and in eval mode; the same weights for the same seed.

    variants: StableDiffusionPipeline prediction_type ("epsilon", "v_prediction"); StableDiffusion3Pipeline t5 (bool);
    FluxPipeline guidance_embeds (bool); WanPipeline two_experts (bool) and scheduler ("unipc", "euler");
    SanaPipeline scheduler ("dpm", "euler").

    All survive save_pretrained and from_pretrained; without T5 the latter needs text_encoder_3=None, tokenizer_3=None.
    """
    import torch

    if name not in TINY:
        raise KeyError(f"no tiny pipeline {name!r}; there are {', '.join(TINY)}")
    with torch.random.fork_rng(devices=[]):  # the default generator is the CPU's; CUDA states stay untouched
        torch.default_generator.manual_seed(seed)
        pipe = TINY[name](**variants)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_kwargs(name: str) -> dict[str, Any]:
    """The smallest arguments of the call: latents of 8x8 or less (Sana 16x16), two latent frames for video.

    FluxPipeline and QwenImagePipeline guide only when a negative prompt is passed, which is left to the caller.
    """
    size: dict[str, Any] = {"height": 16, "width": 16}
    text = {"max_sequence_length": TOKENS}
    return {
        "StableDiffusionPipeline": size,
        "StableDiffusionXLPipeline": size,
        "StableDiffusion3Pipeline": size | text,
        "FluxPipeline": size | text,
        "WanPipeline": {"height": 32, "width": 32, "num_frames": 5} | text,
        "LTXPipeline": {"height": 32, "width": 32, "num_frames": 5} | text,
        "SanaPipeline": {"height": 32, "width": 32, "use_resolution_binning": False, "complex_human_instruction": None}
        | text,
        "PixArtSigmaPipeline": size | text | {"use_resolution_binning": False, "clean_caption": False},
        "Lumina2Pipeline": {"height": 32, "width": 32, "system_prompt": ""} | text,
        "QwenImagePipeline": size | text,
        "ZImagePipeline": size | {"max_sequence_length": 32},  # 8 of them are the chat template
        "AuraFlowPipeline": size | text,
        "CogView4Pipeline": size | text,
    }[name]


# Sizes read better several to a line.
# fmt: off
# ---------------------------------------------------------------------------------------------------- text


def _clip_tokenizer():
    """Byte-level BPE; the words of WORDS are single tokens, every other word falls apart into its letters."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges, pieces = [], letters + [letter + "</w>" for letter in letters]
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
            pieces.append(parts[0])
    merges = list(dict.fromkeys(merges))
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))}
    end = "<|endoftext|>"
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16, unk_token=end, pad_token=end)


def _tokenizer(prefix: str = "", suffix: str = "", padding_side: str = "right", chat: bool = False):
    """WordPiece: the words of WORDS are single tokens, every other word is spelled, so all prompts stay distinct.

    prefix and suffix: special tokens around the text, e.g. "</s>" behind it for T5. A newline and each punctuation
    mark are tokens, so the template of Qwen-Image takes 34 of them before the prompt, as with the real tokenizer.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", "<bos>", "[gMASK]", "<sop>", "<|im_start|>", "<|im_end|>"]
    letters = [chr(i) for i in range(33, 127)]
    pieces = dict.fromkeys([*special, "\n", *letters, *("##" + letter for letter in letters), *WORDS])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.WordPiece(vocab, unk_token="<unk>", max_input_chars_per_word=1000))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    frame = [token for token in special if token in prefix + suffix]
    core.post_processor = processors.TemplateProcessing(
        single=f"{prefix} $A {suffix}".strip(), special_tokens=[(token, vocab[token]) for token in frame]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=special[3:], padding_side=padding_side,
        model_input_names=["input_ids", "attention_mask"], model_max_length=1024,
    )
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
    return tokenizer


def _clip(tokenizer, projection: bool = False):
    """CLIP text model [B, 16] -> [B, 16, DIM], with a projection to a pooled [B, DIM] if asked."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=DIM, projection_dim=DIM, intermediate_size=DIM, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _lively((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def _t5(tokenizer, multilingual: bool = False, width: int = DIM):
    """T5 encoder (UMT5 if multilingual) [B, T] -> [B, T, width]."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    config, model = (UMT5Config, UMT5EncoderModel) if multilingual else (T5Config, T5EncoderModel)
    shape = {"d_model": width, "d_ff": DIM, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    return _lively(model(config(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, **shape)))


def _decoder_config(tokenizer, **extra) -> dict[str, Any]:
    """Arguments that the configurations of Gemma, Qwen and GLM share."""
    return {
        "vocab_size": len(tokenizer), "hidden_size": DIM, "intermediate_size": DIM, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": 0,
        "eos_token_id": 1, "bos_token_id": 3,
    } | extra


def _gemma(tokenizer):
    from transformers import Gemma2Config, Gemma2Model

    return _lively(Gemma2Model(Gemma2Config(**_decoder_config(tokenizer, head_dim=8, query_pre_attn_scalar=8))))


# ---------------------------------------------------------------------------------------------------- parts


def _lively(module):
    """Draw all weights anew: unit gain, embeddings with std 1, biases with std 0.1; norm scales stay.

    Library defaults are zero in the last layers and small elsewhere, which would make the output zero or independent
    of the prompt and every test of guidance vacuous. Attention averages its values over all tokens, which would hide
    the prompt in joint attention again, so values have gain 3.
    """
    import torch

    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, torch.nn.Embedding)}
    for name, weight in module.named_parameters():
        if id(weight) in embeddings:
            torch.nn.init.normal_(weight)
        elif weight.ndim > 1:
            gain = 3.0 if ".to_v." in name or ".add_v_proj." in name else 1.0
            torch.nn.init.normal_(weight, std=gain * weight[0].numel() ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)
    return module


def _vae(blocks: tuple[int, ...] = (8, 16), channels: int = 4, shift: float | None = None):
    """AutoencoderKL, [B, channels, h, w] -> images [B, 3, h f, w f] with f = 2 ** (len(blocks) - 1)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=blocks, down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks), latent_channels=channels, norm_num_groups=4,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.5, shift_factor=shift,
    )


def _flow(**config):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def _dynamic(base: float = 0.5, largest: float = 1.15, **config):
    """Flow-match Euler whose shift depends on the number of image tokens."""
    return _flow(use_dynamic_shifting=True, base_shift=base, max_shift=largest, **config)


def _unet(**config):
    """Latents [B, 4, 8, 8] with one attention level and text [B, T, cross_attention_dim]."""
    from diffusers import UNet2DConditionModel

    return _lively(UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, attention_head_dim=4, **config,
    ))


# ---------------------------------------------------------------------------------------------------- pipelines


def _stable_diffusion(prediction_type: str = "epsilon"):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokenizer = _clip_tokenizer()
    return StableDiffusionPipeline(
        tokenizer=tokenizer, text_encoder=_clip(tokenizer), unet=_unet(cross_attention_dim=DIM), vae=_vae(),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )


def _stable_diffusion_xl():
    """Text [B, 16, 2 DIM] from two CLIPs; the added embedding is pooled [B, DIM] and six ids of 8 channels each."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer = _clip_tokenizer()
    return StableDiffusionXLPipeline(
        tokenizer=tokenizer, tokenizer_2=_clip_tokenizer(), text_encoder=_clip(tokenizer),
        text_encoder_2=_clip(tokenizer, projection=True),
        unet=_unet(
            cross_attention_dim=2 * DIM, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=DIM + 6 * 8, use_linear_projection=True,
        ),
        vae=_vae(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )


def _stable_diffusion_3(t5: bool = True):
    """Text [B, 16 + T, 72]: two CLIPs side by side, zero-padded from 2 DIM to 72, then T5 or zeros in its place."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    clip, long = _clip_tokenizer(), _tokenizer(suffix="</s>")
    return StableDiffusion3Pipeline(
        tokenizer=clip, tokenizer_2=_clip_tokenizer(), tokenizer_3=long if t5 else None,
        text_encoder=_clip(clip, projection=True), text_encoder_2=_clip(clip, projection=True),
        text_encoder_3=_t5(long, width=72) if t5 else None,
        transformer=_lively(SD3Transformer2DModel(
            sample_size=8, in_channels=8, out_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=72, caption_projection_dim=32, pooled_projection_dim=2 * DIM, pos_embed_max_size=16,
            dual_attention_layers=(0,), qk_norm="rms_norm",
        )),
        vae=_vae(channels=8, shift=0.1), scheduler=_flow(shift=3.0),
    )


def _flux(guidance_embeds: bool = True):
    """Packed latents [B, 16, 16] of 4 channels in 2x2 patches."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    clip, long = _clip_tokenizer(), _tokenizer(suffix="</s>")
    return FluxPipeline(
        tokenizer=clip, tokenizer_2=long, text_encoder=_clip(clip), text_encoder_2=_t5(long),
        transformer=_lively(FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=DIM, pooled_projection_dim=DIM, guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        )),
        vae=_vae(shift=0.1), scheduler=_dynamic(shift=3.0) if guidance_embeds else _flow(shift=1.0),
    )


def _wan(two_experts: bool = False, scheduler: str = "unipc"):
    """Latents [B, 16, 2, 4, 4]; with two experts, transformer_2 takes over below t = 0.875 * 1000 (Wan 2.2)."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    def transformer():
        return _lively(WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, text_dim=DIM, freq_dim=32, ffn_dim=32, num_layers=2,
            rope_max_seq_len=32,
        ))

    tokenizer = _tokenizer(suffix="</s>")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=_t5(tokenizer, multilingual=True), transformer=transformer(),
        transformer_2=transformer() if two_experts else None, boundary_ratio=0.875 if two_experts else None,
        vae=AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        scheduler={"unipc": lambda: UniPCMultistepScheduler(**flow), "euler": lambda: _flow(shift=3.0)}[scheduler](),
    )


def _ltx():
    """Packed latents [B, 2 * 8 * 8, 8]; the tiny video autoencoder shrinks space and time by 4."""
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    tokenizer = _tokenizer(suffix="</s>")
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), patch_size=1,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return LTXPipeline(
        tokenizer=tokenizer, text_encoder=_t5(tokenizer),
        transformer=_lively(LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
            num_layers=2, caption_channels=DIM,
        )),
        vae=vae, scheduler=_dynamic(0.95, 2.05, base_image_seq_len=1024, shift_terminal=0.1),
    )


def _sana(scheduler: str = "dpm"):
    """Latents [B, 4, 16, 16] of a deep-compression autoencoder; the pipeline demands sizes divisible by 32."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    tokenizer = _tokenizer(prefix="<bos>")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    make = {"dpm": lambda: DPMSolverMultistepScheduler(**flow), "euler": lambda: _flow(shift=3.0)}
    return SanaPipeline(
        tokenizer=tokenizer, text_encoder=_gemma(tokenizer),
        transformer=_lively(SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=2,
            num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=DIM,
        )),
        vae=AutoencoderDC(
            latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=0.41407,
        ),
        scheduler=make[scheduler](),
    )


def _pixart_sigma():
    """The transformer returns 8 channels for 4 latent channels: a learned variance, which the pipeline drops."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    tokenizer = _tokenizer(suffix="</s>")
    return PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=_t5(tokenizer),
        transformer=_lively(PixArtTransformer2DModel(
            num_attention_heads=4, attention_head_dim=8, num_layers=2, cross_attention_dim=32, sample_size=8,
            caption_channels=DIM, use_additional_conditions=False,
        )),
        vae=_vae(), scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )


def _lumina2():
    """Latents [B, 4, 4, 4]; the pipeline fixes the factor of the autoencoder at 8, hence four blocks."""
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    tokenizer = _tokenizer(prefix="<bos>")
    return Lumina2Pipeline(
        tokenizer=tokenizer, text_encoder=_gemma(tokenizer),
        transformer=_lively(Lumina2Transformer2DModel(
            sample_size=4, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1, num_attention_heads=4,
            num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(300, 64, 64), cap_feat_dim=DIM,
        )),
        vae=_vae((4, 4, 8, 8), shift=0.1), scheduler=_flow(shift=6.0),
    )


def _qwen_image():
    """Packed latents [B, 16, 16]; text [B, T, DIM] of varying length behind the 34 tokens of the template."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = _tokenizer()
    size = len(tokenizer)  # ids from here on never occur: no text is taken for an image
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": DIM}
    config = Qwen2_5_VLConfig(
        text_config=_decoder_config(tokenizer, rope_parameters=rope),
        vision_config=vision | {"fullatt_block_indexes": [0]}, image_token_id=size, video_token_id=size + 1,
        vision_start_token_id=size + 2, vision_end_token_id=size + 3,
    )
    return QwenImagePipeline(
        tokenizer=tokenizer, text_encoder=_lively(Qwen2_5_VLForConditionalGeneration(config)),
        transformer=_lively(QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=DIM, axes_dims_rope=(4, 6, 6),
        )),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.1, -0.1, 0.2, -0.2], latents_std=[1.5, 2.0, 2.5, 3.0],
        ),
        scheduler=_dynamic(0.5, 0.9, shift_terminal=0.02, base_image_seq_len=256, max_image_seq_len=8192),
    )


def _z_image():
    """Latents and texts go to the transformer as lists, [4, 1, 8, 8] and [T, DIM] for each row."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = _tokenizer(chat=True)
    return ZImagePipeline(
        tokenizer=tokenizer,
        text_encoder=_lively(Qwen3Model(Qwen3Config(**_decoder_config(tokenizer, head_dim=8)))),
        transformer=_lively(ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=DIM,
            axes_dims=[8, 4, 4], axes_lens=[512, 64, 64],
        )),
        vae=_vae(shift=0.1), scheduler=_flow(shift=6.0),
    )


def _aura_flow():
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    tokenizer = _tokenizer(suffix="</s>")
    return AuraFlowPipeline(
        tokenizer=tokenizer, text_encoder=_t5(tokenizer, multilingual=True),
        transformer=_lively(AuraFlowTransformer2DModel(
            sample_size=8, num_mmdit_layers=2, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=DIM, caption_projection_dim=32, pos_embed_max_size=256,
        )),
        vae=_vae(), scheduler=_flow(shift=1.73),
    )


def _cogview4():
    """Text [B, T, DIM] padded on the left to a multiple of 16, so T may differ between prompt and negative prompt."""
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel
    from transformers import GlmConfig, GlmModel

    tokenizer = _tokenizer(prefix="[gMASK] <sop>", padding_side="left")
    return CogView4Pipeline(
        tokenizer=tokenizer, text_encoder=_lively(GlmModel(GlmConfig(**_decoder_config(tokenizer, head_dim=8)))),
        transformer=_lively(CogView4Transformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            text_embed_dim=DIM, time_embed_dim=16, condition_dim=8, sample_size=8,
        )),
        vae=_vae(), scheduler=_dynamic(0.25, 0.75, base_image_seq_len=256, time_shift_type="linear"),
    )


# fmt: on

TINY: dict[str, Callable[..., DiffusionPipeline]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "FluxPipeline": _flux,
    "WanPipeline": _wan,
    "LTXPipeline": _ltx,
    "SanaPipeline": _sana,
    "PixArtSigmaPipeline": _pixart_sigma,
    "Lumina2Pipeline": _lumina2,
    "QwenImagePipeline": _qwen_image,
    "ZImagePipeline": _z_image,
    "AuraFlowPipeline": _aura_flow,
    "CogView4Pipeline": _cogview4,
}
