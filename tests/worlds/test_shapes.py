"""The world "shapes": its verifier accepts every true image and no wrong one; its prompts and splits."""

import numpy as np
import pytest

from diffgen.worlds import shapes
from diffgen.worlds.shapes import (
    BACKGROUND,
    COLORS,
    HELD_OUT_PAIRS,
    PAIRS,
    RELATIONS,
    SHAPES,
    SIZE,
    Scene,
    parse,
    verify,
)

EVERY = shapes.scenes("all")


def draw(prompt, seed=0):
    return shapes.render(parse(prompt), np.random.default_rng(seed))


def canvas():
    return np.tile(np.uint8(BACKGROUND)[:, None, None], (1, SIZE, SIZE))


def accepted(image, prompt):
    return bool(verify(image[None], [prompt])[0])


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_verifier_accepts_every_true_image(split):
    images, prompts = shapes.dataset(1000, seed=7, split=split)
    assert images.shape == (1000, 3, SIZE, SIZE)
    assert images.dtype == np.uint8
    assert verify(images, prompts).mean() == 1


def test_true_images_pass_every_check():
    images, prompts = shapes.dataset(100, seed=3)
    for image, prompt in zip(images, prompts):
        scores = shapes.check(image, prompt)
        assert {k: v for k, v in scores.items() if k != "iou"} == dict.fromkeys(
            ["objects", "colors", "count", "relation", "verified"], 1.0
        )
        assert shapes.MIN_IOU < scores["iou"] <= 1


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_other_colour_and_no_other_shape_passes(color, shape):
    for seed in range(4):
        image = draw(f"a {color} {shape}", seed)
        for other_color, other_shape in PAIRS:
            expected = (other_color, other_shape) == (color, shape)
            assert accepted(image, f"a {other_color} {other_shape}") == expected


@pytest.mark.parametrize(
    ("drawn", "asked"),
    [
        ("two blue squares", "three blue squares"),
        ("three blue squares", "two blue squares"),
        ("two blue squares", "a blue square"),
        ("a blue square", "two blue squares"),
        ("three blue squares", "three blue circles"),
        ("three blue squares", "three red squares"),
        ("a red circle left of a green cross", "a red circle"),
        ("a red circle", "a red circle left of a green cross"),
        ("a red circle left of a green cross", "a red circle right of a green cross"),
        ("a red circle left of a green cross", "a red circle above a green cross"),
        ("a red circle left of a green cross", "a green cross left of a red circle"),
        ("a red circle left of a green cross", "a red cross left of a green circle"),
        ("a red circle above a green cross", "a red circle below a green cross"),
    ],
)
def test_a_wrong_count_colour_shape_or_relation_is_rejected(drawn, asked):
    for seed in range(20):
        image = draw(drawn, seed)
        assert accepted(image, drawn)
        assert not accepted(image, asked)


@pytest.mark.parametrize("relation", RELATIONS)
def test_exactly_one_relation_holds_between_two_objects(relation):
    for seed in range(10):
        image = draw(f"a red circle {relation} a cyan square", seed)
        held = [r for r in RELATIONS if accepted(image, f"a red circle {r} a cyan square")]
        assert held == [relation]


def test_a_relation_read_the_other_way_round_is_the_same_picture():
    for there, back in [("left of", "right of"), ("above", "below")]:
        assert accepted(draw(f"a red circle {there} a cyan square"), f"a cyan square {back} a red circle")


def test_an_object_too_many_is_rejected():
    image = draw("a red circle", 1)
    image[:, 1:6, 1:6] = np.uint8(COLORS["green"])[:, None, None]
    assert not accepted(image, "a red circle")
    image[:, 1:6, 1:6] = np.uint8((255, 255, 255))[:, None, None]  # of no named colour
    assert not accepted(image, "a red circle")


def test_a_ragged_blob_of_the_right_colour_is_rejected():
    rng = np.random.default_rng(0)
    red = np.uint8(COLORS["red"])
    for _ in range(20):
        image = canvas()
        heights = rng.integers(2, 14, size=20)
        for x, h in enumerate(heights):  # a random skyline, connected at its base
            image[:, 20 - h : 22, 6 + x] = red[:, None]
        assert not any(accepted(image, f"a red {shape}") for shape in SHAPES)


def test_a_circle_with_a_hole_or_a_bite_is_rejected():
    for seed in range(5):
        image = draw("a red circle", seed)
        ys, xs = np.nonzero(image[0] > 120)
        y, x = round(ys.mean()), round(xs.mean())
        hole, bite = image.copy(), image.copy()
        hole[:, y - 4 : y + 5, x - 4 : x + 5] = np.uint8(BACKGROUND)[:, None, None]
        bite[:, y:, x:] = np.uint8(BACKGROUND)[:, None, None]
        assert not accepted(hole, "a red circle")
        assert not accepted(bite, "a red circle")


@pytest.mark.parametrize("value", [BACKGROUND, (0, 0, 0), (255, 255, 255), *COLORS.values()])
def test_an_image_of_one_colour_is_rejected_for_every_prompt_of_one_object(value):
    image = np.tile(np.uint8(value)[:, None, None], (1, SIZE, SIZE))
    assert not any(accepted(image, f"a {c} {s}") for c, s in PAIRS)


def test_noise_is_rejected():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(20, 3, SIZE, SIZE), dtype=np.uint8)
    assert verify(images, shapes.prompts(20, seed=1)).sum() == 0


def test_a_little_noise_does_not_matter():
    """A decoder is never exact."""
    images, prompts = shapes.dataset(100, seed=11)
    noise = np.random.default_rng(0).normal(0, 6, images.shape)
    noisy = (images + noise).clip(0, 255).astype(np.uint8)
    assert verify(noisy, prompts).mean() > 0.97


def test_every_scene_is_read_back_from_its_prompt():
    assert len(EVERY) == 24 + 2 * 24 + 4 * 24 * 23
    assert all(parse(scene.prompt) == scene for scene in EVERY)
    assert len({scene.prompt for scene in EVERY}) == len(EVERY)
    assert parse("  A Red CIRCLE ") == Scene((("red", "circle"),))


@pytest.mark.parametrize(
    "prompt",
    ["", "a red dog", "a white circle", "four red circles", "two red circle", "a red circle near a blue cross", "red circle",
     "a red circle left of a blue cross.", "a red circle\na blue cross"],
)  # fmt: skip
def test_a_prompt_of_another_world_is_answered_with_the_grammar(prompt):
    with pytest.raises(ValueError, match="is not of the world 'shapes'") as error:
        parse(prompt)
    text = str(error.value)
    assert "'a COLOR SHAPE'" in text
    assert "left of|right of|above|below" in text
    assert all(word in text for word in (*COLORS, *SHAPES))


def pairs_of(split):
    return {pair for scene in shapes.scenes(split) for pair in scene.objects}


def test_the_splits_share_no_pair_and_no_prompt():
    assert pairs_of("held_out") == set(HELD_OUT_PAIRS)
    assert not pairs_of("train") & pairs_of("held_out")
    assert pairs_of("train") | pairs_of("held_out") == pairs_of("all") == set(PAIRS)
    assert not {s.prompt for s in shapes.scenes("train")} & {s.prompt for s in shapes.scenes("held_out")}
    assert {c for c, _ in HELD_OUT_PAIRS} == set(COLORS)  # each colour and each shape is still seen in training
    assert {s for _, s in HELD_OUT_PAIRS} == set(SHAPES)
    assert {s for _, s in pairs_of("train")} == set(SHAPES)


def test_drawn_prompts_hold_pairs_of_their_split_only():
    for split in ("train", "held_out"):
        drawn = {pair for prompt in shapes.prompts(300, seed=5, split=split) for pair in parse(prompt).objects}
        assert drawn <= pairs_of(split)
    families = [parse(p).family for p in shapes.prompts(2000, seed=6)]
    for family, share in shapes.FAMILIES.items():
        assert abs(families.count(family) / 2000 - share) < 0.04


def test_an_unknown_split_is_named():
    with pytest.raises(
        ValueError, match=r"split 'test' of the world 'shapes' is unknown: .valid: all, held_out, train."
    ):
        shapes.prompts(1, split="test")


def test_data_are_a_function_of_the_seed():
    a, b, c = (shapes.dataset(20, seed=s) for s in (1, 1, 2))
    assert np.array_equal(a[0], b[0])
    assert a[1] == b[1] != c[1]
    assert shapes.prompts(20, seed=1) == shapes.prompts(20, seed=1) != shapes.prompts(20, seed=2)


@pytest.mark.parametrize(
    ("images", "prompts"),
    [
        (np.zeros((1, 3, SIZE, SIZE), np.float32), ["a red circle"]),
        (np.zeros((1, SIZE, SIZE, 3), np.uint8), ["a red circle"]),
        (np.zeros((2, 3, SIZE, SIZE), np.uint8), ["a red circle"]),
        (np.zeros((1, 3, 64, 64), np.uint8), ["a red circle"]),
    ],
)
def test_images_of_another_form_are_refused(images, prompts):
    with pytest.raises(ValueError, match=r"images must be uint8 \[N, 3, 32, 32\] with one prompt each; got"):
        verify(images, prompts)
