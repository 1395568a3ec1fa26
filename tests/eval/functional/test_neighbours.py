"""k-NN metrics and memorisation: fixture F, closed forms, torch-fidelity, torchmetrics, scipy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffgen.eval import functional as f

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Nearest neighbours


def test_nearest_equals_scipy_over_several_blocks(normal):
    from scipy.spatial import KDTree

    x, y = normal(2100, 3), normal(4200, 3, seed=1)
    distance, index = f.nearest(x, y, k=3)
    expected, where = KDTree(y.numpy()).query(x.numpy(), k=3)
    np.testing.assert_allclose(distance, expected, rtol=1e-12)
    np.testing.assert_array_equal(index, where)
    own, _ = f.nearest(x, k=2)
    np.testing.assert_allclose(own, KDTree(x.numpy()).query(x.numpy(), k=3)[0][:, 1:], rtol=1e-12)


def test_nearest_keeps_its_digits_far_from_the_origin_also_in_float32(normal):
    from scipy.spatial import KDTree

    for x in (1e6 + normal(60, 4), (100 + 0.01 * normal(60, 64)).float()):
        expected = KDTree(x.double().numpy()).query(x.double().numpy(), k=2)[0][:, 1]
        np.testing.assert_allclose(f.nearest(x)[0][:, 0], expected, rtol=1e-12)


def test_a_copy_is_at_distance_zero_and_a_row_is_not_its_own_neighbour(X):
    distance, index = f.nearest(torch.cat([X, X]))
    assert distance.max() == 0
    assert index[:, 0].tolist() == [*range(12, 24), *range(12)]
    distance, index = f.nearest(X + 1e3, X + 1e3)
    assert distance.max() == 0
    assert index[:, 0].tolist() == list(range(12))


# Precision, recall, density, coverage


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, (1 / 6, 4 / 15, 1 / 6, 1 / 15)),
        (3, (0.75, 1.0, 0.9166666667, 0.4666666667)),
        (5, (1.0, 1.0, 1.3166666667, 1.0)),
    ],
)
def test_prdc_of_fixture_f_equals_its_oracles(X, Y, k, expected):
    assert f.prdc(X, Y, k) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_equal_torch_fidelity(X, Y, normal, k):
    from torch_fidelity.metric_prc import prc_features_to_metric

    for x, y in ((X, Y), (1.3 * normal(150, 6), normal(200, 6, seed=1))):
        theirs = prc_features_to_metric(x, y, prc_neighborhood=k, prc_batch_size=64, save_cpu_ram=False, verbose=False)
        assert f.prdc(x, y, k)[:2] == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)


def brute_force_prdc(x, y, k, within):
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    own = [torch.cdist(a, a, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(k + 1).values for a in (x, y)]
    in_x, in_y = within(distance, own[0][:, None]), within(distance, own[1][None, :])
    hits = (in_y.any(1), in_x.any(0), in_y.double().sum(1) / k, in_y.any(0))
    return tuple(float(hit.double().mean()) for hit in hits)


@pytest.mark.parametrize("strict", [False, True])
def test_strict_and_plain_prdc_differ_on_ties_only_and_equal_the_definition(normal, strict):
    within = torch.lt if strict else torch.le
    ties = torch.cartesian_prod(torch.arange(4.0), torch.arange(5.0)).double()  # a grid: all radii are ties
    more = torch.cat([ties[:7], ties[:7], ties[3:4] + 0.5])
    for x, y in ((ties[:9], ties), (more, ties), (ties, more), (normal(40, 3), normal(50, 3, seed=1))):
        assert f.prdc(x, y, k=2, strict=strict) == pytest.approx(brute_force_prdc(x, y, 2, within), abs=1e-12)
    copies = torch.eye(6).repeat(2, 1)
    assert f.prdc(copies, copies, k=1, strict=strict).precision == (0 if strict else 1)
    assert f.prdc(normal(40, 3), normal(50, 3, seed=1), 2, True) == f.prdc(normal(40, 3), normal(50, 3, seed=1), 2)


@pytest.mark.parametrize("shift", [0.0, 1e5])
def test_ties_between_copies_survive_rounding(normal, shift):
    y = normal(300, 20) + shift
    assert f.prdc(y.flip(0), y, k=3) == pytest.approx((1, 1, 4 / 3, 1))  # each y holds itself and its 3 neighbours
    twice = torch.cat([y, y])
    assert f.prdc(twice.flip(0), twice, k=1)[:2] == (1, 1)


@QUICK
@given(n=st.integers(4, 25), m=st.integers(4, 25), d=st.integers(1, 6), k=st.integers(1, 3), seed=st.integers(0, 999))
def test_prdc_swaps_precision_and_recall_with_its_sets_and_is_perfect_for_equal_sets(normal, n, m, d, k, seed):
    x, y = normal(n, d, seed), 1.5 * normal(m, d, seed + 1) + 0.3
    there, back = f.prdc(x, y, k), f.prdc(y, x, k)
    assert (there.precision, there.recall) == (back.recall, back.precision)
    same = f.prdc(x, x, k)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert all(0 <= value <= 1 for value in (there.precision, there.recall, there.coverage))
    rotation = torch.linalg.qr(normal(d, d, seed + 2)).Q
    assert f.prdc(x @ rotation + 5, y @ rotation + 5, k) == pytest.approx(there)
    assert f.prdc(x.float(), x.float(), k) == pytest.approx(same)


def test_coverage_and_density_of_equal_distributions_have_their_expected_values(normal):
    n, m, k = 120, 100, 5
    expected = 1 - math.prod((m - 1 - i) / (n + m - 1 - i) for i in range(k))
    runs = [f.prdc(normal(n, 4, 2 * i), normal(m, 4, 2 * i + 1), k) for i in range(60)]
    for values, value in (([r.coverage for r in runs], expected), ([r.density for r in runs], 1.0)):
        assert abs(np.mean(values) - value) < 5 * np.std(values) / math.sqrt(len(runs))


def test_max_points_takes_a_seeded_subsample(normal):
    x, y = normal(80, 3), normal(90, 3, seed=1)
    assert f.prdc(x, y, 3, max_points=40, seed=1) == f.prdc(x, y, 3, max_points=40, seed=1)
    assert len({f.prdc(x, y, 3, max_points=40, seed=seed) for seed in range(5)}) > 1
    assert f.prdc(x, y, 3, max_points=90) == f.prdc(x, y, 3, max_points=None)


# AuthPct


def test_authpct_of_fixture_f_equals_its_oracles(X, Y):
    assert f.authpct(X, Y) == pytest.approx(91.6666667, abs=1e-6)
    assert f.authpct(torch.cat([X[:6], Y[:6] + 1e-6]), Y) == pytest.approx(50)


def test_authpct_of_copies_is_zero_also_when_train_has_duplicates(Y):
    assert f.authpct(Y + 0, Y) == 0
    assert f.authpct(Y, torch.cat([Y, Y])) == 0
    assert f.authpct(Y + 100, Y) == 100


# C_T


def test_mann_whitney_z_equals_its_oracle_and_scipy(t, normal):
    from scipy.stats import mannwhitneyu

    assert f.mann_whitney_z(t(1.0, 2, 3), t(2.5, 3.5, 4.5)) == pytest.approx(-1.3093073414159544, rel=1e-12)
    a, b = (normal(30, 1)[:, 0] * 3).round(), (normal(20, 1, seed=1)[:, 0] * 3).round()  # with ties
    u = mannwhitneyu(a.numpy(), b.numpy()).statistic
    assert f.mann_whitney_z(a, b) == pytest.approx((u - 299.5) / math.sqrt(600 * 51 / 12), rel=1e-12)


def test_ct_is_negative_for_copies_positive_for_blur_and_near_zero_for_fresh_data(normal):
    def modes(n, seed):
        return normal(n, 4, seed) + 20 * torch.eye(4, dtype=torch.float64)[torch.arange(n) % 3]

    train, test, fresh = modes(300, 0), modes(150, 1), modes(240, 2)
    assert f.ct_score(train[:240] + 0.01 * normal(240, 4, 3), train, test) < -5
    assert f.ct_score(fresh + 3 * normal(240, 4, 4), train, test) > 5
    assert abs(f.ct_score(fresh, train, test)) < 4
    assert f.ct_score(fresh, train, test) == f.ct_score(fresh, train, test)


def test_ct_with_one_cell_is_the_z_of_distances_to_train(X, Y, normal):
    train, test = normal(50, 4), normal(30, 4, seed=1)
    near = [f.nearest(a, train)[0][:, 0] for a in (X, test)]
    assert f.ct_score(X, train, test, cells=1, min_generated=5) == pytest.approx(f.mann_whitney_z(*near), rel=1e-12)


def test_ct_weights_cells_by_test_rows_and_drops_those_with_few_generated_rows(normal, t):
    far = t(100.0, 0, 0)
    train = torch.cat([normal(60, 3), normal(60, 3, 1) + far])
    test = torch.cat([normal(30, 3, 2), normal(10, 3, 3) + far])
    x = torch.cat([normal(25, 3, 4), normal(20, 3, 5) + far])
    z = [
        f.mann_whitney_z(*(f.nearest(a[(a[:, 0] > 50) == right], train)[0][:, 0] for a in (x, test)))
        for right in (False, True)
    ]
    assert f.ct_score(x, train, test, cells=2) == pytest.approx((30 * z[0] + 10 * z[1]) / 40, rel=1e-9)
    assert f.ct_score(x, train, test, cells=2, min_generated=21) == pytest.approx(z[0], rel=1e-9)
    wide = torch.linalg.qr(normal(70, 70, 6)).Q[:3]  # the same sets in 70 dimensions: PCA finds them again
    rotated = f.ct_score(x @ wide, train @ wide, test @ wide, cells=2)
    assert rotated == pytest.approx(f.ct_score(x, train, test, cells=2), rel=1e-9)


# MiFID


def test_mifid_of_fixture_f_is_fd_because_nothing_is_copied(X, Y):
    assert f.mifid(X, Y) == pytest.approx(0.6088299022750868, rel=1e-10)
    assert f.mifid(X, Y, "torchmetrics") == pytest.approx(0.6088299022750868, rel=1e-10)
    assert f.mifid(X, Y, threshold=0.3) == pytest.approx(f.fd(X, Y) / 0.2299569495973021, rel=1e-10)


@pytest.mark.parametrize("copies", [0, 8, 15])
def test_mifid_equals_torchmetrics_in_its_direction(X, Y, copies):
    from torchmetrics.image.mifid import _mifid_compute

    x = torch.cat([X, Y[:copies] + 1e-3])
    args = [value for a in (Y, x) for value in (a.mean(0), a.T.cov(), a)]
    assert f.mifid(x, Y, "torchmetrics") == pytest.approx(float(_mifid_compute(*args)), rel=1e-6)


def test_mifid_punishes_copies_in_the_generated_set(normal):
    train, fresh = normal(200, 16), normal(200, 16, seed=1)
    copied = torch.cat([train[:150] + 1e-3, fresh[:50]])
    assert f.mifid(fresh, train) == f.fd(fresh, train)
    assert f.mifid(copied, train, threshold=0.3) > 2 * f.fd(copied, train)
    # a few rows copied many times: 100% of the generated set, 5% of the training set
    collapsed = train[:10].repeat(20, 1) + 1e-3 * normal(200, 16, seed=2)
    assert f.mifid(collapsed, train) > 1000 * f.fd(collapsed, train)
    assert f.mifid(collapsed, train, "torchmetrics") == f.fd(collapsed, train)
    assert f.mifid(train, train) == 0


def test_mifid_of_zero_rows_is_a_number(X, Y):
    assert math.isfinite(f.mifid(torch.cat([X, torch.zeros(2, 4)]), torch.cat([Y, torch.zeros(1, 4)])))


# Audit


def test_nn_audit_finds_the_copies_and_says_of_what(normal):
    train, fresh = normal(200, 8), normal(40, 8, seed=1)
    x = torch.cat([fresh, train[[5, 17]], 3 * train[[9]]])
    audit = f.nn_audit(x, train, k=50, threshold=0.999)
    assert audit.copied == pytest.approx(3 / 43)
    assert audit.indices[40:42].tolist() == [5, 17]
    assert audit.cosine_indices[40:].tolist() == [5, 17, 9]
    assert audit.distances[40:42].tolist() == audit.ratios[40:42].tolist() == [0, 0]
    assert audit.ratio == pytest.approx(float(audit.ratios.mean()))
    distance = torch.cdist(x, train).sort(dim=1).values[:, :50]
    torch.testing.assert_close(audit.ratios[:40], (distance[:, 0] / distance.mean(1))[:40])
    assert f.nn_audit(fresh, train).ratio > 2 * f.nn_audit(train + 0.01, train).ratio


def test_nearest_cosine_distances_inside_fixture_f_equal_their_oracle(X, Y):
    audit = f.nn_audit(X, k=5)
    assert (1 - audit.cosines[:4]).tolist() == pytest.approx([0.153734934, 0.025173552, 0.232043566, 0.184279149])
    assert all(audit.cosine_indices != torch.arange(12))
    assert audit.distances.tolist() == f.nearest(X)[0][:, 0].tolist()
    unit_x, unit_y = (a / a.norm(dim=1, keepdim=True) for a in (X, Y))
    torch.testing.assert_close(f.nn_audit(X, Y, k=5).cosines, (unit_x @ unit_y.T).amax(1))


def test_nn_audit_of_k_copies_of_one_image_is_a_ratio_of_zero():
    audit = f.nn_audit(torch.ones(3, 4), torch.ones(6, 4), k=5)
    assert (audit.ratio, audit.copied) == (0, 1)
    zeros = f.nn_audit(torch.zeros(3, 4), torch.eye(4), k=2)
    assert zeros.cosines.tolist() == [0, 0, 0]
