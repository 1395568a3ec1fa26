"""What `evaluate` and `compare` do before they compute: check every argument, then read each source once."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffgen.eval.extractors import get_extractor
from diffgen.eval.features import Stats, load_stats, require_same_extractor
from diffgen.eval.images import ImageSource
from diffgen.eval.metrics_table import METRICS, Verifier, check_inputs, checked_names
from diffgen.eval.passes import ImageSet, Judge, opened, read
from diffgen.eval.scorers import get_scorer

ScorerLike = str | Callable[..., Any]


@dataclass
class Work:
    """Everything that was read, before anything is computed."""

    generated: dict[str, ImageSet]  # one set, or two to compare
    others: dict[str, ImageSet]  # reference, train, test
    stats: Stats | None
    groups: list[Hashable] | None
    names: list[str]  # metrics to compute
    skipped: dict[str, str]
    skip: bool  # leave out what fails
    judged: dict[str, bool | None]  # of the scorers: is higher better
    extractor: str | None
    seed: int
    ci_samples: int
    k: int

    def inputs(self, key: str) -> dict[str, Any]:
        """need -> value, for one of the generated sets."""
        own = self.generated[key]
        found: dict[str, Any] = {
            "x": own.x,
            "logits": own.logits,
            "groups": self.groups,
            "k": self.k,
            "seed": self.seed,
        }
        found["y"] = self.others["reference"].x if "reference" in self.others else None
        return found | {name: self.others[name].x if name in self.others else None for name in ("train", "test")}

    def clusters(self, key: str) -> Sequence[Hashable] | None:
        """The labels by which images are resampled together; None when they are all different, or all the same."""
        labels = self.groups or self.generated[key].prompts
        return labels if labels and 1 < len(set(labels)) < len(labels) else None


def prepare(
    generated: dict[str, ImageSource], reference, train, test, prompts, groups, metrics, extractor, scorers, verifier, n,
    batch_size, seed, ci_samples, cache, on_bad_image, device, k, progress, assume_extractor, distributed,
) -> Work:  # fmt: skip
    """Checks everything that can be checked, then reads each source once."""
    scorers = [scorer_of(s) for s in scorers]
    names, skip = checked_names(metrics, verifier, bool(scorers)), isinstance(metrics, str)
    if ci_samples < 0 or ci_samples == 1:
        raise ValueError(f"ci_samples must be 0 (no intervals) or at least 2; got {ci_samples}")
    for option, value in (("k", k), ("n", n), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1; got {value}")
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list of texts, one an image; got the text {prompts!r}")
    texts = None if prompts is None else list(prompts)[: n or None]
    labels = groups.tolist() if isinstance(groups, Tensor) else None if groups is None else list(groups)
    labels = labels[:n] if labels and n else labels

    stats = _stats(reference, assume_extractor)
    sources = {key: opened(source, n, seed, on_bad_image) for key, source in generated.items()}
    own_texts = texts or getattr(next(iter(sources.values())), "prompts", None)
    given = {"y": stats or reference, "prompts": own_texts, "verifier": verifier, "train": train, "test": test}
    given["groups"] = labels or own_texts
    skipped = check_inputs(names, given, skip)
    names = [name for name in names if name not in skipped]
    needed = {need for name in names for need in METRICS[name].needs}

    extract = get_extractor(extractor, device=device) if needed & {"x", "logits"} else None
    if stats is not None and extract is not None and "y" in needed:
        require_same_extractor(replace(stats, id=extract.id), stats)
    if extract is not None and extract.head is None and skip and "is" in names:
        skipped["is"] = f"needs a classifier; {extract.id} is none"
        names.remove("is")
    logits = extract is not None and "is" in names
    wanted = {"reference": ("y", None if stats else reference), "train": ("train", train), "test": ("test", test)}
    if extract is not None and test is not None and "train" in needed:
        needed.add("test")  # as the baseline
    others = {
        key: opened(source, n if key == "reference" else None, seed, on_bad_image)
        for key, (need, source) in wanted.items()
        if need in needed and source is not None
    }

    judge, judged = _judge(names, scorers, verifier)
    how: dict[str, Any] = {"cache": cache, "batch_size": batch_size, "progress": progress, "distributed": distributed}
    own = {
        key: read(key, source, extract, judge=judge, prompts=texts, logits=logits, **how)
        for key, source in sources.items()
    }
    read_others = {key: read(key, source, extract, **how) for key, source in others.items()}
    for key, images in own.items():
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"groups must be one an image; got {len(labels)} groups and {len(images)} images in {key}")
    first = next(iter(own.values()))
    return Work(
        own, read_others, stats, list(labels or first.prompts or []) or None, names, skipped, skip, judged,
        None if extract is None else extract.id, seed, ci_samples, k,
    )  # fmt: skip


def _stats(reference: Any, assume_extractor: str | None) -> Stats | None:
    """Of a reference that is statistics. An .npz of images is none."""
    if isinstance(reference, Stats):
        return reference
    if not isinstance(reference, (str, Path)) or Path(reference).suffix.lower() != ".npz":
        return None
    try:
        with np.load(reference, allow_pickle=False) as file:
            if "images" in file.files or "mu" not in file.files:
                return None
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile):
        return None  # whoever reads it says what is wrong
    return load_stats(reference, assume_extractor)


def scorer_of(scorer: ScorerLike) -> Callable[..., Any]:
    """A scorer itself, or the one of "name" or "name:option=value:option=value"."""
    if not isinstance(scorer, str):
        if not callable(scorer):
            raise TypeError(f"a scorer must be a name or a callable; got {type(scorer).__name__}")
        return scorer
    import yaml

    name, *pairs = scorer.split(":")
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"a scorer is written name:option=value; got {scorer!r}")
    return get_scorer(name, **{key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in pairs)})


def _judge(names: list[str], scorers: list, verifier: Verifier | None) -> tuple[Judge | None, dict[str, bool | None]]:
    """One function for all values of single images; and, filled as they appear, whether higher is better."""
    titles = [getattr(s, "name", getattr(s, "__name__", type(s).__name__)) for s in scorers]
    measured = [m for m in names if "images" in METRICS[m].needs and (m not in titles or m == "verifier")]
    if not measured and not scorers:
        return None, {}
    better: dict[str, bool | None] = {}

    def judge(images: Tensor, prompts: list[str] | None) -> dict[str, Tensor]:
        inputs = {"images": images, "prompts": prompts, "verifier": verifier}
        found: dict[str, Tensor] = {}
        for name in measured:
            found[name] = METRICS[name].function(*(inputs[need] for need in METRICS[name].needs))
        for title, scorer in zip(titles, scorers):
            answers = scorer(images, prompts)
            many = answers if isinstance(answers, dict) else {title: answers}
            for key, answer in many.items():
                name = key if key == title else f"{title}/{key}"
                values = torch.as_tensor(answer).detach().cpu().double()
                if values.shape != (len(images),):
                    raise ValueError(f"scorer {name!r} must return [{len(images)}] values; got {list(values.shape)}")
                if name in found:
                    raise ValueError(f"{name!r} is measured twice: by two scorers, or by a scorer and a metric")
                found[name], better[name] = values, getattr(scorer, "higher_is_better", None)
        return found

    return judge, better
