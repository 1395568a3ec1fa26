"""The world "shapes": 32x32 RGB images of coloured shapes, prompts that name them, and an exact verifier.

Three prompt families: one object ("a red circle"), a count ("three blue squares"), a relation ("a red cross left of a
green circle"). Data are procedural and endless. The verifier segments an image by colour, matches each connected
component with templates of every shape and size, and compares what it found with what the prompt names.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import numpy as np

from diffgen.names import nearest

SIZE = 32
BACKGROUND = (18, 18, 24)
COLORS = {  # no white: its anti-aliased edge would be nearest to purple
    "red": (225, 45, 45),
    "green": (50, 180, 60),
    "blue": (45, 85, 230),
    "yellow": (240, 215, 50),
    "purple": (165, 60, 200),
    "cyan": (60, 205, 215),
}
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
NUMBERS = {"two": 2, "three": 3}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # (x, y) of first minus second
PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]
HELD_OUT_PAIRS = [  # each colour once; never named by a training prompt of reinforcement learning
    ("red", "triangle"),
    ("green", "circle"),
    ("blue", "cross"),
    ("yellow", "square"),
    ("purple", "circle"),
    ("cyan", "cross"),
]
FAMILIES = {"single": 0.4, "count": 0.2, "relation": 0.4}
MIN_IOU = 0.7
MIN_AREA = 10  # pixels; smaller components are anti-aliasing


@dataclass(frozen=True)
class Scene:
    """What a prompt names: objects (colour, shape), and a relation between the first and the second."""

    objects: tuple[tuple[str, str], ...]
    relation: str | None = None

    @property
    def family(self) -> str:
        return "relation" if self.relation else "single" if len(self.objects) == 1 else "count"

    @property
    def prompt(self) -> str:
        (color, shape), n = self.objects[0], len(self.objects)
        if self.relation:
            second = self.objects[1]
            return f"a {color} {shape} {self.relation} a {second[0]} {second[1]}"
        if n == 1:
            return f"a {color} {shape}"
        return f"{next(word for word, k in NUMBERS.items() if k == n)} {color} {SHAPES[shape]}"


def parse(prompt: str) -> Scene:
    """Prompt -> Scene. Raises ValueError, with the grammar, for a prompt that isn't of this world."""
    words = prompt.strip().lower()
    color, shape = "|".join(COLORS), "|".join(SHAPES)
    if m := re.fullmatch(rf"a ({color}) ({shape})", words):
        return Scene(((m[1], m[2]),))
    if m := re.fullmatch(rf"({'|'.join(NUMBERS)}) ({color}) ({'|'.join(SHAPES.values())})", words):
        singular = next(s for s, plural in SHAPES.items() if plural == m[3])
        return Scene(((m[2], singular),) * NUMBERS[m[1]])
    if m := re.fullmatch(rf"a ({color}) ({shape}) ({'|'.join(RELATIONS)}) a ({color}) ({shape})", words):
        return Scene(((m[1], m[2]), (m[4], m[5])), relation=m[3])
    raise ValueError(
        f"prompt {prompt!r} is not of the world 'shapes'; expected 'a COLOR SHAPE', 'two|three COLOR SHAPES' or "
        f"'a COLOR SHAPE left of|right of|above|below a COLOR SHAPE' with colors {', '.join(COLORS)} and shapes "
        f"{', '.join(SHAPES)}"
    )


def scenes(split: str = "train", family: str | None = None) -> list[Scene]:
    """Every scene of a split: 'train' (no held-out pair), 'held_out' (held-out pairs only), 'all'."""
    pairs = {
        "all": PAIRS,
        "train": [p for p in PAIRS if p not in HELD_OUT_PAIRS],
        "held_out": HELD_OUT_PAIRS,
    }.get(split)
    if pairs is None:
        raise ValueError(
            f"split {split!r} of the world 'shapes' is unknown: {nearest(split, ['train', 'held_out', 'all'])}"
        )
    found = [Scene((p,)) for p in pairs]
    found += [Scene((p,) * n) for n in NUMBERS.values() for p in pairs]
    found += [Scene((p, q), r) for r in RELATIONS for p in pairs for q in pairs if p != q]
    return [s for s in found if family in (None, s.family)]


def sample_scenes(n: int, rng: np.random.Generator, split: str = "train") -> list[Scene]:
    """n scenes, families drawn with the weights of FAMILIES."""
    by_family = {f: scenes(split, f) for f in FAMILIES}
    drawn = rng.choice(list(FAMILIES), size=n, p=list(FAMILIES.values()))
    return [by_family[f][rng.integers(len(by_family[f]))] for f in drawn]


def prompts(n: int, seed: int = 0, split: str = "train") -> list[str]:
    """n prompts of a split, reproducible."""
    return [scene.prompt for scene in sample_scenes(n, np.random.default_rng(seed), split)]


# --- rendering ------------------------------------------------------------------------------------------------------


def mask(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Indicator of a shape of radius r with its centroid at the origin, on coordinates x, y (y points down)."""
    if shape == "circle":
        return x * x + y * y <= r * r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.85 * r
    if shape == "triangle":  # equilateral, apex up, circumradius 1.2 r
        return (y <= 0.6 * r) & (np.sqrt(3) * abs(x) - y <= 1.2 * r)
    arm = 0.34 * r
    return ((abs(x) <= arm) & (abs(y) <= r)) | ((abs(y) <= arm) & (abs(x) <= r))


_SUB = 4  # samples a pixel and axis
_GRID = (np.arange(SIZE * _SUB) + 0.5) / _SUB - 0.5


def coverage(shape: str, cx: float, cy: float, r: float) -> np.ndarray:
    """Anti-aliased coverage in [0, 1] of each pixel, [SIZE, SIZE]."""
    inside = mask(shape, _GRID[None, :] - cx, _GRID[:, None] - cy, r)
    return inside.reshape(SIZE, _SUB, SIZE, _SUB).mean((1, 3))


def _place(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centre and radius (cx, cy, r) of each object, in pixels; objects never touch."""
    lo, hi, mid = SIZE / 4 - 0.5, 3 * SIZE / 4 - 0.5, SIZE / 2 - 0.5
    if scene.family == "single":
        return [(mid + rng.uniform(-3, 3), mid + rng.uniform(-3, 3), rng.uniform(6.5, 9.5))]
    if scene.family == "count":
        slots = rng.permutation([(lo, lo), (hi, lo), (lo, hi), (hi, hi)])[: len(scene.objects)]
        r = rng.uniform(4.5, 5.3)
        return [(x + rng.uniform(-1, 1), y + rng.uniform(-1, 1), r) for x, y in slots]
    dx, dy = RELATIONS[scene.relation or ""]
    placed = []
    for sign in (1, -1):
        x = mid + sign * dx * SIZE / 4 + rng.uniform(-1, 1) * (1 if dx else 3)
        y = mid + sign * dy * SIZE / 4 + rng.uniform(-1, 1) * (1 if dy else 3)
        placed.append((x, y, rng.uniform(4.8, 5.8)))
    return placed


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """One image of a scene, uint8 [3, SIZE, SIZE]."""
    image = np.tile(np.array(BACKGROUND, float)[:, None, None], (1, SIZE, SIZE))
    for (color, shape), (cx, cy, r) in zip(scene.objects, _place(scene, rng)):
        alpha = coverage(shape, cx, cy, r)
        image = image * (1 - alpha) + np.array(COLORS[color], float)[:, None, None] * alpha
    return np.round(image).astype(np.uint8)


def dataset(n: int, seed: int = 0, split: str = "train") -> tuple[np.ndarray, list[str]]:
    """n images uint8 [n, 3, SIZE, SIZE] and their prompts, reproducible."""
    rng = np.random.default_rng(seed)
    drawn = sample_scenes(n, rng, split)
    return np.stack([render(scene, rng) for scene in drawn]), [scene.prompt for scene in drawn]


# --- verifier -------------------------------------------------------------------------------------------------------

_RAYS = np.array(list(COLORS.values()), np.float32) - np.array(BACKGROUND, np.float32)
MAX_RESIDUAL = (
    90.0  # RGB distance to the nearest blend of a named colour and the background; farther is no named colour
)
_RADII = np.arange(3.0, 12.01, 0.5)


@dataclass(frozen=True)
class Found:
    color: str
    shape: str
    iou: float
    x: float
    y: float


@functools.lru_cache(maxsize=64)
def _templates(fx: float, fy: float) -> tuple[np.ndarray, np.ndarray]:
    """Coverage templates [len(SHAPES) * len(_RADII), SIZE * SIZE] centred at SIZE//2 + (fx, fy), and their areas."""
    c = SIZE // 2
    stack = np.array([coverage(s, c + fx, c + fy, r).ravel() for s in SHAPES for r in _RADII], np.float32)
    return stack, stack.sum(1)


def _match(opacity: np.ndarray) -> tuple[str, float, float, float]:
    """Opacity map [SIZE, SIZE] of one component -> (shape, iou, x, y): best template at its centroid, soft IoU."""
    ys, xs = np.nonzero(opacity)
    weight = opacity[ys, xs]
    x, y = (xs * weight).sum() / weight.sum(), (ys * weight).sum() / weight.sum()
    qx, qy = round(4 * x) / 4, round(4 * y) / 4  # templates exist at quarter pixels
    stack, area = _templates(qx % 1, qy % 1)
    ys, xs = ys - int(qy) + SIZE // 2, xs - int(qx) + SIZE // 2
    inside = (ys >= 0) & (ys < SIZE) & (xs >= 0) & (xs < SIZE)
    overlap = np.minimum(stack[:, ys[inside] * SIZE + xs[inside]], weight[inside]).sum(1)
    iou = overlap / (area + weight.sum() - overlap)
    best = int(iou.argmax())
    return list(SHAPES)[best // len(_RADII)], float(iou[best]), float(x), float(y)


def segment(image: np.ndarray) -> list[Found]:
    """uint8 [3, SIZE, SIZE] -> the objects in it: every component of at least MIN_AREA pixels of one colour.

    A pixel is unmixed into background + opacity * (colour - background); below half opacity it is background, so an
    anti-aliased edge never takes another colour's name. A pixel that no blend explains has the colour "other".
    """
    from scipy import ndimage

    pixels = image.reshape(3, -1).T.astype(np.float32) - np.array(BACKGROUND, np.float32)
    opacity = (pixels @ _RAYS.T / (_RAYS**2).sum(1)).clip(0, 1)
    residual = ((pixels[:, None] - opacity[..., None] * _RAYS) ** 2).sum(-1)
    nearest = residual.argmin(1)
    rows = np.arange(len(pixels))
    opacity, residual = opacity[rows, nearest], residual[rows, nearest]
    label = np.where(opacity >= 0.5, nearest + 1, 0)
    label = np.where(residual > MAX_RESIDUAL**2, len(COLORS) + 1, label).reshape(SIZE, SIZE)
    opacity = opacity.reshape(SIZE, SIZE)
    found = []
    for index in np.unique(label[label > 0]):
        components, count = ndimage.label(label == index)
        for k in range(1, count + 1):
            core = components == k
            if core.sum() < MIN_AREA:
                continue
            edge = ndimage.binary_dilation(core, np.ones((3, 3))) & (label == 0)
            shape, iou, x, y = _match(np.where(core | edge, opacity, 0))
            found.append(Found([*COLORS, "other"][index - 1], shape, iou, x, y))
    return found


def check(image: np.ndarray, prompt: str | Scene) -> dict[str, float]:
    """Per-check scores in [0, 1] of one uint8 [3, SIZE, SIZE] image: objects, colors, count, relation, iou, verified.

    objects: share of the named objects found with their colour and shape. colors: the same, shape ignored. count: the
    number of objects is right. relation: centroids stand as named (1 where no relation is named). iou: mean overlap of
    the components with their best template. verified: 1 if exactly the named objects are there, every component matches
    its template with IoU >= MIN_IOU, and the relation holds; else 0.
    """
    scene = parse(prompt) if isinstance(prompt, str) else prompt
    found = segment(image)
    named = list(scene.objects)

    def share(keys, wanted):
        left, hit = list(keys), 0
        for w in wanted:
            if w in left:
                left.remove(w)
                hit += 1
        return hit / max(len(wanted), len(keys))

    scores = {
        "objects": share([(f.color, f.shape) for f in found], named),
        "colors": share([f.color for f in found], [color for color, _ in named]),
        "count": float(len(found) == len(named)),
        "relation": 1.0,
        "iou": float(np.mean([f.iou for f in found])) if found else 0.0,
    }
    if scene.relation:
        first, second = (next((f for f in found if (f.color, f.shape) == obj), None) for obj in named)
        scores["relation"] = float(first is not None and second is not None and _holds(scene.relation, first, second))
    exact = scores["objects"] == 1.0 and scores["relation"] == 1.0
    scores["verified"] = float(exact and all(f.iou >= MIN_IOU for f in found))
    return scores


def _holds(relation: str, first: Found, second: Found) -> bool:
    """The centroids are at least 4 pixels apart on the named axis, and farther apart there than on the other one."""
    dx, dy = RELATIONS[relation]
    along = dx * (first.x - second.x) + dy * (first.y - second.y)
    across = dy * (first.x - second.x) + dx * (first.y - second.y)
    return along >= 4 and along > abs(across)


def verify(images, prompts: list[str]) -> np.ndarray:
    """uint8 [N, 3, SIZE, SIZE] (tensor or array) and N prompts -> [N] in {0, 1}."""
    images = np.asarray(images)
    if images.shape[1:] != (3, SIZE, SIZE) or images.dtype != np.uint8 or len(images) != len(prompts):
        raise ValueError(
            f"images must be uint8 [N, 3, {SIZE}, {SIZE}] with one prompt each; got {images.dtype} "
            f"{list(images.shape)} and {len(prompts)} prompts"
        )
    return np.array([check(image, prompt)["verified"] for image, prompt in zip(images, prompts)])
