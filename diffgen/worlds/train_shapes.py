"""Trains the shipped base model of the world "shapes": python -m diffgen.worlds.train_shapes OUT.

A StableDiffusion3Pipeline of 7 M parameters on 8x8x24 latents (16 image tokens). The latent space is that of a closed-form
linear autoencoder of 4x4 patches, which needs no training and is easy to model; a small AutoencoderKL is then trained to
encode to it and decode from it, so that the pipeline is made of stock classes. The base is mediocre on purpose
(about half of its samples pass the verifier under CFG 3), so that reinforcement learning has something to do.
What matters at this size: a position table written for the small grid (SD3's own barely tells neighbours apart), and
Muon on the hidden matrices (twice as fast as AdamW). One thread, about half an hour; results depend on the thread count.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from diffgen.worlds import shapes

GRID, DIM, LAYERS, HEAD = 4, 192, 5, 32
CLIP_TOKENS, T5_TOKENS = 12, 2


def words() -> list[str]:
    return sorted({w for scene in shapes.scenes("all") for w in scene.prompt.split()})


def clip_tokenizer():
    """A BPE in which every word of the world is one token.

    A word's merges are added after those of the words before it and join what they leave of it, so no later merge can
    break an earlier word.
    """
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    merges: list[tuple[str, str]] = []
    for word in words():
        parts = [*word[:-1], word[-1] + "</w>"]
        for left, right in merges:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == (left, right):
                    parts[i : i + 2] = [left + right]
                i += 1
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
            vocab.append(parts[0])
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocab)},
        merges=merges,
        model_max_length=CLIP_TOKENS,
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


def t5_tokenizer():
    """Any prompt is one unknown token: the T5 slot carries nothing, it is there because SD3 cannot be saved without."""
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def fit_patches(images: torch.Tensor, channels: int = 24, factor: int = 4) -> torch.nn.Conv2d:
    """Linear encoder of patches: their leading principal components, divided by one global std.

    images float [N, 3, H, W] in [-1, 1]. One scale for all: whitening would amplify the noise of small components.
    """
    patches = torch.nn.functional.unfold(images, factor, stride=factor).transpose(1, 2).flatten(0, 1).double()
    mean = patches.mean(0)
    _, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    components = vectors.flip(1)[:, :channels].T
    components = components / ((patches - mean) @ components.T).std()
    encoder = torch.nn.Conv2d(3, channels, factor, stride=factor).requires_grad_(False)
    encoder.weight.copy_(components.reshape(channels, 3, factor, factor).float())
    assert encoder.bias is not None
    encoder.bias.copy_(-(components @ mean).float())
    return encoder


def train_autoencoder(images: torch.Tensor, latents: torch.Tensor, steps: int, batch: int = 32):
    """AutoencoderKL whose posterior mean is `latents` and whose decoder returns the images, also from noisy latents."""
    from diffusers import AutoencoderKL

    channels = latents.shape[1]
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=channels,
        norm_num_groups=8,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    with torch.no_grad():  # no variance: encoding is deterministic
        vae.encoder.conv_out.weight[channels:] = 0
        vae.encoder.conv_out.bias[channels:] = -30
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    for step in tqdm(range(steps), desc="autoencoder", mininterval=10):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 100) * min(1, 2 * (1 - step / steps))
        rows = torch.randint(len(images), (batch,))
        x, z = images[rows], latents[rows]
        mean = vae.encoder(x)[:, :channels]
        noisy = z + 0.1 * torch.randn_like(z) * torch.rand(batch, 1, 1, 1)
        error = vae.decoder(torch.cat([noisy, mean])) - torch.cat([x, x])
        loss = error.square().mean() + 0.1 * error.abs().mean() + (mean - z).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return vae.eval()


def position_table(dim: int, grid: int) -> torch.Tensor:
    """[1, grid * grid, dim] sines and cosines with wavelengths from 2.5 to 32 cells, half of them an axis."""
    quarter = dim // 4
    frequency = 2 * math.pi / torch.logspace(math.log10(2.5), math.log10(32), quarter)
    angle = torch.arange(grid)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], 1)
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    return torch.cat([axis[y.flatten()], axis[x.flatten()]], 1)[None]


def build(vae):
    """The pipeline around an autoencoder; the rest is untrained."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    clip, t5 = clip_tokenizer(), t5_tokenizer()

    def text_encoder(hidden: int):
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                projection_dim=hidden,
                num_hidden_layers=2,
                num_attention_heads=hidden // 32,
                max_position_embeddings=CLIP_TOKENS,
                bos_token_id=clip.bos_token_id,
                eos_token_id=clip.eos_token_id,
                pad_token_id=clip.pad_token_id,
            )
        )

    one, two = text_encoder(128), text_encoder(32)
    three = T5EncoderModel(
        T5Config(vocab_size=len(t5), d_model=DIM, d_kv=16, d_ff=32, num_layers=1, num_heads=2, is_encoder_decoder=False)
    )
    transformer = SD3Transformer2DModel(
        sample_size=2 * GRID,
        patch_size=2,
        in_channels=24,
        num_layers=LAYERS,
        attention_head_dim=HEAD,
        num_attention_heads=DIM // HEAD,
        joint_attention_dim=DIM,
        caption_projection_dim=DIM,
        pooled_projection_dim=160,
        out_channels=24,
        pos_embed_max_size=GRID,
    )
    transformer.pos_embed.pos_embed.copy_(position_table(DIM, GRID))
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=one,
        tokenizer=clip,
        text_encoder_2=two,
        tokenizer_2=clip,
        text_encoder_3=three,
        tokenizer_3=t5,
    )


def optimizers(pipe, lr_muon: float, lr_adamw: float) -> list[torch.optim.Optimizer]:
    hidden = [p for p in pipe.transformer.transformer_blocks.parameters() if p.ndim == 2]
    ids = {id(p) for p in hidden}
    modules = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    rest = [p for m in modules for p in m.parameters() if id(p) not in ids]
    return [
        torch.optim.Muon(hidden, lr=lr_muon, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr_adamw, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def accuracy(pipe, n: int, guidance_scale: float, seed: int = 0, split: str = "all") -> float:
    """Share of n samples (10 Euler steps) that the verifier accepts."""
    prompts = shapes.prompts(n, seed, split)
    images = []
    for i in range(0, n, 64):
        batch = prompts[i : i + 64]
        generator = [torch.Generator().manual_seed(seed * 100_000 + i + k) for k in range(len(batch))]
        out = pipe(
            batch,
            num_inference_steps=10,
            guidance_scale=guidance_scale,
            generator=generator,
            max_sequence_length=T5_TOKENS,
            output_type="np",
        )
        images.append(np.round(out.images.transpose(0, 3, 1, 2) * 255).astype(np.uint8))
    return float(shapes.verify(np.concatenate(images), prompts).mean())


def train(
    steps: int,
    out: Path,
    until: float,
    batch: int = 64,
    n_images: int = 30_000,
    evaluate_from: int = 800,
    seed: int = 0,
):
    """Trains for `steps`, or until the verifier accepts a share `until` of the samples under CFG 3 (asked every 50 steps)."""
    rng = np.random.default_rng(seed)
    pixels, prompts = shapes.dataset(n_images, seed, split="all")
    images = torch.from_numpy(pixels).float() / 127.5 - 1
    latents = fit_patches(images[:2000])(images)
    torch.manual_seed(seed)
    vae = train_autoencoder(images, latents, steps=1000)
    torch.manual_seed(seed)
    pipe = build(vae)
    pipe.set_progress_bar_config(disable=True)
    names = ["transformer", "text_encoder", "text_encoder_2", "text_encoder_3"]
    params = [p for n in names for p in getattr(pipe, n).parameters()]
    ema = [p.detach().clone() for p in params]
    opts = optimizers(pipe, 3e-3, 1.5e-3)

    def rate(step: int) -> float:  # warm-up 100, constant, linear decay over the second half
        return min(1.0, (step + 1) / 100) * min(1.0, 2 * (1 - step / steps))

    base = [opt.param_groups[0]["lr"] for opt in opts]
    log, started = [], time.time()
    for step in (bar := tqdm(range(steps), mininterval=10)):
        rows = torch.from_numpy(rng.integers(n_images, size=batch))
        captions = ["" if rng.random() < 0.1 else prompts[i] for i in rows]
        # mostly few T5 tokens, sometimes many: a stock call pads T5 to 256, and the model must not mind
        length = 64 if rng.random() < 0.08 else T5_TOKENS
        context, _, pooled, _ = pipe.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
        x0 = latents[rows]
        sigma = torch.sigmoid(torch.randn(batch))  # logit-normal (SD3)
        noise = torch.randn_like(x0)
        x_t = torch.lerp(x0, noise, sigma[:, None, None, None])
        velocity = pipe.transformer(x_t, context, pooled, sigma * 1000, return_dict=False)[0]
        loss = (velocity - (noise - x0)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for opt, lr in zip(opts, base):
            opt.param_groups[0]["lr"] = lr * rate(step)
            opt.step()
            opt.zero_grad(set_to_none=True)
        torch._foreach_lerp_(ema, [p.detach() for p in params], max(0.003, 1 / (step + 2)))
        last = step + 1 == steps
        if ((step + 1) % 50 == 0 and step >= evaluate_from) or last:
            trained = [p.detach().clone() for p in params]
            torch._foreach_copy_([p.data for p in params], ema)
            row = {"step": step + 1, "loss": round(loss.item(), 4), "seconds": round(time.time() - started)}
            row |= {f"cfg{w}": accuracy(pipe, 192, w) for w in (1, 3)}
            last = last or row["cfg3"] >= until
            log.append(row)
            tqdm.write(json.dumps(row))
            if last:
                save(pipe, out, log)
                return pipe
            torch._foreach_copy_([p.data for p in params], trained)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def save(pipe, out: Path, log: list[dict]):
    """The transformer in half precision (half the size), the rest in single."""
    pipe.save_pretrained(out)
    copy.deepcopy(pipe.transformer).half().save_pretrained(out / "transformer")
    (out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3200, help="length of the learning-rate schedule")
    parser.add_argument("--until", type=float, default=0.55, help="stop at this accuracy under CFG 3")
    parser.add_argument("--evaluate-from", type=int, default=800, help="first step at which the accuracy is measured")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.steps, args.out, args.until, evaluate_from=args.evaluate_from, seed=args.seed)


if __name__ == "__main__":
    main()
