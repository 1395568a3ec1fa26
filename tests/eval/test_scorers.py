"""Scorers on tiny random checkpoints of the published classes, fake engines, and the exact world."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch

from diffgen.eval import functional as f
from diffgen.eval import scorers as s
from diffgen.worlds import shapes

PROMPTS = ["a red circle", "a cat on a mat", "a red circle", "blue"]
IMAGES = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder = tmp_path_factory.mktemp("clip")
    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**layers, "vocab_size": len(vocab), "bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1}
    vision = {**layers, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(1)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return str(folder)


@pytest.fixture(scope="module")
def cosine(clip_folder):
    """cos(image, text) by transformers' own forward pass on PIL images."""
    from PIL import Image
    from transformers import AutoProcessor, CLIPModel

    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), AutoProcessor.from_pretrained(clip_folder)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in IMAGES]
    with torch.no_grad():
        out = model(**processor(text=PROMPTS, images=pictures, return_tensors="pt", padding=True))
    return (out.logits_per_image.diagonal() / model.logit_scale.exp()).double()


# --- CLIP -------------------------------------------------------------------------------------------------------------


def test_clip_score_is_100_cos_clipped_at_0_per_image(clip_folder, cosine):
    scorer = s.get_scorer("clip_score", path=clip_folder)
    scores = scorer(IMAGES, PROMPTS)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, 100 * cosine.clamp(min=0), rtol=1e-3, atol=2e-2)
    low, high = scorer.range
    assert ((low <= scores) & (scores <= high)).all()


def test_pick_score_is_the_scaled_cosine_and_can_be_divided(clip_folder, cosine):
    raw = s.get_scorer("pick_score", path=clip_folder)(IMAGES, PROMPTS)
    torch.testing.assert_close(raw, math.exp(2.6592) * cosine, rtol=1e-3, atol=2e-3)
    divided = s.get_scorer("pick_score", path=clip_folder, divide_by=26)(IMAGES, PROMPTS)
    torch.testing.assert_close(divided, raw / 26)


def test_hps_is_the_raw_cosine_of_open_clip(open_clip_folder):
    import open_clip
    from PIL import Image

    name = f"local-dir:{open_clip_folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    pixels = torch.stack([preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in IMAGES])
    with torch.no_grad():
        rows = (
            model.eval().encode_image(pixels, normalize=True),
            model.encode_text(open_clip.get_tokenizer(name)(PROMPTS), normalize=True),
        )
    scores = s.get_scorer("hps", path=open_clip_folder)(IMAGES, PROMPTS)
    torch.testing.assert_close(scores, (rows[0] * rows[1]).sum(1).double(), rtol=1e-4, atol=1e-5)


def test_scores_do_not_depend_on_the_batch(clip_folder):
    scorer = s.get_scorer("clip_score", path=clip_folder)
    alone = torch.cat([scorer(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, scorer(IMAGES, PROMPTS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["clip_score", "hps"])
def test_prompts_beyond_77_tokens_are_cut_with_a_warning(kind, clip_folder, open_clip_folder):
    scorer = s.get_scorer(kind, path=clip_folder if kind == "clip_score" else open_clip_folder)
    long = "a red cat " * 40
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer than the 77 tokens"):
        scores = scorer(IMAGES[:2], [long, "a cat"])
    assert scores.isfinite().all()
    with pytest.warns(UserWarning, match="77"):
        torch.testing.assert_close(scorer(IMAGES[:1], [long + "and more"]), scores[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["clip_score", "pick_score", "hps"])
def test_a_missing_checkpoint_says_what_is_expected(kind, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json, model\.safetensors"):
        s.get_scorer(kind, path=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="open_clip"):
        s.get_scorer(kind, path=str(tmp_path / "nowhere.pt"), architecture="ViT-H-14")


def test_the_aesthetic_head_runs_on_the_unit_embedding(clip_folder, tmp_path):
    from safetensors.torch import save_file

    g = torch.Generator().manual_seed(0)
    shapes_ = {"layers.0": (6, 8), "layers.2": (5, 6), "layers.10": (1, 5)}  # 10 after 2: by number, not by text
    head = {f"{n}.weight": torch.randn(size, generator=g) for n, size in shapes_.items()}
    head |= {f"{n}.bias": torch.randn(size[0], generator=g) for n, size in shapes_.items()}
    save_file(head, tmp_path / "head.safetensors")
    scorer = s.get_scorer("aesthetic", path=clip_folder, head=str(tmp_path / "head.safetensors"))
    rows = scorer.clip.images(IMAGES)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4, dtype=torch.float64))
    for name in shapes_:
        rows = rows @ head[f"{name}.weight"].double().T + head[f"{name}.bias"].double()
    torch.testing.assert_close(scorer(IMAGES), rows[:, 0])


def test_a_head_that_does_not_fit_is_an_error(clip_folder, tmp_path):
    from safetensors.torch import save_file

    save_file({"0.weight": torch.ones(1, 9), "0.bias": torch.ones(1)}, tmp_path / "wide.safetensors")
    scorer = s.get_scorer("aesthetic", path=clip_folder, head=str(tmp_path / "wide.safetensors"))
    with pytest.raises(ValueError, match="takes 9 features, the CLIP model gives 8"):
        scorer(IMAGES)
    save_file({"0.weight": torch.ones(4, 8), "1.weight": torch.ones(1, 3)}, tmp_path / "gap.safetensors")
    with pytest.raises(ValueError, match="follow each other and end in 1"):
        s.get_scorer("aesthetic", path=clip_folder, head=str(tmp_path / "gap.safetensors"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        s.get_scorer("aesthetic", path=clip_folder, head=str(tmp_path / "none.safetensors"))


# --- ImageReward ------------------------------------------------------------------------------------------------------


def test_image_reward_without_its_package_says_what_to_install():
    if "ImageReward" in sys.modules:
        pytest.fail("the package is not expected here")
    with pytest.raises(ModuleNotFoundError, match="pip install image-reward"):
        s.get_scorer("image_reward")


def test_image_reward_scores_each_pair_by_the_package(monkeypatch):
    class Model:
        def score(self, prompt, image):
            assert image.size == (32, 32)
            return len(prompt)

    package = types.SimpleNamespace(load=lambda name, **options: Model())
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    assert s.get_scorer("image_reward")(IMAGES, PROMPTS).tolist() == [len(p) for p in PROMPTS]


# --- OCR --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "target", "score"),
    [
        ("HELLO WORLD", "Hello World", 1.0),
        ("say hello world!", "Hello World", 1.0),  # contained
        ("GRP0 2026", "GRPO 2026", 1 - 1 / 8),
        ("helo", "hello", 0.8),
        ("", "open", 0.0),
        ("something else entirely", "open", 0.0),  # the distance is capped at the length
    ],
)
def test_text_score_is_1_minus_the_capped_edit_distance(found, target, score):
    assert s.text_score(found, target) == pytest.approx(score)


def test_edit_distance_of_textbook_pairs():
    assert s.edit_distance("kitten", "sitting") == 3
    assert s.edit_distance("", "abc") == s.edit_distance("abc", "") == 3
    assert s.edit_distance("flaw", "lawn") == 2


def test_ocr_reads_with_any_engine_and_scores_against_the_quoted_text():
    seen = []

    def engine(image):
        seen.append((image.shape, image.dtype))
        return ["OP", "EN"] if len(seen) == 1 else "closed"

    scorer = s.get_scorer("ocr", engine=engine)
    scores = scorer(IMAGES[:2], ['a sign that says "open"', "a door with “Open” on it"])
    assert scores.tolist() == [1.0, 1 - 4 / 4]
    assert seen == [((32, 32, 3), np.dtype("uint8"))] * 2


@pytest.mark.parametrize("prompt", ["a sign", 'a sign ""', 'a sign " "', 'a "broken sign'])
def test_a_prompt_without_quoted_text_is_named(prompt):
    scorer = s.get_scorer("ocr", engine=lambda image: "")
    with pytest.raises(ValueError, match="names no text") as error:
        scorer(IMAGES[:2], ['"fine"', prompt])
    assert repr(prompt) in str(error.value)


def test_ocr_without_an_engine_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match="rapidocr-onnxruntime"):
        s.get_scorer("ocr")


def test_rapid_ocr_gets_bgr_and_may_find_nothing(monkeypatch):
    class RapidOCR:
        def __call__(self, image):
            blue = image[0, 0, 0] == 255
            return ([[[], "Ab", 0.9], [[], "junk", 0.0], [[], "c", "0.5"]] if blue else None), 0.1

    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", types.SimpleNamespace(RapidOCR=RapidOCR))
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[0, 2] = 255
    assert s.get_scorer("ocr")(images, ['"abc"', '"abc"']).tolist() == [1.0, 0.0]


# --- verifier, statistics, protocol -------------------------------------------------------------------------------------


def test_the_verifier_is_exact_and_gives_its_checks():
    images, prompts = shapes.dataset(6, seed=3)
    images = torch.from_numpy(images)
    assert s.get_scorer("verifier", world="shapes")(images, prompts).tolist() == [1.0] * 6
    checks = s.get_scorer("verifier", checks=True)(images, prompts)
    assert checks["verified"].tolist() == [1.0] * 6
    assert {"objects", "colors", "count", "relation"} <= set(checks)
    assert s.get_scorer("verifier")(images.flip(0), prompts).sum() < 6
    with pytest.raises(ValueError, match="did you mean 'shapes'"):
        s.get_scorer("verifier", world="shape")


@pytest.mark.parametrize("name", s.STATISTICS)
def test_statistics_are_those_of_functional(name):
    scorer = s.get_scorer(name)
    torch.testing.assert_close(scorer(IMAGES), getattr(f, name)(IMAGES))
    assert scorer.name == name
    assert scorer.higher_is_better is None


def test_scorers_satisfy_the_protocol_and_serve_as_rewards():
    from diffgen.training.rewards.score import score

    images, prompts = shapes.dataset(4, seed=0)
    scorers = {n: s.get_scorer(n) for n in ("verifier", "saturation")} | {
        "parts": s.get_scorer("verifier", checks=True),
        "ocr": s.get_scorer("ocr", engine=lambda image: "x"),
    }
    assert all(isinstance(scorer, s.Scorer) for scorer in scorers.values())
    del scorers["ocr"]
    found = score(scorers, torch.from_numpy(images), prompts, {"column": [1, 2, 3, 4]})
    assert found["verifier"].tolist() == found["parts/verified"].tolist() == [1.0] * 4
    assert found["saturation"].shape == (4,)


@pytest.mark.parametrize(
    ("images", "prompts", "error", "message"),
    [
        (IMAGES, None, ValueError, "verifier needs prompts"),
        (IMAGES, PROMPTS[:3], ValueError, "3 prompts and 4 images"),
        (IMAGES, "text", TypeError, "list of texts"),
        (IMAGES.float(), PROMPTS, TypeError, "verifier: images must be a uint8"),
        (IMAGES[0], PROMPTS, TypeError, r"\[3, 32, 32\]"),
        ([1], PROMPTS, TypeError, "list"),
    ],
)
def test_bad_inputs_are_named(images, prompts, error, message):
    with pytest.raises(error, match=message):
        s.get_scorer("verifier")(images, prompts)


def test_an_unknown_scorer_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'clip_score'"):
        s.get_scorer("clipscore")
