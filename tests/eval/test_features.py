import numpy as np
import pytest
import torch
from torch import nn

from diffgen.eval.extractors import Extractor, get_extractor
from diffgen.eval.features import Features, features, load_stats, require_same_extractor, save_stats, stats
from diffgen.eval.images import open_source


def noise(n=1, size=8, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_features_are_the_extractors_whatever_the_batch_size_and_source(monkeypatch):
    pixels = get_extractor("pixels/4")
    expected = pixels(noise(7))
    monkeypatch.setattr("diffgen.eval.features.SHARD_IMAGES", 3)
    for source in (noise(7), list(noise(7)), torch.utils.data.DataLoader(noise(7), batch_size=2)):
        found = features(source, "pixels/4", batch_size=2)
        assert torch.equal(found.x, expected)
        assert (found.id, found.names, len(found)) == ("pixels/4", list("0123456"), 7)
        assert found.x.dtype == torch.float32
    assert len(set(found.hashes)) == 7


def test_large_images_end_a_shard_before_many_do(monkeypatch):
    monkeypatch.setattr("diffgen.eval.features.SHARD_BYTES", 2 * 3 * 8 * 8)
    seen = []
    pixels = get_extractor("pixels/4")

    class Spy(Extractor):
        def __call__(self, images, *args, **options):
            seen.append(len(images))
            return pixels(images, *args, **options)

    features(noise(5), Spy("spy", nn.Flatten(), None, 4))
    assert seen == [2, 2, 1]


def test_logits_come_with_the_features_of_a_classifier():
    head = nn.Linear(48, 5)
    extractor = Extractor("mine", nn.Flatten(), 48, 4, head=head)
    found = features(noise(3), extractor, logits=True)
    torch.testing.assert_close(found.logits, head(found.x).detach())
    assert features(noise(3), extractor).logits is None
    with pytest.raises(ValueError, match="pixels/4 is no classifier, so it has no logits"):
        features(noise(3), "pixels/4", logits=True)


def test_notes_hold_what_a_report_needs():
    grey = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    found = features([*noise(2), grey[0], grey[0]], "pixels/4")
    assert found.notes == {
        "kind": "list",
        "counts": {"greyscale": 2},
        "sizes": {"8x8": 4},
        "formats": {},
        "skipped": {},
        "duplicates": 1,
        "cached": 0,
        "warnings": [],
    }


def test_a_generator_is_read_in_one_pass():
    assert torch.equal(features((x for x in noise(5)), "pixels/4").x, get_extractor("pixels/4")(noise(5)))


def test_an_open_source_is_taken_with_its_options():
    source = open_source([*noise(1, 8), *noise(1, 6)], crop="center")
    assert features(source, "pixels/4").notes["sizes"] == {"8x8": 1, "6x6": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"on_nonfinite": "skip"}, "on_nonfinite must be 'error' or 'drop'; got 'skip'"),
    ],
)
def test_bad_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        features(noise(2), "pixels/4", **options)


# ---- statistics


def some():
    return features(noise(9), "pixels/2")


def test_statistics_are_numpys_mean_and_unbiased_covariance(tmp_path):
    found = some()
    path = save_stats(tmp_path / "sub" / "ref.npz", found)
    held = load_stats(path)
    x = found.x.double().numpy()
    np.testing.assert_allclose(held.mu, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(held.sigma, np.cov(x.T), rtol=1e-12, atol=1e-16)
    assert (held.n, held.id, held.mu.dtype) == (9, "pixels/2", torch.float64)
    again = load_stats(save_stats(tmp_path / "again.npz", held))
    assert torch.equal(again.sigma, held.sigma)
    assert sorted(f.name for f in tmp_path.rglob("*.npz")) == ["again.npz", "ref.npz"]


def test_other_programs_read_our_file_and_we_read_theirs_under_an_assumed_id(tmp_path):
    with np.load(save_stats(tmp_path / "ours.npz", some()), allow_pickle=False) as ours:  # as pytorch-fid and EDM do
        mu, sigma = ours["mu"][:], ours["sigma"][:]
    np.savez(tmp_path / "theirs.npz", mu=mu, sigma=sigma)
    with pytest.raises(ValueError, match=r"theirs\.npz doesn't say which extractor made it: pass assume_extractor="):
        load_stats(tmp_path / "theirs.npz")
    theirs = load_stats(tmp_path / "theirs.npz", assume_extractor="inception-v3-compat/2048@tf1-bilinear")
    assert (theirs.n, theirs.id) == (None, "inception-v3-compat/2048@tf1-bilinear")
    np.testing.assert_array_equal(theirs.sigma, sigma)
    with pytest.raises(ValueError, match="was made with extractor 'pixels/2', not with 'pixels/3'"):
        load_stats(tmp_path / "ours.npz", assume_extractor="pixels/3")


def test_bad_statistics_files_are_errors_that_name_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such statistics file: .*none\.npz"):
        load_stats(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"can't read statistics from .*bad\.npz"):
        load_stats(tmp_path / "bad.npz")
    np.savez(tmp_path / "keys.npz", images=np.zeros(2))
    with pytest.raises(ValueError, match="has no mu and sigma; it has images"):
        load_stats(tmp_path / "keys.npz")
    np.savez(tmp_path / "shape.npz", mu=np.zeros(2), sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"finite mu \[D\] and sigma \[D,D\]; got \[2\] and \[3, 3\]"):
        load_stats(tmp_path / "shape.npz", assume_extractor="x")
    np.savez(tmp_path / "pickle.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="can't read statistics"):
        load_stats(tmp_path / "pickle.npz", assume_extractor="x")
    with pytest.raises(ValueError, match=r"written as \.npz; got .*stats\.pt"):
        save_stats(tmp_path / "stats.pt", some())


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="need at least 2 images; got 1"):
        stats(features(noise(1), "pixels/2"))


def test_features_of_different_extractors_are_an_error_with_both_ids():
    a, b = some(), features(noise(9), "pixels/4")
    require_same_extractor(a, stats(a))
    with pytest.raises(ValueError, match="can't be compared: 'pixels/2' and 'pixels/4'"):
        require_same_extractor(stats(a), b)
    cut = Features(a.x[:, :5], a.id, a.names, a.hashes)
    with pytest.raises(ValueError, match="'pixels/2', but of 12 and 5 dimensions"):
        require_same_extractor(a, cut)
