"""Oracles in float64: fixture F (X, Y below), closed forms, torch-fidelity, torchmetrics and scipy."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffgen.eval import functional as f

ROW, COLUMN = torch.arange(1, 16, dtype=torch.float64)[:, None], torch.arange(1, 5, dtype=torch.float64)[None, :]
X = torch.sin(1.3 * ROW[:12] * COLUMN)
Y = torch.cos(0.7 * ROW * (COLUMN + 1)) + 0.2
INF = math.inf


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Fréchet distance


def test_fd_of_fixture_f_is_0_6088299():
    assert f.fd(X, Y) == pytest.approx(0.6088299022750916, rel=1e-12)


def test_fd_from_stats_equals_fd_from_features():
    assert f.fd_from_stats(X.mean(0), X.T.cov(), Y.mean(0), Y.T.cov()) == pytest.approx(f.fd(X, Y), rel=1e-12)


def test_fd_equals_torch_fidelity_on_the_same_features():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    def reference(x, y):
        stats = (fid_features_to_statistics(x), fid_features_to_statistics(y))
        return float(fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"])

    assert f.fd(X, Y) == pytest.approx(reference(X, Y), rel=1e-10)
    x, y = normal(300, 32), 1.2 * normal(400, 32, seed=1) + 0.1
    assert f.fd(x, y) == pytest.approx(reference(x, y), rel=1e-9)
    x, y = normal(20, 64), normal(30, 64, seed=1) + 0.5
    assert f.fd(x, y) == pytest.approx(reference(x, y), rel=1e-6)  # theirs is inexact when N <= D


def test_fd_equals_torchmetrics_on_the_same_features():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class FeaturesAsImages(torch.nn.Module):
        num_features = 4

        def forward(self, images):
            return images.flatten(1)

    metric = FrechetInceptionDistance(feature=FeaturesAsImages()).set_dtype(torch.float64)
    metric.update(Y[:, :, None, None], real=True)
    metric.update(X[:, :, None, None], real=False)
    assert f.fd(X, Y) == pytest.approx(float(metric.compute()), rel=1e-6)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (t([0.0], [1], [2]), t([1.0], [3], [5], [7]), 11.502688871723445),
        (t([0.0, 0], [0, 1], [1, 0], [1, 1]), t([1.0, 0], [1, 2], [3, 0], [3, 2]), 19 / 6),
        (X[:, :2], X[:, :2] + t(3.0, 4.0), 25.0),
        (torch.ones(10, 4), torch.full((10, 4), 2.0), 4.0),
    ],
    ids=["one dimension", "unit square", "pure shift", "constant features"],
)
def test_fd_equals_its_closed_forms(x, y, expected):
    assert f.fd(x, y) == pytest.approx(expected, rel=1e-12)


def test_fd_from_stats_equals_its_closed_forms():
    diagonal = f.fd_from_stats(t(1.0, 2, 3), t(1.0, 4, 9).diag(), torch.zeros(3), t(4.0, 4, 1).diag())
    assert diagonal == pytest.approx(19, rel=1e-12)
    zero = torch.zeros(2)
    non_commuting = f.fd_from_stats(zero, t([2.0, 1], [1, 2]), zero, t([3.0, -1], [-1, 1]))
    assert non_commuting == pytest.approx(1.3972795044568622, rel=1e-12)


def test_fd_of_rank_deficient_sets_equals_fd_in_a_full_rank_basis():
    x, y = normal(20, 6), 2 * normal(30, 6, seed=1) + 1
    basis = torch.linalg.qr(normal(64, 6, seed=2)).Q.T  # 6 orthonormal rows of R^64
    assert f.fd(x @ basis, y @ basis) == pytest.approx(f.fd(x, y), rel=1e-9)
    x, y = normal(200, 6), 2 * normal(300, 6, seed=1) + 1  # now N > D with a singular covariance
    assert f.fd(x @ basis, y @ basis) == pytest.approx(f.fd(x, y), rel=1e-9)


def test_fd_takes_one_small_and_one_large_set():
    x, y = normal(20, 32), normal(100, 32, seed=1)
    from_stats = f.fd_from_stats(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert f.fd(x, y) == pytest.approx(from_stats, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 30), m=st.integers(2, 30), d=st.integers(1, 20), seed=st.integers(0, 999))
def test_fd_is_a_squared_distance_that_ignores_rigid_motion(n, m, d, seed):
    x, y = normal(n, d, seed), 1.5 * normal(m, d, seed + 1) + 0.3
    value, scale = f.fd(x, y), float(x.var(0).sum() + y.var(0).sum())
    close = {"rel": 1e-7, "abs": 1e-7 * scale}
    rotation = torch.linalg.qr(normal(d, d, seed + 2)).Q
    assert f.fd(x, x) <= 1e-9 * scale
    assert f.fd(y, x) == pytest.approx(value, **close)
    assert f.fd(x @ rotation + 5, y @ rotation + 5) == pytest.approx(value, **close)
    assert f.fd(3 * x, 3 * y) == pytest.approx(9 * value, **close)
    assert value >= float((x.mean(0) - y.mean(0)).square().sum()) - 1e-9 * scale
    assert f.fd(torch.nn.functional.pad(x, (0, 1)), torch.nn.functional.pad(y, (0, 1))) == pytest.approx(value, **close)
    assert f.fd(x.float(), y.float()) == pytest.approx(value, rel=1e-5, abs=1e-5 * scale)


# Noise floor


def test_fd_floor_of_a_unit_gaussian_is_its_closed_form():
    n, m, d = 400, 500, 16
    expected = d * (1 / n + 1 / m) + d * (d + 1) / 4 * (1 / (n - 1) + 1 / (m - 1))
    assert f.fd_floor(torch.ones(d), n, m) == pytest.approx(expected, rel=1e-12)
    assert f.fd_floor(torch.ones(16), 400, 400) == pytest.approx(0.4209, abs=5e-5)


def test_fd_floor_predicts_the_mean_fd_of_two_samples_of_one_gaussian():
    lam = torch.arange(1, 33, dtype=torch.float64) ** -1.5
    fds = [f.fd(normal(300, 32, 2 * i) * lam.sqrt(), normal(400, 32, 2 * i + 1) * lam.sqrt()) for i in range(40)]
    standard_error = np.std(fds) / math.sqrt(len(fds))
    assert abs(np.mean(fds) - f.fd_floor(lam, 300, 400)) < 5 * standard_error + 0.03 * np.mean(fds)


def test_plug_in_and_split_floor_bracket_the_true_floor():
    y = normal(400, 128)
    true = np.mean([f.fd(normal(200, 128, 2 * i + 1), normal(400, 128, 2 * i + 2)) for i in range(10)])
    assert f.fd_floor(f.spectrum(y), 200, 400) < true < f.fd_floor_split(y, 200)


def test_zero_eigenvalues_add_nothing_to_the_floor():
    assert f.fd_floor(t(2.0, 1.0, 0.0, 0.0), 10, 20) == f.fd_floor(t(2.0, 1.0), 10, 20)


@pytest.mark.parametrize("n", [5, 50])
def test_spectrum_holds_the_eigenvalues_of_the_covariance(n):
    x = normal(n, 8)
    eigenvalues = torch.linalg.eigvalsh(x.T.cov())[-min(n, 8) :]
    torch.testing.assert_close(f.spectrum(x), eigenvalues, atol=1e-12, rtol=1e-12)


# Diversity


def pairs_mean(distance, x):
    n = len(x)
    return sum(float(distance(x[i], x[j])) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))


def test_mean_pairwise_of_fixture_f_is_1_0816346():
    assert f.mean_pairwise(X) == pytest.approx(1.0816345698385446, rel=1e-12)


def test_mean_pairwise_equals_the_mean_over_all_pairs():
    assert f.mean_pairwise(X) == pytest.approx(pairs_mean(lambda a, b: 1 - a @ b / a.norm() / b.norm(), X), rel=1e-12)
    assert f.mean_pairwise(X, "sqeuclidean") == pytest.approx(pairs_mean(lambda a, b: (a - b).square().sum(), X))


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (X, [3.9901183937, 3.9507218347, 3.9020696406, 3.8085096005, 3.0242378740]),
        (Y, [3.7107655236, 3.1168711397, 2.8676887450, 2.6733770059, 2.1239115937]),
        (torch.eye(2)[[0] * 7 + [1] * 3], [1.9826962989, 1.9165151390, 1.8420227750, 1.7241379310, 1.4285714286]),
    ],
    ids=["X", "Y", "7 x e1 + 3 x e2"],
)
def test_vendi_equals_its_oracles(x, expected):
    assert [f.vendi(x, q) for q in (0.1, 0.5, 1, 2, INF)] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("cosine", "expected"),
    [(0.5, [1.754765351, 1.6, 1.333333333]), (0.9, [1.219590618, 1.104972376, 1.052631579])],
)
def test_vendi_of_two_unit_vectors_depends_on_their_cosine(cosine, expected):
    two = t([1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)])
    assert [f.vendi(two, q) for q in (1, 2, INF)] == pytest.approx(expected, abs=1e-9)


def test_vendi_of_k_equal_orthonormal_groups_is_k():
    groups = torch.eye(5).repeat(4, 1)
    assert [f.vendi(groups, q) for q in (0, 0.5, 1, 2, INF)] == pytest.approx([5] * 5, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 20), d=st.integers(1, 20), seed=st.integers(0, 999))
def test_vendi_falls_with_q_stays_in_range_and_ignores_duplication(n, d, seed):
    x = normal(n, d, seed)
    scores = [f.vendi(x, q) for q in (0.5, 1, 2, INF)]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(scores))
    assert scores[-1] >= 1 - 1e-9
    assert scores[0] <= min(n, d) + 1e-9
    assert f.vendi(x.repeat(3, 1), 1) == pytest.approx(scores[1], rel=1e-9)


def test_a_set_of_zero_rows_is_collapsed_and_not_diverse():
    black = torch.zeros(6, 4)
    assert f.mean_pairwise(black) == 0
    assert f.vendi(black) == pytest.approx(1)
    assert f.vendi(torch.cat([black, torch.eye(4)[:1].repeat(6, 1)])) == pytest.approx(2)


# Uncertainty


def test_bootstrap_sd_of_a_mean_is_its_standard_error():
    x = normal(400, 1)
    sd = f.bootstrap_sd(lambda rows: float(rows.mean()), x, samples=400)
    assert sd == pytest.approx(float(x.std()) / 20, rel=0.15)


def test_bootstrap_sd_of_fd_estimates_its_sampling_sd_away_from_the_null():
    def far(seed):  # section 3.4: d=16, n=m=300, shift .3, scale 1.2: true sd 0.272
        return 1.2 * normal(300, 16, seed) + 0.3, normal(300, 16, seed + 1000)

    true_sd = np.std([f.fd(*far(seed)) for seed in range(80)], ddof=1)
    assert true_sd == pytest.approx(0.272, rel=0.35)
    assert f.bootstrap_sd(f.fd, *far(7)) == pytest.approx(true_sd, rel=0.5)


def test_bootstrap_sd_repeats_under_one_seed_only():
    assert f.bootstrap_sd(f.fd, X, Y, seed=3) == f.bootstrap_sd(f.fd, X, Y, seed=3)
    assert f.bootstrap_sd(f.fd, X, Y, seed=3) != f.bootstrap_sd(f.fd, X, Y, seed=4)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (7, 10), (1, 1), (433, 1000)])
def test_wilson_equals_scipy(successes, n):
    from scipy.stats import binomtest, norm

    expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert f.wilson(successes, n, z=norm.ppf(0.975)) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_five_in_ten_is_the_textbook_interval():
    assert f.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=5e-5)


# Image statistics


def image(*rows):
    return torch.tensor(rows, dtype=torch.uint8).permute(2, 0, 1)[None]


RED = image([[255, 0, 0]] * 2, [[255, 0, 0]] * 2)
CHECKER = image([[0] * 3, [255] * 3], [[255] * 3, [0] * 3])
GREY = image([[128] * 3] * 2, [[128] * 3] * 2)
TWO_ROWS = image([[200, 100, 0]] * 2, [[0, 0, 50]] * 2)


def test_image_statistics_equal_their_oracles():
    images = torch.cat([RED, CHECKER, GREY, TWO_ROWS])
    assert f.saturation(images).tolist() == pytest.approx([1, 0, 0, 1], abs=1e-12)
    assert f.contrast(images).tolist() == pytest.approx([0, 0.5, 0, 0.221176471], abs=1e-9)
    assert f.clipping(images).tolist() == pytest.approx([1, 1, 0, 0.5], abs=1e-12)


def test_image_statistics_are_those_of_single_images_in_any_batch():
    images = torch.randint(0, 256, (70, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for statistic in (f.saturation, f.contrast, f.clipping):
        torch.testing.assert_close(statistic(images)[69:], statistic(images[69:]))
