"""torchmetrics classes: equal to `functional` on all rows, however these arrive; torchmetrics' traps, each one a test."""

import json
import math
import os
import pickle
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from diffgen.eval import functional as f
from diffgen.eval import metrics as M

ROW, COLUMN = torch.arange(1, 16, dtype=torch.float64)[:, None], torch.arange(1, 5, dtype=torch.float64)[None, :]
X = torch.sin(1.3 * ROW[:12] * COLUMN)
Y = torch.cos(0.7 * ROW * (COLUMN + 1)) + 0.2


def build():
    return {
        "fd": M.FrechetDistance(),
        "floor": M.FrechetFloor(),
        "l2sq": M.MeanPairwise(metric="l2sq"),
        "cosine": M.MeanPairwise(),
        "vendi": M.Vendi(q=2),
        "kid": M.KernelDistance(),
        "cmmd": M.CMMD(),
        "prdc": M.PrecisionRecall(k=3),
        "l2": M.MeanPairwise(metric="l2"),
        "is": M.InceptionScore(splits=1),
    }


EXPECTED = {
    "fd": f.fd(X, Y),
    "floor": f.fd_floor(f.spectrum(Y), 12, 15),
    "l2sq": f.mean_pairwise(X, "l2sq"),
    "cosine": f.mean_pairwise(X),
    "vendi": f.vendi(X, 2),
    "kid": f.kid(X, Y),
    "cmmd": f.cmmd(X, Y),
    "precision": 0.75,
    "recall": 1.0,
    "density": 0.9166666666666666,
    "coverage": 0.4666666666666667,
    "l2": f.mean_pairwise(X, "l2"),
    "is": f.inception_score(X, 1)[0],
}
NAMES = list(build())


def values(metric, name):
    found = metric.compute()
    return found if isinstance(found, dict) else {name: found}


def assert_expected(found, rel=1e-10):
    for name, value in found.items():
        assert value.dtype == torch.float64, name
        assert float(value) == pytest.approx(EXPECTED[name], rel=rel), name


def feed(metric, x_sizes=(12,), y_sizes=(15,)):
    for rows, sizes, real in ((X, x_sizes, False), (Y, y_sizes, True)):
        for part in rows.split(list(sizes)):
            metric.update(part, real=real)
    return metric


class Rows(nn.Module):
    """Features that come as they are."""

    num_features = 4

    def forward(self, x):
        return x


class Colours(nn.Module):
    """[B,3,H,W] -> [B,3]: mean colours, weighted."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x):
        return self.weight * x.mean((2, 3))


def images(n, seed):
    return torch.randint(0, 256, (n, 3, 6, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("x_sizes", "y_sizes"), [((12,), (15,)), ((1, 4, 7), (2, 12, 1)), ((1,) * 12, (1,) * 15)])
def test_the_value_is_that_of_functional_for_any_split(name, x_sizes, y_sizes):
    assert_expected(values(feed(build()[name], x_sizes, y_sizes), name))


def test_fd_equals_torchmetrics_on_the_same_features():
    from torchmetrics.image.fid import FrechetInceptionDistance

    theirs = feed(FrechetInceptionDistance(feature=Rows()))
    ours = feed(M.FrechetDistance())
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), rel=1e-9)


def test_an_extractor_gives_the_value_of_its_features():
    x, y = images(9, 0), images(8, 1)
    metric = M.FrechetDistance(feature=Colours())
    metric.update(x, real=False)
    metric.update(y, real=True)
    means = [(i.float() / 255).mean((2, 3)) for i in (x, y)]
    assert float(metric.compute()) == pytest.approx(f.fd(*means), rel=1e-6)


def test_normalize_rounds_floats_so_both_ways_agree():
    x, y = images(9, 0), images(8, 1)
    byte, unit = M.FrechetDistance(feature=Colours()), M.FrechetDistance(feature=Colours(), normalize=True)
    for metric, scale in ((byte, None), (unit, 255)):
        metric.update(x if scale is None else x / scale, real=False)
        metric.update(y if scale is None else y / scale, real=True)
    assert float(byte.compute()) == float(unit.compute())


def test_inception_score_takes_the_logits_of_a_classifier():
    from diffgen.eval.extractors import custom

    extractor, head = custom(Colours()), nn.Linear(3, 5)
    extractor.head = head
    metric = M.InceptionScore(feature=extractor, splits=1)
    metric.update(images(6, 0))
    with torch.no_grad():
        logits = head(extractor(images(6, 0)))
    assert float(metric.compute()) == pytest.approx(f.inception_score(logits, 1)[0], rel=1e-9)


def test_a_number_is_a_layer_of_inception(monkeypatch):
    asked, instead = [], M.get_extractor(Colours())
    monkeypatch.setattr(M, "get_extractor", lambda feature: asked.append(feature) or instead)
    M.FrechetDistance(feature=2048)
    assert asked == ["inception-v3-compat/2048"]
    with pytest.raises(TypeError, match="bool"):
        M.FrechetDistance(feature=True)


def test_wrong_kinds_of_images_are_refused():
    with pytest.raises(TypeError, match="normalize=True"):
        M.Vendi(feature=Colours()).update(images(2, 0) / 255)
    with pytest.raises(TypeError, match=r"takes floats in \[0,1\]"):
        M.Vendi(feature=Colours(), normalize=True).update(images(2, 0))
    with pytest.raises(ValueError, match=r"in \[0,1\]"):
        M.Vendi(feature=Colours(), normalize=True).update(images(2, 0) / 127.5 - 1)
    with pytest.raises(ValueError, match="needs a feature"):
        M.Vendi(normalize=True)


def test_features_that_are_not_finite_are_refused_by_row_and_add_nothing():
    metric = feed(M.FrechetDistance())
    bad = X.clone()
    bad[2, 0] = math.inf
    with pytest.raises(ValueError, match=r"rows \[2\]"):
        metric.update(bad, real=False)
    assert_expected({"fd": metric.compute()})


def test_another_width_is_refused():
    for metric in (M.FrechetDistance(), M.KernelDistance(), M.Vendi()):
        metric.update(X, real=False)
        with pytest.raises(ValueError, match="D=3"):
            metric.update(X[:, :3], real=False)


@pytest.mark.parametrize("name", NAMES)
def test_too_few_rows_raise_with_the_counts_and_the_metric_goes_on(name):
    metric = build()[name]
    metric.update(X[:0], real=False)
    metric.update(Y[:1], real=True)
    with pytest.raises(ValueError, match=r"needs at least \d rows a side; got 0 fake"):
        metric.compute()
    metric.reset()
    assert_expected(values(feed(metric), name))


# --- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_forward_adds_the_batch_and_gives_nan_where_a_batch_alone_has_no_value(name):
    metric = build()[name]
    for part, real in ((Y[:6], True), (X[:1], False), (X[1:], False), (Y[6:], True)):
        batch = metric(part, real=real)
        for value in batch.values() if isinstance(batch, dict) else [batch]:
            assert value.dtype == torch.float64
            assert math.isnan(value) or (not real and metric.needs == ("fake",))
    assert_expected(values(metric, name))


def test_forward_of_a_one_set_metric_gives_the_batch_value():
    metric = M.Vendi()
    metric(X[:5])
    assert float(metric(X[5:])) == pytest.approx(f.vendi(X[5:]), rel=1e-10)
    assert float(metric.compute()) == pytest.approx(f.vendi(X), rel=1e-10)


@pytest.mark.parametrize("name", ["fd", "vendi", "kid"])
def test_a_batch_that_raises_in_forward_loses_nothing(name):
    metric = feed(build()[name])
    with pytest.raises(ValueError, match="finite"):
        metric(X * math.nan, real=False)
    assert metric.update_count == 2
    assert_expected(values(metric, name))


@pytest.mark.parametrize("cls", [M.FrechetDistance, M.KernelDistance])
def test_kept_reference_rows_survive_reset_and_count_once(cls):
    metric = cls(reset_real_features=False)
    metric.update(Y, real=True)
    metric.update(Y, real=False)
    metric.reset()
    for part in (X[:5], X[5:]):
        metric(part, real=False)  # forward resets inside
    assert metric.count("real") == 15
    assert float(metric.compute()) == pytest.approx(EXPECTED["fd" if cls is M.FrechetDistance else "kid"], rel=1e-10)
    plain = cls()
    plain.update(Y, real=True)
    plain.reset()
    assert plain.count("real") == 0


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_merge_state_equals_one_metric_also_from_and_into_an_empty_one(name):
    a, b, empty = build()[name], build()[name], build()[name]
    a.update(X[:2], real=False)
    a.update(Y, real=True)
    b.update(X[2:], real=False)
    empty.merge_state(a)
    empty.merge_state(b)
    empty.merge_state(build()[name])
    assert_expected(values(empty, name))
    assert a.count("fake") == 2  # what was merged is untouched


def test_merge_state_after_compute_gives_the_new_value():
    a, b = feed(M.FrechetDistance(), (12,), (15,)), M.FrechetDistance()
    before = float(a.compute())
    b.update(X + 1, real=False)
    a.merge_state(b)
    assert float(a.compute()) == pytest.approx(f.fd(torch.cat([X, X + 1]), Y), rel=1e-10)
    assert float(a.compute()) != before


def test_states_of_different_features_do_not_merge():
    with pytest.raises(ValueError, match="different features"):
        M.Vendi(feature=Colours()).merge_state(M.Vendi(feature=Colours(2.0)))


def test_padding_of_a_distributed_sampler_is_left_out():
    ranks = [M.FrechetDistance() for _ in range(4)]
    for rank, metric in enumerate(ranks):
        order = torch.arange(rank, 12, 4) % 10  # DistributedSampler: 10 rows on 4 ranks, two of them twice
        keep = M.not_padding(10, 4, rank)
        assert len(order) == len(keep) == 3
        metric.update(X[order], real=False, keep=keep)
        metric.update(Y[order], real=True, keep=keep)
    for other in ranks[1:]:
        ranks[0].merge_state(other)
    assert float(ranks[0].compute()) == pytest.approx(f.fd(X[:10], Y[:10]), rel=1e-10)


# --- collections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["update", "forward"])
def test_a_collection_shares_states_and_gives_the_same_values(call):
    collection = MetricCollection(build())
    for part, real in ((Y[:7], True), (X[:5], False), (Y[7:], True), (X[5:], False)):
        getattr(collection, call)(part, real=real)
    assert_expected(collection.compute())
    if call == "update":
        groups = {frozenset(group) for group in collection.compute_groups.values()}
        assert {"fd", "floor", "l2sq"} in groups
        assert {"cosine", "vendi"} in groups
        assert {"kid", "cmmd", "prdc", "l2"} in groups
    collection.reset()
    for part, real in ((X, False), (Y, True)):
        collection.update(part, real=real)
    assert_expected(collection.compute())


def test_metrics_of_two_extractors_never_share_a_state():
    a, b = M.Vendi(feature=Colours()), M.Vendi(feature=Colours(3.0))
    collection = MetricCollection({"a": a, "b": b})
    collection.update(images(4, 0), real=True)  # ignored by both: equal, empty states
    assert len(collection.compute_groups) == 2


# --- modules, dtypes, copies -------------------------------------------------------------------------------------------


def test_casts_do_not_reach_the_states():
    module = nn.Module()
    module.fd, module.kid = feed(M.FrechetDistance()), feed(M.KernelDistance())
    for metric in (module.fd, module.kid):
        metric.set_dtype(torch.float32)
    module.half().to(torch.bfloat16).float()
    assert_expected({"fd": module.fd.compute(), "kid": module.kid.compute()})


def test_the_extractor_is_not_saved_not_trained_and_always_in_eval_mode():
    network = nn.Sequential(Colours(), nn.BatchNorm1d(3))
    metric = M.FrechetDistance(feature=network)
    module = nn.ModuleDict({"metric": metric}).train()
    assert list(module.parameters()) == []
    assert dict(module.state_dict()) == {}
    metric.update(images(3, 0), real=True)
    assert int(network[1].num_batches_tracked) == 0
    assert not metric.state("real").requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_pickle_copy_and_clone_keep_the_value(name):
    metric = feed(build()[name], (5, 7))
    for copy in (pickle.loads(pickle.dumps(metric)), deepcopy(metric), metric.clone()):
        assert_expected(values(copy, name))
        copy.update(X, real=False)  # goes on alone
    assert_expected(values(metric, name))


@pytest.mark.parametrize("name", ["fd", "vendi", "kid"])
def test_persistent_states_are_restored_from_a_state_dict(name):
    metric = feed(build()[name])
    metric.persistent(True)
    restored = build()[name]
    restored.persistent(True)
    saved = metric.state_dict()
    restored.load_state_dict(dict(saved))
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert_expected(values(restored, name))
    restored.update(X + 1, real=False)  # changes neither what was saved nor the first metric
    again = build()[name]
    again.persistent(True)
    again.load_state_dict(saved)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert_expected(values(again, name))
    assert_expected(values(metric, name))


# --- two processes -----------------------------------------------------------------------------------------------------

SPLITS = {  # rows of X and of Y that each rank gets
    "uneven": (([0, 9], [9, 12]), ([0, 4], [4, 15])),
    "no reference on rank 0": (([0, 9], [9, 12]), ([0, 0], [0, 15])),
    "nothing on rank 1": (([0, 12], [12, 12]), ([0, 15], [15, 15])),
}


def on_rank(rank, store, out):
    """One process of the gloo group: every metric under every split; rank 0 writes what it found."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {}
    for split, (x_rows, y_rows) in SPLITS.items():
        for name, metric in build().items():
            (a, b), (c, d) = x_rows[rank], y_rows[rank]
            for part in (X[a:b][:2], X[a:b][2:]):  # empty parts too
                metric.update(part, real=False)
            metric.update(Y[c:d], real=True)
            found[f"{split}/{name}"] = {k: float(v) for k, v in values(metric, name).items()}
            assert metric.count("fake") == b - a, "the local state must be back after compute"
    kid = M.KernelDistance()  # float32 on one rank, float64 on the other
    kid.update(X[6 * rank : 6 * rank + 6].to((torch.float32, torch.float64)[rank]), real=False)
    kid.update(Y, real=True)
    found["mixed dtypes"] = {"rows": float(kid.compute())}
    uneven = M.FrechetDistance()
    uneven.update(X[:, : 4 - rank], real=False)
    for _ in range(2):  # and once more: a failed sync leaves the metric usable
        with pytest.raises(ValueError, match="different width"):
            uneven.compute()
    few = M.FrechetDistance()
    few.update(X[:1], real=False)
    with pytest.raises(ValueError, match="got 2 fake and 0 real"):
        few.compute()
    assert few.count("fake") == 1, "local again although compute raised"
    padded = M.Vendi()
    order = torch.arange(rank, 10, 2) % 9
    padded.update(X[order], keep=M.not_padding(9, 2, rank))
    found["padding"] = {"vendi": float(padded.compute())}
    if rank == 0:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(found, file)
    dist.destroy_process_group()


def test_two_gloo_processes_give_the_value_of_one(tmp_path):
    out, environment = tmp_path / "found.json", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path / "store"), str(out)]
    ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    try:
        assert [process.wait(timeout=600) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    found = json.loads(out.read_text())
    for split in SPLITS:
        for name in NAMES:
            for key, value in found[f"{split}/{name}"].items():
                assert value == pytest.approx(EXPECTED[key], rel=1e-9), (split, key)
    twice = torch.cat([Y, Y])
    assert found["mixed dtypes"]["rows"] == pytest.approx(f.kid(torch.cat([X[:6].float(), X[6:]]), twice), rel=1e-9)
    assert found["padding"]["vendi"] == pytest.approx(f.vendi(X[:9]), rel=1e-9)


if __name__ == "__main__":
    on_rank(int(sys.argv[3]), sys.argv[1], sys.argv[2])
