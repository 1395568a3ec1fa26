"""Bootstrap and Wilson intervals: standard errors that are known, repeated experiments, scipy."""

import numpy as np
import pytest
import torch

from diffgen.eval import functional as f


def test_bootstrap_sd_of_a_mean_is_its_standard_error(normal):
    x = normal(400, 1)
    sd = f.bootstrap_sd(lambda rows: float(rows.mean()), x, samples=400)
    assert sd == pytest.approx(float(x.std()) / 20, rel=0.15)


def test_bootstrap_sd_of_fd_estimates_its_sampling_sd_away_from_the_null(normal):
    def far(seed):  # section 3.4: d=16, n=m=300, shift .3, scale 1.2: true sd 0.272
        return 1.2 * normal(300, 16, seed) + 0.3, normal(300, 16, seed + 1000)

    true_sd = np.std([f.fd(*far(seed)) for seed in range(80)], ddof=1)
    assert true_sd == pytest.approx(0.272, rel=0.35)
    assert f.bootstrap_sd(f.fd, *far(7)) == pytest.approx(true_sd, rel=0.5)


def test_bootstrap_sd_repeats_under_one_seed_only(X, Y):
    assert f.bootstrap_sd(f.fd, X, Y, seed=3) == f.bootstrap_sd(f.fd, X, Y, seed=3)
    assert f.bootstrap_sd(f.fd, X, Y, seed=3) != f.bootstrap_sd(f.fd, X, Y, seed=4)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (7, 10), (1, 1), (433, 1000)])
def test_wilson_equals_scipy(successes, n):
    from scipy.stats import binomtest, norm

    expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert f.wilson(successes, n, z=norm.ppf(0.975)) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_five_in_ten_is_the_textbook_interval():
    assert f.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=5e-5)


def test_bootstrap_by_clusters_is_the_standard_error_of_the_cluster_means(normal):
    labels = torch.arange(60).repeat_interleave(5)
    x = normal(60, 1).repeat_interleave(5, dim=0)  # five copies each: 60 observations, not 300
    mean = lambda rows: float(rows.mean())  # noqa: E731
    assert f.bootstrap_sd(mean, x, samples=400, clusters=labels) == pytest.approx(float(x.std()) / 60**0.5, rel=0.15)
    assert f.bootstrap_sd(mean, x, samples=400) == pytest.approx(float(x.std()) / 300**0.5, rel=0.15)
    texts = [f"prompt {label}" for label in labels.tolist()]
    assert f.bootstrap_sd(mean, x, clusters=texts) == f.bootstrap_sd(mean, x, clusters=labels)


def test_a_constant_shift_between_paired_sets_has_no_uncertainty(normal):
    def distance_of_means(x, y):
        return float((x.mean(0) - y.mean(0)).sum())

    a, y = normal(50, 3), normal(40, 3, seed=1)
    difference, sd = f.paired_bootstrap_difference(distance_of_means, a, a + 1, y)
    assert difference == pytest.approx(-3)
    assert sd < 1e-12
    assert f.bootstrap_sd(distance_of_means, a, y) > 0.1
    assert f.paired_bootstrap_difference(f.fd, a, a, y) == (0, 0)


def test_the_paired_difference_of_means_has_the_standard_error_of_the_differences(normal):
    a = normal(400, 1)
    b = a + 0.3 * normal(400, 1, seed=1)
    mean = lambda rows: float(rows.mean())  # noqa: E731
    difference, sd = f.paired_bootstrap_difference(mean, a, b, samples=400)
    assert difference == pytest.approx(float((a - b).mean()))
    assert sd == pytest.approx(float((a - b).std()) / 20, rel=0.15)
    copies = torch.arange(400).repeat_interleave(4)
    again = f.paired_bootstrap_difference(mean, a[copies], b[copies], samples=400, clusters=copies)
    assert again == (pytest.approx(difference), pytest.approx(float((a - b).std()) / 20, rel=0.15))


def test_the_paired_sd_of_fd_matches_repeated_experiments_and_is_below_the_unpaired(normal):
    def experiment(seed):
        noise = normal(200, 6, seed)
        return 1.2 * noise + 0.3, 1.15 * noise + 0.4, normal(200, 6, seed + 1000)

    differences = [f.fd(a, y) - f.fd(b, y) for a, b, y in map(experiment, range(80))]
    difference, sd = f.paired_bootstrap_difference(f.fd, *experiment(7))
    a, b, y = experiment(7)
    assert difference == pytest.approx(f.fd(a, y) - f.fd(b, y))
    assert sd == pytest.approx(np.std(differences, ddof=1), rel=0.5)
    assert sd < 0.7 * (f.bootstrap_sd(f.fd, a, y) ** 2 + f.bootstrap_sd(f.fd, b, y) ** 2) ** 0.5
