"""What the functions refuse, and what they say then."""

import math

import pytest
import torch

from diffgen.eval import functional as f

X, Y = torch.randn(12, 4), torch.randn(15, 4)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("fn", [lambda x: f.fd(x, Y), lambda x: f.fd(Y, x), f.mean_pairwise, f.vendi, f.spectrum])
def test_feature_functions_refuse_bad_features_and_say_why(fn):
    with pytest.raises(TypeError, match=r"must be a tensor of features \[N,D\]; got ndarray"):
        fn(X.numpy())
    with pytest.raises(ValueError, match=r"must be \[N,D\]; got shape \[12\]"):
        fn(X[:, 0])
    with pytest.raises(ValueError, match="needs at least 2 rows; got 1"):
        fn(X[:1])
    broken = X.clone()
    broken[3, 1], broken[7, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match=r"NaN or infinity in rows \[3, 7\] of 12"):
        fn(broken)


def test_fd_refuses_features_of_different_width():
    with pytest.raises(ValueError, match="equally many features; got D=4 and D=3"):
        f.fd(X, Y[:, :3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma2": torch.eye(3)}, r"mu2 and sigma2 must be \[D\] and \[D,D\]; got \[2\] and \[3, 3\]"),
        ({"mu2": torch.zeros(3), "sigma2": torch.eye(3)}, "same length; got 2 and 3"),
        ({"sigma1": t([1.0, 0.5], [0.0, 1.0])}, "sigma1 must be symmetric"),
        ({"sigma1": t([1.0, 2.0], [2.0, 1.0])}, "sigma1 must be positive semi-definite; its smallest eigenvalue is -1"),
        ({"mu1": t(math.nan, 0.0)}, "mu1 must be finite"),
    ],
)
def test_fd_from_stats_refuses_what_is_not_a_gaussian(change, message):
    good = {"mu1": torch.zeros(2), "sigma1": torch.eye(2), "mu2": torch.zeros(2), "sigma2": torch.eye(2)}
    with pytest.raises(ValueError, match=message):
        f.fd_from_stats(**(good | change))
    with pytest.raises(TypeError, match="mu1 must be a tensor; got list"):
        f.fd_from_stats(**(good | {"mu1": [0, 0]}))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: f.fd_floor(t(1.0, -1.0), 5, 5), "not negative"),
        (lambda: f.fd_floor(t(1.0), 1, 5), "at least 2; got n=1, m=5"),
        (lambda: f.fd_floor_split(Y[:3], 5), "at least 4 rows"),
        (lambda: f.mean_pairwise(X, "l1"), "'cosine' or 'sqeuclidean'; got 'l1'"),
        (lambda: f.vendi(X, -1), "q must be 0 or more"),
        (lambda: f.vendi(X, math.nan), "q must be 0 or more"),
        (lambda: f.bootstrap_sd(f.fd, X, Y, samples=1), "samples must be at least 2; got 1"),
        (lambda: f.wilson(4, 3), "successes=4, n=3"),
        (lambda: f.wilson(0, 0), "successes=0, n=0"),
        (lambda: f.saturation(torch.zeros(2, 1, 4, 4, dtype=torch.uint8)), r"\[N,3,H,W\].*got \[2, 1, 4, 4\]"),
        (lambda: f.clipping(torch.zeros(0, 3, 4, 4, dtype=torch.uint8)), "not empty"),
    ],
)
def test_arguments_out_of_range_are_value_errors_that_name_them(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_image_statistics_refuse_floats():
    with pytest.raises(TypeError, match=r"uint8 tensor \[N,3,H,W\]; got torch.float32"):
        f.contrast(torch.zeros(1, 3, 2, 2))
