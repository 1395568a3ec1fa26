import os
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffgen.eval import cache
from diffgen.eval import features as module
from diffgen.eval.cache import Cache, feature_key, image_hash
from diffgen.eval.extractors import Extractor, get_extractor
from diffgen.eval.features import features
from diffgen.eval.images import open_source


def noise(n=1, size=8, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def save(folder, images, names=None, age=100, **options):
    folder.mkdir(exist_ok=True)
    for name, image in zip(names or [f"{i}.png" for i in range(len(images))], images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name, **options)
        os.utime(folder / name, (time.time() - age,) * 2)
    return folder


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = 0

    def forward(self, x):
        self.rows += len(x)
        return x.mean((2, 3))


@pytest.fixture
def counting():
    return Extractor("counting-1", Counting(), 3, 8)


@pytest.fixture
def shards_of_two(monkeypatch):
    monkeypatch.setattr(module, "SHARD_IMAGES", 2)


def test_the_key_hangs_on_pixels_order_and_extractor_and_not_on_files(tmp_path, counting):
    folder = save(tmp_path / "a", noise(3))
    renamed = save(tmp_path / "b", noise(3), ["x.png", "y.png", "z.png"], compress_level=0)
    store = tmp_path / "cache"
    first = features(folder, counting, cache=store)
    assert (counting.network.rows, first.notes["cached"]) == (3, 0)
    second = features(renamed, counting, cache=store)
    assert (counting.network.rows, second.notes["cached"]) == (3, 3)
    assert torch.equal(first.x, second.x)
    assert second.names == ["x.png", "y.png", "z.png"]

    changed = noise(3)
    changed[2, 0, 0, 0] ^= 1
    keys = {feature_key(counting, map(image_hash, images)) for images in (noise(3), changed, noise(3).flip(0))}
    keys.add(feature_key(get_extractor("pixels/4"), map(image_hash, noise(3))))
    assert len(keys) == 4
    assert image_hash(torch.zeros(3, 2, 8, dtype=torch.uint8)) != image_hash(torch.zeros(3, 4, 4, dtype=torch.uint8))


def test_a_known_folder_needs_neither_decoding_nor_network_and_reports_the_same(tmp_path, counting, monkeypatch):
    folder = save(tmp_path / "a", noise(3))
    Image.new("L", (4, 4)).save(folder / "grey.png")
    (folder / "bad.png").write_bytes(b"")
    for name in ("grey.png", "bad.png"):
        os.utime(folder / name, (time.time() - 100,) * 2)
    with pytest.warns(UserWarning, match="1 of 5 images were skipped"):
        first = features(folder, counting, cache=tmp_path / "cache", on_bad_image="skip")
    monkeypatch.setattr("diffgen.eval.images._open", None)  # no file is opened
    with pytest.warns(UserWarning, match="1 of 5 images were skipped"):
        second = features(folder, counting, cache=tmp_path / "cache", on_bad_image="skip")
    assert counting.network.rows == 4
    assert torch.equal(first.x, second.x)
    assert (first.names, first.hashes) == (second.names, second.hashes)
    assert first.notes | {"cached": 4} == second.notes
    assert second.notes["counts"] == {"greyscale": 1, "skipped": 1}


def test_a_bad_file_that_was_skipped_before_is_still_an_error_when_it_should_be(tmp_path, counting):
    folder = save(tmp_path / "a", noise(3))
    (folder / "bad.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped"):
        features(folder, counting, cache=tmp_path / "cache", on_bad_image="skip")
    with pytest.raises(ValueError, match=r"can't read .*bad\.png"):
        features(folder, counting, cache=tmp_path / "cache")


def test_a_changed_file_is_read_again_even_when_size_and_second_are_the_same(tmp_path, counting):
    folder = save(tmp_path / "a", noise(2), age=0, compress_level=0)
    first = features(folder, counting, cache=tmp_path / "cache")
    changed = noise(2)
    changed[1] = 255 - changed[1]
    save(folder, changed, age=0, compress_level=0)
    second = features(folder, counting, cache=tmp_path / "cache")
    assert torch.equal(first.x[0], second.x[0])
    assert not torch.equal(first.x[1], second.x[1])
    save(folder, noise(2), age=50, compress_level=0)
    assert torch.equal(features(folder, counting, cache=tmp_path / "cache").x, first.x)


def test_options_that_change_pixels_have_their_own_hashes(tmp_path, counting):
    (tmp_path / "a").mkdir()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a" / "0.png")
    os.utime(tmp_path / "a" / "0.png", (time.time() - 100,) * 2)
    for alpha, value in (("white", 1), ("black", 0), ("white", 1)):
        with (
            pytest.warns(UserWarning, match="transparent")
            if counting.network.rows < 2
            else pytest.MonkeyPatch.context()
        ):
            x = features(tmp_path / "a", counting, cache=tmp_path / "cache", alpha=alpha).x
        assert x.tolist() == [[value] * 3]
    assert counting.network.rows == 2


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(tmp_path, counting, shards_of_two):
    def dies_at(index):
        def fn(indices, seeds):
            if indices[0] >= index:
                raise OSError("killed")
            return noise(7)[indices]

        return fn

    with pytest.raises(RuntimeError, match="failed after 5 of 7"):
        features(dies_at(5), counting, cache=tmp_path, batch_size=1, n=7)
    assert counting.network.rows == 4
    assert [(e.key, e.n) for e in cache.ls(tmp_path)] == [("partial", 4)]
    found = features(dies_at(99), counting, cache=tmp_path, batch_size=3, n=7)
    assert (counting.network.rows, found.notes["cached"]) == (7, 4)
    assert torch.equal(found.x, counting(noise(7)))
    assert [(e.n, e.dim, e.source) for e in cache.ls(tmp_path)] == [(7, 3, "callable")]


@pytest.mark.parametrize("damage", [lambda b: b[:-4], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_a_damaged_shard_is_computed_again_with_a_warning(tmp_path, counting, shards_of_two, damage):
    first = features(noise(4), counting, cache=tmp_path)
    shard = sorted(tmp_path.glob("features/*/*.npy"))[0]
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.warns(UserWarning, match="are damaged .*; computing them again"):
        second = features(noise(4), counting, cache=tmp_path)
    assert (counting.network.rows, second.notes["cached"]) == (6, 2)
    assert torch.equal(first.x, second.x)
    assert features(noise(4), counting, cache=tmp_path).notes["cached"] == 4


@pytest.mark.filterwarnings("ignore:cached hashes")
@pytest.mark.parametrize("text", ["{", "[]", '{"shards": 3, "sets": {}}', ""])
def test_a_damaged_index_is_started_anew_with_a_warning(tmp_path, counting, text):
    folder = save(tmp_path / "a", noise(2))
    features(folder, counting, cache=tmp_path / "cache")
    for file in (tmp_path / "cache").glob("*/**/*.json"):
        file.write_text(text)
    with pytest.warns(UserWarning, match="is damaged .*; starting a new one"):
        features(folder, counting, cache=tmp_path / "cache")
    assert features(folder, counting, cache=tmp_path / "cache").notes["cached"] == 2


def test_an_unwritable_cache_is_a_warning_and_the_features_come_anyway(tmp_path, counting):
    (tmp_path / "file").write_text("in the way")
    folder = save(tmp_path / "a", noise(3))
    with pytest.warns(UserWarning, match="can't be written .*; going on without") as caught:
        found = features(folder, counting, cache=tmp_path / "file")
    assert (len(found), len(caught)) == (3, 1)


def test_a_full_or_read_only_disk_leaves_no_halves_behind(tmp_path, counting, monkeypatch):
    def full(*args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="Read-only file system"):
        features(noise(3), counting, cache=tmp_path)
    assert [f.name for f in tmp_path.rglob("*") if f.is_file() and f.name != ".lock"] == []


def test_features_that_are_not_finite_and_users_modules_are_not_kept(tmp_path):
    class Zero(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) / 0

    features(noise(3), Extractor("zero", Zero(), 3, None), cache=tmp_path, on_nonfinite="drop")
    features(noise(3), Counting(), cache=tmp_path)
    assert cache.ls(tmp_path) == []


def test_ls_and_rm_by_key_by_extractor_and_all(tmp_path, counting, shards_of_two):
    with pytest.raises(ValueError, match="has no 'pixels/4'; it has sets of nothing"):
        cache.rm("pixels/4", tmp_path)
    folder = save(tmp_path / "a", noise(4))
    store = Cache(tmp_path / "cache")
    features(folder, counting, cache=store)
    features(noise(4)[:2], counting, cache=store)  # shares a shard with the first
    features(folder, "pixels/4", cache=store)
    entries = cache.ls(store.folder)
    assert sorted((e.extractor, e.n) for e in entries) == [("counting-1", 2), ("counting-1", 4), ("pixels/4", 4)]
    four = next(e for e in entries if e.n == 4 and e.dim == 3)
    assert (four.source, four.bytes) == (str(folder), 2 * (128 + 2 * 3 * 4))
    assert cache.rm(four.key[:12], store.folder) == 128 + 2 * 3 * 4
    assert features(noise(4)[:2], counting, cache=store).notes["cached"] == 2
    assert cache.rm("pixels/4", store.folder) > 0
    assert [e.n for e in cache.ls(store.folder)] == [2]
    with pytest.raises(ValueError, match="has no 'pixels/4'; it has sets of counting-1"):
        cache.rm("pixels/4", store.folder)
    (store.folder / "mine.txt").write_text("not the cache's")
    assert cache.rm(folder=store.folder) > 0
    assert cache.ls(store.folder) == []
    left = [f.name for f in store.folder.rglob("*") if f.is_file() and f.name != ".lock"]
    assert left == ["mine.txt"]


def test_rm_of_partial_leaves_finished_sets(tmp_path, counting, shards_of_two):
    features(noise(4), counting, cache=tmp_path)
    Cache(tmp_path).save(counting, "0" * 64, torch.zeros(2, 3))
    assert [e.key for e in cache.ls(tmp_path)][1:] == ["partial"]
    assert cache.rm("partial", tmp_path) == 128 + 2 * 3 * 4
    assert [e.n for e in cache.ls(tmp_path)] == [4]
    assert features(noise(4), counting, cache=tmp_path).notes["cached"] == 4


def test_the_default_folder_comes_from_the_environment(tmp_path, counting, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("DIFFGEN_CACHE", raising=False)
    assert cache.default_folder() == tmp_path / "xdg" / "diffgen"
    monkeypatch.setenv("DIFFGEN_CACHE", str(tmp_path / "mine"))
    features(noise(2), counting, cache=True)
    assert [e.n for e in cache.ls()] == [2]
    assert (tmp_path / "mine" / "features").is_dir()
    cache.rm()
    assert cache.ls() == []


def test_zips_are_known_again_too(tmp_path, counting, monkeypatch):
    import zipfile

    folder = save(tmp_path / "a", noise(2))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    os.utime(tmp_path / "a.zip", (time.time() - 100,) * 2)
    first = features(tmp_path / "a.zip", counting, cache=tmp_path / "cache")
    monkeypatch.setattr("diffgen.eval.images._open", None)
    second = features(tmp_path / "a.zip", counting, cache=tmp_path / "cache")
    assert torch.equal(first.x, second.x)
    assert second.notes["cached"] == 2


def test_stored_shards_are_plain_float32_arrays(tmp_path, counting):
    found = features(noise(3), counting, cache=tmp_path)
    (shard,) = tmp_path.glob("features/*/*.npy")
    np.testing.assert_array_equal(np.load(shard, allow_pickle=False), found.x.numpy())


def test_records_are_none_for_what_lies_in_no_file(tmp_path):
    assert Cache(tmp_path).records(open_source(noise(2))) is None
