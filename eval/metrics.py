"""The metrics as `torchmetrics.Metric`: they stream, synchronise across processes and plug into Lightning.

    fd = FrechetDistance(feature="efficientnet-lite0")     # or a module, or None: update then takes features [B,D]
    fd.update(images, real=True); fd.update(samples, real=False); fd.compute()

The value is that of the function of the same name in `functional` on all rows, for any split into batches and processes:

    moments   FrechetDistance, FrechetFloor, MeanPairwise("l2sq")     O(D^2) whatever N; see `states`
    gram      Vendi, MeanPairwise("cosine")                           O(D^2) whatever N
    rows      KernelDistance, CMMD, PrecisionRecall, InceptionScore, MeanPairwise("l2")    the features themselves

In a `MetricCollection`, metrics with one kind of state and one extractor form a compute group: features are computed once.

What differs from torchmetrics' own: values are float64 and no cast touches the states; the extractor is neither in
`state_dict()` nor in `parameters()`; a process without data, a batch that raises in `forward` and `compute()` after
`merge_state` are right; `forward` gives NaN where a batch alone has too few rows (always, where two sets are needed),
while `compute()` raises. Inputs: floats are rounded, not truncated, to uint8, and must be in [0,1].
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from diffgen.eval import functional, states
from diffgen.eval.extractors import Extractor, get_extractor
from diffgen.eval.functional._check import features as checked

Feature = str | int | nn.Module | Extractor | None


def not_padding(n: int, world_size: int, rank: int) -> Tensor:
    """Which of a rank's samples are real: bool [ceil(n/world_size)], for `keep` of `update`.

    Samplers of DDP and accelerate give every rank equally many of n samples, rank, rank + W, ..., and repeat samples to
    fill the last round; counted twice, these change every metric.
    """
    return torch.arange(rank, math.ceil(n / world_size) * world_size, world_size) < n


class FeatureMetric(Metric):
    """What the metrics below share. The subclass says which rows it keeps how, and `value()` is its number.

    feature:              name, id or module of `get_extractor`, or an `Extractor` (share one to save memory); a number is
                          a layer of Inception-v3, as in torchmetrics; None: `update` receives features [B,D].
    normalize:            with a feature: True, images are floats in [0,1]; False, uint8.
    reset_real_features:  False: `reset()` keeps the reference rows.
    """

    is_differentiable: bool = False
    full_state_update: bool = False
    kind: str = "rows"  # moments, gram, rows
    sides: tuple[str, ...] = ("fake", "real")
    needs: tuple[str, ...] = ("fake", "real")  # sides without which there is no value
    parts: tuple[str, ...] = ()  # keys of a value that is a dict

    def __init__(
        self, feature: Feature = None, normalize: bool = False, reset_real_features: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if feature is None and normalize:
            raise ValueError("normalize=True says that update receives images; it needs a feature to extract from them")
        self.normalize, self.reset_real_features = normalize, reset_real_features
        # held where nn.Module doesn't look: not a submodule, so neither saved nor trained nor put into train mode
        self._extractor = None if feature is None else _extractor(feature)
        self._forwarding = False
        # Collections group metrics by the names and first values of their states. Two extractors may agree on the first
        # (nothing yet), so the name tells them apart.
        identity = "" if self._extractor is None else f"{self._extractor.id}|{normalize}"
        tag = "_" + hashlib.sha256(identity.encode()).hexdigest()[:8] if identity else ""
        tag += "" if reset_real_features else "_kept"
        self._names = {side: f"{side}_{self.kind}{tag}" for side in self.sides}
        reductions: dict[str, Any] = {"moments": states.merge_stack, "gram": states.merge_gram, "rows": "cat"}
        for name in self._names.values():
            default: Any = [] if self.kind == "rows" else states.empty()
            self.add_state(name, default, dist_reduce_fx=reductions[self.kind])

    # --- what subclasses define -------------------------------------------------------------------------------------

    def value(self) -> float | dict[str, float]:
        raise NotImplementedError

    def min_rows(self) -> int:
        return 2

    # --- data in ----------------------------------------------------------------------------------------------------

    def update(self, imgs: Tensor, real: bool, keep: Tensor | None = None) -> None:  # type: ignore[override]
        """imgs: images [B,3,H,W], or features [B,D] without a feature. real: reference or generated.

        keep: bool [B], rows that count; see `not_padding`.
        """
        self._add(imgs, "real" if real else "fake", keep)

    def _add(self, imgs: Tensor, side: str, keep: Tensor | None) -> None:
        if side not in self._names:
            return
        if keep is not None:
            if keep.dtype != torch.bool or keep.shape != (len(imgs),):
                raise ValueError(f"keep must be bool [{len(imgs)}]; got {keep.dtype} {list(keep.shape)}")
            imgs = imgs[keep.to(imgs.device)]
        if len(imgs) == 0:
            return
        rows = self._features(imgs)
        name = self._names[side]
        held = getattr(self, name)
        if self.kind == "rows":
            if held and held[0].shape[1] != rows.shape[1]:
                raise ValueError(f"features must have D={held[0].shape[1]} as before; got D={rows.shape[1]}")
            held.append(rows if rows.dtype == torch.float64 else rows.float())
            return
        size = rows.shape[1] + (1 if self.kind == "moments" else 2)
        if len(held) == 1:  # nothing yet, of unknown width
            held = held.new_zeros(size, size)
        if len(held) != size:
            raise ValueError(f"features must have as many columns as before; got D={rows.shape[1]}")
        add = states.add_moments if self.kind == "moments" else states.add_gram
        setattr(self, name, add(held, rows.to(held.device)))

    def _features(self, imgs: Tensor) -> Tensor:
        if self._extractor is None:
            return checked(imgs, "features", rows=1).to(self.device)
        if not isinstance(imgs, Tensor):
            raise TypeError(f"images must be a tensor [B,3,H,W]; got {type(imgs).__name__}")
        if imgs.is_floating_point() != self.normalize:
            hint = (
                "floats in [0,1] need normalize=True" if not self.normalize else "normalize=True takes floats in [0,1]"
            )
            raise TypeError(f"images are {imgs.dtype}, but normalize={self.normalize}: {hint}")
        from diffgen.eval.images import load_images

        with torch.autocast(imgs.device.type, enabled=False):  # the network's dtype is the extractor's business
            features = self._extractor(load_images(imgs.detach()))
        return checked(features, "features", rows=1).to(self.device)

    # --- value out --------------------------------------------------------------------------------------------------

    def compute(self) -> Tensor | dict[str, Tensor]:
        counts = {side: self.count(side) for side in self.needs}
        if min(counts.values()) < self.min_rows():
            if self._forwarding:
                nan = torch.tensor(math.nan, dtype=torch.float64, device=self.device)
                return dict.fromkeys(self.parts, nan) if self.parts else nan
            if self._is_synced:  # torchmetrics doesn't, when compute raises
                self.unsync()
            found = " and ".join(f"{n} {side}" for side, n in counts.items())
            raise ValueError(f"{type(self).__name__} needs at least {self.min_rows()} rows a side; got {found}")
        value = self.value()
        if isinstance(value, dict):
            return {part: self._float64(v) for part, v in value.items()}
        return self._float64(value)

    def _float64(self, value: float) -> Tensor:
        device = "cpu" if self.device.type == "mps" else self.device
        return torch.tensor(value, dtype=torch.float64, device=device)

    def count(self, side: str) -> int:
        """Rows of a side, "fake" or "real", so far (on this process)."""
        held = getattr(self, self._names[side])
        if self.kind != "rows":
            return states.count(held)
        return len(held) if isinstance(held, Tensor) else sum(map(len, held))

    def state(self, side: str) -> Tensor:
        """The packed state of a side, or its rows [N,D]."""
        held = getattr(self, self._names[side])
        return torch.cat(held) if isinstance(held, list) else held

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        return self._plot(val, ax)

    # --- torchmetrics' machinery ------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The batch's own value, NaN where a batch alone has none; the batch is added. A batch that raises adds nothing."""
        held = {name: getattr(self, name) for name in self._names.values()}
        if self.dist_sync_on_step:  # else the batch gets states of its own, and these stay as they are
            held = {name: deepcopy(state) for name, state in held.items()}
        held = {name: list(state) if isinstance(state, list) else state for name, state in held.items()}
        flags = {name: getattr(self, name) for name in ("_update_count", "compute_on_cpu", "_to_sync", "_computed")}
        self._forwarding = True
        try:
            return super().forward(*args, **kwargs)
        except BaseException:
            for name, value in (
                held | flags | {"_should_unsync": True, "_enable_grad": False, "_is_synced": False}
            ).items():
                setattr(self, name, value)
            raise
        finally:
            self._forwarding = False

    def reset(self) -> None:
        name = self._names.get("real")
        # inside forward, torchmetrics adds the old state to the batch's: kept rows would count twice
        keep = name is not None and not self.reset_real_features and not self._forwarding
        held = getattr(self, name) if keep and name else None
        held = list(held) if isinstance(held, list) else held
        super().reset()
        if keep and name:
            setattr(self, name, held)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        if isinstance(incoming_state, FeatureMetric):
            mine, other = set(self._names.values()), set(incoming_state._names.values())
            if mine != other:
                raise ValueError(f"states of different features can't be merged: {sorted(mine)} and {sorted(other)}")
        super().merge_state(incoming_state)
        self._computed = None  # torchmetrics would answer with the value from before
        self._update_count = max(self._update_count, 1)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        if self.kind != "rows":
            incoming_state = dict(incoming_state)
            for name in self._names.values():
                mine, other = getattr(self, name), incoming_state.get(name)
                if other is not None and len(mine) == 1 < len(other):
                    setattr(self, name, torch.zeros_like(other))
                elif other is not None and len(other) == 1 < len(mine):
                    incoming_state[name] = torch.zeros_like(mine)
        super()._reduce_states(incoming_state)

    def _sync_dist(self, dist_sync_fn: Callable = gather_all_tensors, process_group: Any | None = None) -> None:
        """First agree on width and dtype, so that a process without data takes part with an empty set of that width."""
        mine = {name: getattr(self, name) for name in self._names.values()}
        rows = [row for held in mine.values() if isinstance(held, list) for row in held]
        width = max([len(s) if isinstance(s, Tensor) else 1 for s in mine.values()] + [r.shape[1] for r in rows])
        double = any(row.dtype == torch.float64 for row in rows)
        size = torch.tensor([width if rows or self.kind != "rows" else 0, double], device=self.device)
        sizes = torch.stack(dist_sync_fn(size, group=process_group or self.process_group)).tolist()
        unknown = 0 if self.kind == "rows" else 1
        widths = {width for width, _ in sizes} - {unknown}
        if len(widths) > 1:
            raise ValueError(f"processes have features of different width: {sorted(widths)}")
        width = widths.pop() if widths else unknown
        dtype = torch.float64 if any(double for _, double in sizes) else torch.float32
        for name, held in mine.items():
            if isinstance(held, list):
                nothing = torch.zeros(0, width, dtype=dtype, device=self.device)
                setattr(self, name, [torch.cat([nothing, *(row.to(self.device, dtype) for row in held)])])
            elif len(held) == 1 < width:
                setattr(self, name, held.new_zeros(width, width))
        super()._sync_dist(dist_sync_fn, process_group)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in self._names.values():  # update changes states in place, and these are still the caller's
            setattr(self, name, deepcopy(getattr(self, name)))

    def _apply(self, fn: Callable, exclude_state: Any = "") -> nn.Module:
        """Moves states and extractor to another device; no cast reaches them."""
        device = fn(torch.zeros(1, device=self._device)).device

        def move(tensor: Tensor) -> Tensor:
            no_float64 = device.type == "mps" and tensor.dtype == torch.float64
            return tensor if no_float64 or tensor.device == device else tensor.to(device)

        super()._apply(move, exclude_state)
        if self._extractor is not None:
            self._extractor.network.to(device)
            if self._extractor.head is not None:
                self._extractor.head.to(device)
        return self


def _extractor(feature: str | int | nn.Module | Extractor) -> Extractor:
    if isinstance(feature, bool):
        raise TypeError("feature must be a name, a number of Inception features, a module or an Extractor; got a bool")
    return get_extractor(f"inception-v3-compat/{feature}" if isinstance(feature, int) else feature)


class OneSetMetric(FeatureMetric):
    """A metric of the generated rows alone: `update(imgs)`; what comes with real=True is left out."""

    sides = ("fake",)
    needs = ("fake",)

    def update(self, imgs: Tensor, real: bool = False, keep: Tensor | None = None) -> None:  # type: ignore[override]
        self._add(imgs, "real" if real else "fake", keep)


# ---------------------------------------------------------------------------------------------------------- metrics


class FrechetDistance(FeatureMetric):
    """`functional.fd`, from streamed moments. arXiv:1706.08500."""

    higher_is_better: bool = False
    plot_lower_bound: float = 0.0
    kind = "moments"

    def value(self) -> float:
        return functional.fd_from_stats(*states.mean_cov(self.state("fake")), *states.mean_cov(self.state("real")))


class FrechetFloor(FeatureMetric):
    """`functional.fd_floor` of the reference: the FD to expect at these counts if both sets were of one distribution."""

    higher_is_better = None
    kind = "moments"

    def value(self) -> float:
        _, sigma = states.mean_cov(self.state("real"))
        spectrum = torch.linalg.eigvalsh(sigma).clamp(min=0)
        return functional.fd_floor(spectrum, self.count("fake"), self.count("real"))


class MeanPairwise(FeatureMetric):
    """`functional.mean_pairwise` of the generated rows, by "cosine", "l2sq" or "l2" distance."""

    higher_is_better: bool = True
    needs = ("fake",)

    def __init__(self, feature: Feature = None, metric: str = "cosine", **kwargs: Any) -> None:
        kinds = {"cosine": "gram", "l2sq": "moments", "l2": "rows"}
        if metric not in kinds:
            raise ValueError(f"metric must be one of {', '.join(map(repr, kinds))}; got {metric!r}")
        # each shares the state of the metrics of its kind, which keep the reference as well, or don't
        self.kind = kinds[metric]
        self.sides = ("fake",) if metric == "cosine" else ("fake", "real")
        super().__init__(feature, **kwargs)
        self.metric = metric

    def update(self, imgs: Tensor, real: bool = False, keep: Tensor | None = None) -> None:  # type: ignore[override]
        self._add(imgs, "real" if real else "fake", keep)

    def value(self) -> float:
        state = self.state("fake")
        if self.metric == "cosine":
            return states.gram_mean_pairwise(state)
        if self.metric == "l2sq":
            return 2 * float(states.mean_cov(state)[1].trace())
        return functional.mean_pairwise(state, "l2")


class Vendi(OneSetMetric):
    """`functional.vendi` of order q of the generated rows. arXiv:2210.02410, arXiv:2310.12952."""

    higher_is_better: bool = True
    plot_lower_bound: float = 1.0
    kind = "gram"

    def __init__(self, feature: Feature = None, q: float = 1, **kwargs: Any) -> None:
        super().__init__(feature, **kwargs)
        if not q >= 0:
            raise ValueError(f"q must be 0 or more (inf allowed); got {q}")
        self.q = q

    def value(self) -> float:
        return states.gram_vendi(self.state("fake"), self.q)


class KernelDistance(FeatureMetric):
    """`functional.kid`: over all pairs (subset_size None), or the mean over random subsets. arXiv:1801.01401.

    Subsets are drawn from rows in the order of processes, then batches: another split draws others.
    """

    higher_is_better: bool = False

    def __init__(
        self,
        feature: Feature = None,
        subset_size: int | None = None,
        subsets: int = 100,
        seed: int = 2020,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature, **kwargs)
        self.options = {"subset_size": subset_size, "subsets": subsets, "seed": seed}

    def value(self) -> float:
        return functional.kid(self.state("fake"), self.state("real"), **self.options)  # type: ignore[arg-type]


class CMMD(FeatureMetric):
    """`functional.cmmd`, meant for CLIP embeddings. unit: scale rows to length 1. arXiv:2401.09603."""

    higher_is_better: bool = False

    def __init__(
        self, feature: Feature = None, sigma: float = 10.0, estimator: str = "v", unit: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(feature, **kwargs)
        self.sigma, self.estimator, self.unit = sigma, estimator, unit

    def min_rows(self) -> int:
        return 1 if self.estimator == "v" else 2

    def value(self) -> float:
        return functional.cmmd(self.state("fake"), self.state("real"), self.sigma, self.estimator, self.unit)


class PrecisionRecall(FeatureMetric):
    """`functional.prdc`: {precision, recall, density, coverage}. arXiv:1904.06991, arXiv:2002.09797."""

    higher_is_better: bool = True
    parts = ("precision", "recall", "density", "coverage")

    def __init__(
        self, feature: Feature = None, k: int = 5, max_points: int | None = 10_000, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(feature, **kwargs)
        self.k, self.max_points, self.seed = k, max_points, seed

    def min_rows(self) -> int:
        return self.k + 1

    def value(self) -> dict[str, float]:
        X, Y = self.state("fake"), self.state("real")
        return functional.prdc(X, Y, k=self.k, max_points=self.max_points, seed=self.seed)._asdict()


class InceptionScore(OneSetMetric):
    """`functional.inception_score`'s mean; of logits [B,C]. arXiv:1606.03498.

    Named extractors that are classifiers give their logits; a module, or update without a feature, must give logits.

    With more than one split, the rows' order, processes before batches, decides which share a split.
    """

    higher_is_better: bool = True
    plot_lower_bound: float = 1.0

    def __init__(
        self, feature: Feature = None, splits: int = 10, shuffle: bool = True, seed: int = 2020, **kwargs: Any
    ) -> None:
        super().__init__(feature, **kwargs)
        self.splits, self.shuffle, self.seed = splits, shuffle, seed

    def _features(self, imgs: Tensor) -> Tensor:
        rows = super()._features(imgs)
        if self._extractor is None or self._extractor.head is None:
            return rows
        return self._extractor.logits(rows).to(self.device)

    def min_rows(self) -> int:
        return self.splits

    def value(self) -> float:
        return functional.inception_score(self.state("fake"), self.splits, self.shuffle, self.seed)[0]
