"""img2img, inpainting, ControlNet, editing and image-to-video pipelines through guide: the tap on what they add to the call."""

import inspect
from dataclasses import dataclass

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffgen.pipelines import CFG, guide
from diffgen.pipelines.guide import apply_rule, tap
from diffgen.table import FROM_SOURCE, ROWS, UNSUPPORTED, denoisers, row_for, row_of
from diffgen.tiny import TINY, _lively, _vae, call_kwargs, tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:.*guidance-distilled")


def image(seed=0, size=16):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def mask(size=16):
    return Image.fromarray(np.repeat(np.arange(size) < size // 2, size).reshape(size, size).astype(np.uint8) * 255)


def half_image(seed=0, size=16):
    """The image of seed 0 with its lower half (which the mask keeps) from another."""
    out = image(0, size)
    out.paste(image(seed, size).crop((0, size // 2, size, size)), (0, size // 2))
    return out


# --- components that the tiny pipelines lack -----------------------------------------------------------------------


def t2i_adapter(pipe):
    shape = {"channels": [8, 16], "num_res_blocks": 1, "downscale_factor": 2, "adapter_type": "full_adapter"}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")
    }  # the first takes the residual before it halves
    unet = same(pipe.unet, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **blocks)
    return {"unet": unet, "adapter": _lively(diffusers.T2IAdapter(in_channels=3, **shape))}


def unet_controlnet(pipe):
    return {
        "controlnet": _lively(
            diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16))
        )
    }


def same(module, **config):
    """A module of the same class and configuration but for `config`."""
    old = {name: value for name, value in module.config.items() if not name.startswith("_")}
    return _lively(type(module).from_config({**old, **config}))


def sd3_inpaint(pipe):
    return {
        "transformer": same(pipe.transformer, in_channels=16, out_channels=16),
        "vae": _vae(channels=16, shift=0.1),
    }


def sd3_controlnet(extra):
    def build(pipe):
        model = diffusers.SD3ControlNetModel
        config = {**pipe.transformer.config, "num_layers": 1, "extra_conditioning_channels": extra}
        return {"controlnet": _lively(model.from_config(config))}

    return build


def flux_controlnet(pipe):
    shape = {
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_layers": 1,
        "load_weights_from_transformer": False,
    }
    model = diffusers.FluxControlNetModel.from_transformer(pipe.transformer, num_single_layers=1, **shape)
    return {"controlnet": _lively(model)}


def qwen_controlnet(extra):
    def build(pipe):
        shape = {"attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 1, "extra_condition_channels": extra}
        model = diffusers.QwenImageControlNetModel.from_transformer(
            pipe.transformer, load_weights_from_transformer=False, **shape
        )
        return {"controlnet": _lively(model)}

    return build


def sana_controlnet(pipe):
    return {
        "controlnet": _lively(diffusers.SanaControlNetModel.from_config({**pipe.transformer.config, "num_layers": 1}))
    }


def wan_i2v(pipe):
    nothing = dict.fromkeys(("image_encoder", "image_processor", "transformer_2"))
    return {"transformer": same(pipe.transformer, in_channels=36)} | nothing  # latents, mask, latents of the image


def nine_channels(pipe):
    return {"unet": same(pipe.unet, in_channels=9)}


def cogview4_control(pipe):
    return {"transformer": same(pipe.transformer, in_channels=8)}


def ltx_condition(pipe):
    return {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)}


def wan_vace(pipe):
    names = ("patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim")
    config = {name: pipe.transformer.config[name] for name in (*names, "freq_dim", "ffn_dim", "rope_max_seq_len")}
    vace = {"num_layers": 2, "vace_layers": [0], "vace_in_channels": 2 * 16 + 8 * 8}
    return {"transformer": _lively(diffusers.WanVACETransformer3DModel(**config, **vace))}


def chroma(pipe):
    model = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6), approximator_num_channels=16, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    model.register_to_config(guidance_embeds=False)  # ChromaInpaintPipeline asks for it; the class has none
    text = {"text_encoder": pipe.text_encoder_2, "tokenizer": pipe.tokenizer_2}
    return text | {"transformer": _lively(model), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)}


def cogvideox(frames):
    def build(pipe):
        vae = diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
        )
        model = diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4 * frames,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=32,
            num_layers=1,
            sample_width=2,
            sample_height=2,
            sample_frames=9,
            max_text_seq_length=16,
        )
        return {"vae": vae, "transformer": _lively(model), "scheduler": diffusers.CogVideoXDDIMScheduler()}

    return build  # fmt: skip


def animate_diff(pipe):
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    )
    return {"motion_adapter": _lively(adapter)}


def kandinsky(variance):
    def build(pipe):
        unet = diffusers.UNet2DConditionModel(
            in_channels=4, out_channels=8, addition_embed_type="image", encoder_hid_dim=32,
            encoder_hid_dim_type="image_proj", down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), block_out_channels=(32, 64),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn", layers_per_block=1, cross_attention_dim=32,
            attention_head_dim=4, resnet_time_scale_shift="scale_shift",
        )  # fmt: skip
        movq = diffusers.VQModel(block_out_channels=(32,), latent_channels=4, num_vq_embeddings=12, vq_embed_dim=4)
        return {"unet": _lively(unet), "movq": movq, "scheduler": diffusers.DDPMScheduler(variance_type=variance)}

    return build


def embeds():
    draw = torch.Generator().manual_seed(1)
    return {name: torch.randn(2, 32, generator=draw) for name in ("image_embeds", "negative_image_embeds")}


def no_processor(pipe):
    return {"processor": None}


# --- the variants --------------------------------------------------------------------------------------------------


def texts(length=8, dim=32, samples=2):
    """Embedded prompts and negative prompts, for pipelines that would show the image to a language model."""
    draw = torch.Generator().manual_seed(1)
    out = {}
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        out[name] = torch.randn(samples, length, dim, generator=draw)
        out[f"{name}_mask"] = torch.ones(samples, length, dtype=torch.long)
    return out | {"prompt": None, "negative_prompt": None}


SOME = {"strength": 0.75, "num_inference_steps": 4}
I2I = {"image": image(), **SOME}
INPAINT = {"image": image(), "mask_image": mask(), **SOME}
VIDEO = {"image": image(size=32)}
CONTROL = {"control_image": image(1)}
# the variant's class (or (class, name)), the tiny pipeline it comes from, further components, call, what has an effect
VARIANTS = {
    "StableDiffusionImg2Img": ("StableDiffusion", None, I2I, {"image": image(5)}),
    "StableDiffusionInpaint": ("StableDiffusion", None, INPAINT, {"image": half_image(5)}),
    "StableDiffusionInpaint 9 channels": ("StableDiffusion", nine_channels, INPAINT, {"mask_image": mask().rotate(90)}),
    "StableDiffusionControlNet": ("StableDiffusion", unet_controlnet, {"image": image(1)}, {"image": image(5)}),
    "StableDiffusionControlNet guess mode": (
        "StableDiffusion", unet_controlnet, {"image": image(1), "guess_mode": True}, {"image": image(5)},
    ),
    "StableDiffusionControlNetImg2Img": ("StableDiffusion", unet_controlnet, I2I | CONTROL, {"control_image": image(5)}),
    "StableDiffusionControlNetInpaint": (
        "StableDiffusion", unet_controlnet, INPAINT | CONTROL, {"control_image": image(5)},
    ),
    "StableDiffusionAdapter": (
        "StableDiffusion", t2i_adapter, {"image": [image(1), image(2)]}, {"image": [image(5), image(6)]},
    ),
    "StableDiffusionXLImg2Img": ("StableDiffusionXL", None, I2I, {"image": image(5)}),
    "StableDiffusionXLInpaint": ("StableDiffusionXL", None, INPAINT, {"image": half_image(5)}),
    "StableDiffusionXLControlNet": ("StableDiffusionXL", unet_controlnet, {"image": image(1)}, {"image": image(5)}),
    "StableDiffusionXLControlNetImg2Img": (
        "StableDiffusionXL", unet_controlnet, I2I | CONTROL, {"control_image": image(5)},
    ),
    "StableDiffusionXLControlNetInpaint": (
        "StableDiffusionXL", unet_controlnet, INPAINT | CONTROL, {"control_image": image(5)},
    ),
    "StableDiffusion3Img2Img": ("StableDiffusion3", None, I2I, {"image": image(5)}),
    "StableDiffusion3Inpaint": ("StableDiffusion3", sd3_inpaint, INPAINT, {"image": half_image(5)}),
    "StableDiffusion3ControlNet": ("StableDiffusion3", sd3_controlnet(0), CONTROL, {"control_image": image(5)}),
    "StableDiffusion3ControlNetInpainting": (
        "StableDiffusion3", sd3_controlnet(1), CONTROL | {"control_mask": mask()}, {"control_image": image(5)},
    ),
    "FluxImg2Img": ("Flux", None, I2I, {"image": image(5)}),
    "FluxInpaint": ("Flux", None, INPAINT, {"image": half_image(5)}),
    "FluxControlNet": ("Flux", flux_controlnet, CONTROL, {"control_image": image(5)}),
    "FluxKontext": (
        "Flux", None, {"image": image(), "max_area": 256, "_auto_resize": False}, {"image": image(5)},
    ),
    "FluxKontextInpaint": (
        "Flux", None, INPAINT | {"max_area": 256, "_auto_resize": False}, {"image": half_image(5)},
    ),
    "Chroma": ("Flux", chroma, {}, {"prompt": ["two"] * 2}),
    "ChromaImg2Img": ("Flux", chroma, I2I, {"image": image(5)}),
    "ChromaInpaint": ("Flux", chroma, INPAINT, {"image": half_image(5)}),
    "QwenImageImg2Img": ("QwenImage", None, I2I, {"image": image(5)}),
    "QwenImageInpaint": ("QwenImage", None, INPAINT, {"image": half_image(5)}),
    "QwenImageControlNet": ("QwenImage", qwen_controlnet(0), CONTROL, {"control_image": image(5)}),
    "QwenImageControlNetInpaint": (
        "QwenImage", qwen_controlnet(4), CONTROL | {"control_mask": mask()}, {"control_image": image(5)},
    ),
    "QwenImageEdit": ("QwenImage", no_processor, {"image": image()} | texts(), {"image": image(5)}),
    "QwenImageEditInpaint": ("QwenImage", no_processor, INPAINT | texts(), {"image": half_image(5)}),
    "QwenImageEditPlus": (
        "QwenImage", no_processor, {"image": [image()]} | texts(samples=1), {"image": [image(5)]},
    ),
    "KandinskyV22 learned variance": (
        "StableDiffusion", kandinsky("learned_range"), embeds(), {"image_embeds": torch.ones(2, 32)},
    ),
    "KandinskyV22 fixed variance": ("StableDiffusion", kandinsky("fixed_small"), embeds(), {"image_embeds": torch.ones(2, 32)}),
    "AnimateDiff": ("StableDiffusion", animate_diff, {"num_frames": 4}, {"prompt": ["two"] * 2}),
    "CogVideoX": ("PixArtSigma", cogvideox(1), {"num_frames": 9, "height": 16, "width": 16}, {"prompt": ["two"] * 2}),
    "CogVideoXImageToVideo": (
        "PixArtSigma", cogvideox(2), {"num_frames": 9, "height": 16, "width": 16, "image": [image(), image(1)]},
        {"image": [image(5), image(6)]},
    ),
    "WanImageToVideo": ("Wan", wan_i2v, VIDEO, {"image": image(5, 32)}),
    "WanVideoToVideo": (
        "Wan", None, {"video": [image(i, 32) for i in range(5)], **SOME}, {"video": [image(9 + i, 32) for i in range(5)]},
    ),
    "WanVACE": ("Wan", wan_vace, {"prompt": "a red circle", "negative_prompt": "green"}, {"conditioning_scale": 0.0}),
    "LTXImageToVideo": ("LTX", None, VIDEO, {"image": image(5, 32)}),
    "LTXCondition": ("LTX", ltx_condition, VIDEO, {"image": image(5, 32)}),
    "PixArtAlpha": ("PixArtSigma", None, {}, {"prompt": ["two"] * 2}),
    "SanaControlNet": ("Sana", sana_controlnet, {"control_image": image(1, 32)}, {"control_image": image(5, 32)}),
    "CogView4Control": ("CogView4", cogview4_control, CONTROL, {"control_image": image(5)}),
    "ZImageImg2Img": ("ZImage", None, I2I, {"image": image(5)}),
    "ZImageInpaint": ("ZImage", None, INPAINT, {"image": half_image(5)}),
}  # fmt: skip
everywhere = pytest.mark.parametrize("variant", VARIANTS)


class Variant:
    """A pipeline made of a tiny one's components, and the arguments of one call: two prompts, three steps, latents out."""

    def __init__(self, variant, **options):
        base, extra, call, self.change = VARIANTS[variant]
        base = f"{base}Pipeline"
        self.cls = getattr(diffusers, f"{variant.split()[0]}Pipeline")
        tiny = tiny_pipeline(base, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = tiny.components | (extra(tiny) if extra else {})
        accepted = inspect.signature(self.cls.__init__).parameters
        parts = {name: part for name, part in parts.items() if name in accepted}
        self.pipe = self.cls(**parts, **({"requires_safety_checker": False} if "safety_checker" in parts else {}))
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        self.pipe.set_progress_bar_config(disable=True)
        self.row = row_for(self.pipe)
        call = {
            "prompt": ["a red circle", "two large blue squares left of a cross"],
            "negative_prompt": ["green", "dark background"],
            "num_inference_steps": 3,
            "output_type": "latent",
            "return_dict": False,
            **call_kwargs(base),
            **call,
        }
        accepted = inspect.signature(self.cls.__call__).parameters
        self.call = {name: value for name, value in call.items() if name in accepted}

    def run(self, **more):
        torch.manual_seed(0)  # some ControlNets encode their image with the global generator
        arguments = {"generator": torch.Generator().manual_seed(0), **self.call, **more}
        return self.pipe(**{k: list(v) if isinstance(v, list) else v for k, v in arguments.items()})[0]

    def stock(self, scale=4.0, **more):
        return self.run(**{self.row.scale: scale - self.row.scale_offset}, **more)


@pytest.fixture(autouse=True)
def small_references(monkeypatch):
    """Qwen-Image-Edit scales its references to a million pixels."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_inpaint
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_inpaint):
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: (16, 16, None))
    monkeypatch.setattr(plus, "calculate_dimensions", lambda area, ratio: (16, 16))


def untouched(pipe):
    parts = [*denoisers(pipe).values(), pipe.scheduler]
    return not any({"forward", "step", "_compiled_call_impl"} & set(vars(part)) for part in parts)


@everywhere
def test_cfg_under_guide_is_the_stock_pipelines(variant):
    s = Variant(variant)
    stock = s.stock()
    with guide(s.pipe, CFG(4.0)) as run:
        guided = s.run()
    if "ZImage" in variant:  # c + s (c - u) is written differently
        torch.testing.assert_close(guided, stock, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(guided, stock)
    assert run.nfe == 6
    assert untouched(s.pipe)
    assert type(s.pipe) is s.cls
    assert not torch.equal(s.stock(1.0), stock)
    assert not torch.equal(s.stock(**s.change), stock)  # the image, the mask, the control: they reach the result


@dataclass
class Some(CFG):
    """CFG for the samples that the table names at a step; the rest is conditional."""

    table: dict = None

    def wants_uncond(self, step):
        self.shapes = [step.x.shape, step.num_steps]
        return self.table.get(step.index, False)

    def __call__(self, cond, uncond, step):
        assert cond.shape == uncond.shape == step.x.shape
        assert step.num_steps == 3
        assert not step.index or float(step.level.sigma) > 0
        return super().__call__(cond, uncond, step)


@everywhere
def test_evaluations_that_a_rule_leaves_out_do_not_happen_for_single_samples_either(variant, relative):
    s = Variant(variant)
    stock, plain = s.stock(), s.stock(1.0)
    with guide(s.pipe, Some(4.0, table={})) as run:
        never = s.run()
    assert run.nfe == 3
    if variant == "StableDiffusion3ControlNet":  # it encodes its control once a row, each time with other noise
        plain = never
    assert relative(never, plain) < 1e-3
    first = torch.tensor([True, False])[: len(stock)]
    with guide(s.pipe, Some(4.0, table=dict.fromkeys(range(3), first))) as run:
        latents = s.run()
    assert run.nfe == (4.5 if len(stock) == 2 else 6)
    assert relative(latents[:1], stock[:1]) < 1e-3
    if len(stock) == 2:
        assert relative(latents[1:], plain[1:]) < 1e-3
    with guide(s.pipe, Some(4.0, table={0: True})) as run:
        s.run()
    assert run.nfe == 4
    assert untouched(s.pipe)


# what the tap has to undo or leave out differs between these
REPLAYED = """StableDiffusionInpaint 9 channels,StableDiffusionAdapter,StableDiffusionControlNetImg2Img,
    StableDiffusion3ControlNet,FluxInpaint,FluxKontext,QwenImageEdit,QwenImageEditPlus,
    KandinskyV22 learned variance,KandinskyV22 fixed variance,AnimateDiff,CogVideoXImageToVideo,WanImageToVideo,
    WanVideoToVideo,LTXImageToVideo,LTXCondition,SanaControlNet,ZImageInpaint"""


@pytest.mark.parametrize("variant", [name.strip() for name in REPLAYED.split(",")])
def test_replaying_a_recorded_step_gives_what_the_scheduler_got(variant, relative):
    s = Variant(variant)
    outputs, step = [], s.pipe.scheduler.step

    def spy(model_output, *args, **kwargs):
        outputs.append(model_output.clone())
        return step(model_output, *args, **kwargs)

    s.pipe.scheduler.step = spy
    rule, arguments = apply_rule(s.row, CFG(4.0), s.call)
    with tap(s.pipe, rule, s.row, arguments, record=lambda i: True) as opened:
        s.run(**arguments)
    assert len(outputs) == len(opened.recorded) == 3
    for output, recorded in zip(outputs, opened.recorded):
        with torch.no_grad():
            assert torch.equal(recorded.replay(), output)
            last = torch.tensor([len(output) - 1])
            assert relative(recorded.replay(last), output[last]) < 1e-4


# --- the table -----------------------------------------------------------------------------------------------------


def test_every_class_in_the_table_exists_and_stands_there_once():
    exported = set(dir(diffusers))
    assert [name for name in [*ROWS, *UNSUPPORTED] if name not in exported] == []
    assert ROWS.keys() & UNSUPPORTED.keys() == set()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("FluxFillPipeline", "never runs CFG"),
        ("FluxControlPipeline", "never runs CFG"),
        ("FluxControlNetImg2ImgPipeline", "never runs CFG"),
        ("StableDiffusion3PAGImg2ImgPipeline", "perturbed third branch"),
        ("HunyuanImagePipeline", "guider"),
        ("LTX2Pipeline", "several modalities"),
        ("LuminaPipeline", "three of its channels"),
    ],
)
def test_classes_that_do_something_else_are_refused_with_the_reason(name, reason):
    with pytest.raises(ValueError, match=f"{name} cannot be tapped: .*{reason}"):
        row_of(getattr(diffusers, name))


def test_every_row_is_run_here_or_says_that_no_test_runs_it():
    run = {f"{name.split()[0]}Pipeline" for name in VARIANTS} | set(TINY)
    assert run | FROM_SOURCE == set(ROWS)
    assert not run & FROM_SOURCE
