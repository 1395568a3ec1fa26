"""GenEval (arXiv:2310.11513): prompts as rules about objects, counts, colours and positions, checked by a detector.

    report = evaluate(images, load_metadata("evaluation_metadata.jsonl"), detector, samples=4)
    report.overall, report.tags["position"], report.pass_at_1, report.pass_at_n

A line of metadata: {"tag": "position", "prompt": "...", "include": [{"class": "dog", "count": 1, "color": "red",
"position": ["left of", 0]}], "exclude": [{"class": "dog", "count": 2}]}: every include clause must hold (at least
`count` objects, all of that colour, each standing so relative to the objects of include clause 0), no exclude clause may
(`count` or more). A detector is any callable: image uint8 [3,H,W] -> [{"class", "box": (x1, y1, x2, y2), "score", "color"?}].

The rules are those of the authors' code: the most confident `count` objects of a class are judged, confidence must
exceed 0.3 (0.9 for the tag "counting"), positions leave out a tenth of the two boxes. One thing is added: where two
include clauses name one class ("a red circle above a blue circle"), each takes the objects of its colour first.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffgen.names import nearest

Detection = dict[str, Any]  # class, box (x1, y1, x2, y2) in pixels, score; color where the detector knows it
Detector = Callable[[Tensor], list[Detection]]

RELATIONS = ("left of", "right of", "above", "below")
CHECKS = ("object", "count", "color", "position")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MAX_OBJECTS = 16  # of a class
POSITION_MARGIN = 0.1  # of the sum of both boxes' sizes, which must be exceeded

# -------------------------------------------------------------------------------------------------------- metadata


def load_metadata(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The items of a JSONL file in GenEval's format. Raises ValueError that names file and line."""
    file = Path(path)
    items = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON: {error}") from None
        items.append(check_metadata(item, where))
    if not items:
        raise ValueError(f"{file}: no items; expected one JSON object a line")
    return items


def check_metadata(item: Any, where: str) -> dict[str, Any]:
    """The item as it is, or ValueError that begins with `where`."""

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"{where}: {message}")

    need(isinstance(item, dict), f"expected an object, got {type(item).__name__}")
    for key in ("tag", "prompt"):
        need(isinstance(item.get(key), str), f"{key!r} must be text, got {item.get(key)!r}")
    need(isinstance(item.get("include"), list) and bool(item["include"]), "'include' must be a list of clauses")
    need(isinstance(item.get("exclude", []), list), "'exclude' must be a list of clauses")
    for part in ("include", "exclude"):
        for i, clause in enumerate(item.get(part) or []):
            name = f"{part}[{i}]"
            need(isinstance(clause, dict), f"{name} must be an object, got {clause!r}")
            need(isinstance(clause.get("class"), str), f"{name} needs 'class', a text; got {clause.get('class')!r}")
            n = clause.get("count")
            need(type(n) is int and n >= 1, f"{name} needs 'count', a number from 1; got {n!r}")
            need(isinstance(clause.get("color", ""), str), f"{name}: 'color' must be text, got {clause.get('color')!r}")
            if "position" in clause:
                _check_position(clause["position"], i, name, need)
    return item


def _check_position(position: Any, index: int, name: str, need: Callable[[bool, str], None]) -> None:
    pair = isinstance(position, (list, tuple)) and len(position) == 2
    need(pair, f"{name}: 'position' must be [relation, index of an earlier include clause], got {position!r}")
    relation, target = position
    need(relation in RELATIONS, f"{name}: relation {relation!r} is unknown: {nearest(relation, RELATIONS)}")
    earlier = type(target) is int and 0 <= target < index
    need(earlier, f"{name}: position refers to include[{target!r}], which doesn't stand before it")


# ----------------------------------------------------------------------------------------------------------- rules


def check(detections: Sequence[Detection], item: dict[str, Any], threshold: float | None = None) -> dict[str, Any]:
    """{object, count, color, position, ok, reason} of one image.

    Checks are bool, or None where the item doesn't ask: object, every named class is there; count, as often as named, and
    no exclude clause holds; color, position. ok: GenEval's verdict, all that were asked hold. reason: what failed.
    threshold: the confidence to exceed; None takes GenEval's, 0.3, and 0.9 for the tag "counting".
    """
    if threshold is None:
        threshold = COUNTING_THRESHOLD if item["tag"] == "counting" else THRESHOLD
    objects = _by_class(detections, threshold)
    result: dict[str, Any] = dict.fromkeys(CHECKS)
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []
    used: set[int] = set()

    def judge(name: str, holds: bool, reason: str) -> bool:
        result[name] = holds and result[name] is not False
        if not holds:
            reasons.append(reason)
        return holds

    for clause in item["include"]:
        name, n = clause["class"], clause["count"]
        found = _candidates(objects.get(name, []), clause, item["include"], used)[:n]
        judge("object", bool(found), f"no {name}")
        matched = judge("count", len(found) >= n, f"expected {name}>={n}, found {len(found)}")
        if "color" in clause:
            colors = [_color(d, item) for d in found]
            reason = f"expected {n} {clause['color']} {name}, found {', '.join(colors) or 'none'}"
            matched &= judge("color", colors.count(clause["color"]) >= n, reason)
        if "position" in clause:
            relation, target = clause["position"]
            others = groups[target]
            holds = matched and others is not None
            holds = holds and all(relation in relative_position(a, b) for a in found for b in others or ())
            matched &= judge("position", holds, f"expected {name} {relation} {item['include'][target]['class']}")
        used.update(id(d) for d in found)
        groups.append(found if matched else None)
    for clause in item.get("exclude") or []:
        name, n = clause["class"], clause["count"]
        here = len(objects.get(name, []))
        judge("count", here < n, f"expected {name}<{n}, found {here}")
    return result | {"ok": not reasons, "reason": "; ".join(reasons)}


def relative_position(a: Detection, b: Detection) -> set[str]:
    """Where a stands relative to b: the relations of RELATIONS that hold.

    The centres' offset, shrunk on each axis by 0.1 of the two boxes' extents, over its own length; beyond half is a relation.
    """
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a["box"][:4], b["box"][:4]
    offset = ((ax1 + ax2 - bx1 - bx2) / 2, (ay1 + ay2 - by1 - by2) / 2)
    sizes = (abs(ax2 - ax1) + abs(bx2 - bx1), abs(ay2 - ay1) + abs(by2 - by1))
    shrunk = [math.copysign(max(abs(o) - POSITION_MARGIN * s, 0.0), o) for o, s in zip(offset, sizes)]
    if max(map(abs, shrunk)) < 1e-3:
        return set()
    dx, dy = (s / math.hypot(*offset) for s in shrunk)
    holds = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return {relation for relation, true in zip(RELATIONS, holds) if true}


def _by_class(detections: Sequence[Detection], threshold: float) -> dict[str, list[Detection]]:
    """Objects above the threshold of each class, the most confident first, at most MAX_OBJECTS."""
    objects: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d["score"]):
        if detection["score"] > threshold and len(objects.setdefault(detection["class"], [])) < MAX_OBJECTS:
            objects[detection["class"]].append(detection)
    return objects


def _candidates(found: list[Detection], clause: dict, include: list[dict], used: set[int]) -> list[Detection]:
    """Objects for a clause in the order in which it takes them; of its colour first where other clauses name its class."""
    if sum(other["class"] == clause["class"] for other in include) == 1:
        return found
    color = clause.get("color")
    return sorted((d for d in found if id(d) not in used), key=lambda d: color is not None and d.get("color") != color)


def _color(detection: Detection, item: dict[str, Any]) -> str:
    if not isinstance(detection.get("color"), str):
        raise ValueError(
            f"the prompt {item['prompt']!r} asks for colours, but the detector gave a {detection['class']} without "
            "'color'; add one to its answer"
        )
    return detection["color"]


# ---------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class GenEvalReport:
    """Shares in [0, 1]. overall is GenEval's score, the mean over tags: each weighs the same however many prompts it has."""

    overall: float
    pass_at_1: float  # images that are right
    pass_at_n: float  # prompts with at least one right image of `samples`
    all_n: float  # prompts whose images are all right
    tags: dict[str, float]  # share of right images
    checks: dict[str, float]  # the same of each check, among the images of prompts that ask for it
    prompts: int
    samples: int
    items: list[dict[str, Any]] = field(repr=False, default_factory=list)  # one an image

    def table(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table("", "share right", "images", box=box.SIMPLE)
        for tag, share in self.tags.items():
            table.add_row(tag, f"{share:.2%}", str(sum(item["tag"] == tag for item in self.items)))
        for name, share in (("overall (mean over tags)", self.overall), ("pass@1", self.pass_at_1)):
            table.add_row(name, f"{share:.2%}", str(len(self.items)))
        if self.samples > 1:
            table.add_row(f"pass@{self.samples}", f"{self.pass_at_n:.2%}", str(len(self.items)))
        output = io.StringIO()
        Console(file=output, width=100, color_system=None).print(table)
        return "\n".join(line.rstrip() for line in output.getvalue().strip("\n").splitlines())

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        text = json.dumps({"schema_version": 1} | asdict(self), indent=2, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text


def evaluate(
    images: Tensor | Sequence[Tensor],
    metadata: Sequence[dict[str, Any]],
    detector: Detector,
    *,
    samples: int = 1,
    threshold: float | None = None,
) -> GenEvalReport:
    """Check every image against its item.

    images: uint8 [N,3,H,W] or a sequence of uint8 [3,H,W], `samples` of each item, in the items' order.
    threshold: as in `check`; None takes the detector's own `threshold`, if it has one.
    """
    if samples < 1 or len(images) != samples * len(metadata) or not metadata:
        raise ValueError(f"need {samples} images for each of {len(metadata)} items; got {len(images)}")
    for i, item in enumerate(metadata):
        check_metadata(item, f"item {i}")
    threshold = getattr(detector, "threshold", None) if threshold is None else threshold
    items = []
    for i, image in enumerate(tqdm(images, desc="geneval", delay=2, leave=False)):
        item = metadata[i // samples]
        verdict = check(detector(image), item, threshold)
        items.append({"tag": item["tag"], "prompt": item["prompt"], "sample": i % samples} | verdict)
    ok = [[item["ok"] for item in items[i : i + samples]] for i in range(0, len(items), samples)]
    tags = {tag: _share(i["ok"] for i in items if i["tag"] == tag) for tag in dict.fromkeys(i["tag"] for i in items)}
    asked = {name: [i[name] for i in items if i[name] is not None] for name in CHECKS}
    return GenEvalReport(
        overall=sum(tags.values()) / len(tags),
        pass_at_1=_share(item["ok"] for item in items),
        pass_at_n=_share(map(any, ok)),
        all_n=_share(map(all, ok)),
        tags=tags,
        checks={name: _share(answers) for name, answers in asked.items() if answers},
        prompts=len(metadata),
        samples=samples,
        items=items,
    )


def _share(answers: Iterable[bool]) -> float:
    counted = list(answers)
    return sum(counted) / len(counted)


@dataclass
class GenEvalScorer:
    """GenEval as a scorer and reward: the columns tag, include and exclude of the data are the metadata.

    Returns {"ok", "object", "count", "color", "position"}, 0 or 1 an image [N]; NaN where a prompt doesn't ask.
    """

    detector: Detector
    threshold: float | None = None
    name: str = "geneval"
    higher_is_better: bool = True
    range: tuple[float, float] = (0.0, 1.0)

    def __call__(self, images: Tensor, prompts: list[str] | None = None, **columns: list) -> dict[str, Tensor]:
        if prompts is None or "include" not in columns or "tag" not in columns:
            raise ValueError(
                "geneval needs prompts and the columns 'tag' and 'include' (and 'exclude', if there is one)"
            )
        excludes = columns.get("exclude") or [[]] * len(prompts)
        parts = zip(columns["tag"], prompts, columns["include"], excludes)
        metadata = [{"tag": t, "prompt": p, "include": i, "exclude": e or []} for t, p, i, e in parts]
        items = evaluate(images, metadata, self.detector, threshold=self.threshold).items
        values = {name: [math.nan if i[name] is None else float(i[name]) for i in items] for name in ("ok", *CHECKS)}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


# ---------------------------------------------------------------------------------------------------------- shapes


class ShapesDetector:
    """The exact detector of the world "shapes": class is the shape, color its colour, score its template's overlap."""

    def __init__(self) -> None:
        from diffgen.worlds import shapes

        self.threshold = shapes.MIN_IOU  # what the world's verifier demands of every object

    def __call__(self, image: Tensor) -> list[Detection]:
        from diffgen.worlds import shapes

        pixels = image.cpu().numpy()
        found = shapes.segment(pixels)
        boxes = _boxes(pixels, [(f.x, f.y) for f in found])
        return [{"class": f.shape, "color": f.color, "score": f.iou, "box": b} for f, b in zip(found, boxes)]


def _boxes(pixels: Any, centres: list[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """Box of the foreground component at each centre; the centre itself where a ragged one has a hole there."""
    import numpy as np
    from scipy import ndimage

    from diffgen.worlds import shapes

    background = np.array(shapes.BACKGROUND)[:, None, None]
    label, _ = ndimage.label(abs(pixels.astype(int) - background).max(0) > 60)  # about half opacity
    slices = ndimage.find_objects(label)
    boxes = []
    for x, y in centres:
        component = label[round(y), round(x)]
        if component:
            rows, columns = slices[component - 1]
            boxes.append((float(columns.start), float(rows.start), float(columns.stop), float(rows.stop)))
        else:
            boxes.append((x, y, x, y))
    return boxes


def shapes_metadata(scenes: Iterable[Any]) -> list[dict[str, Any]]:
    """GenEval's metadata for scenes of `diffgen.worlds.shapes`: tags colors, counting (with exclude), position."""
    return [_shapes_item(scene) for scene in scenes]


def _shapes_item(scene: Any) -> dict[str, Any]:
    (color, shape), n = scene.objects[0], len(scene.objects)
    if scene.relation:  # the first object stands so relative to the second, which therefore comes first here
        other_color, other_shape = scene.objects[1]
        target = {"class": other_shape, "count": 1, "color": other_color}
        include = [target, {"class": shape, "count": 1, "color": color, "position": [scene.relation, 0]}]
        return {"tag": "position", "prompt": scene.prompt, "include": include}
    item = {"prompt": scene.prompt, "include": [{"class": shape, "count": n, "color": color}]}
    if n == 1:
        return {"tag": "colors"} | item
    return {"tag": "counting"} | item | {"exclude": [{"class": shape, "count": n + 1}]}
