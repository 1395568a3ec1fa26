"""The rows of the bad-input table of the evaluation's contract that are about images."""

import io
import itertools
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffgen.eval.features import duplicates, features
from diffgen.eval.images import BadImage, format_warning, load_images, open_source


def noise(n=1, height=8, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def save(folder, images, suffix="png"):
    for i, image in enumerate(images):
        pil(image).save(folder / f"{i}.{suffix}")


def read(source):
    return [image for batch in source.batches() for image in batch]


DAMAGES = {"truncated": lambda b: b[: len(b) // 2], "garbage": lambda b: b"garbage", "empty": lambda b: b""}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff"])
def test_a_damaged_file_is_an_error_that_names_it_or_is_skipped_and_counted(tmp_path, damage, suffix):
    save(tmp_path, noise(3, 64, 64), suffix)
    bad = tmp_path / f"1.{suffix}"
    bad.write_bytes(damage(bad.read_bytes()))
    with pytest.raises(BadImage, match=rf"can't read .*1\.{suffix}"):
        read(open_source(tmp_path))
    source = open_source(tmp_path, on_bad_image="skip")
    assert len(read(source)) == len(source) == 2
    assert source.names == [f"0.{suffix}", f"2.{suffix}"]
    assert list(source.skipped) == [f"1.{suffix}"]
    assert source.notes["skipped"] == 1
    assert "1 of 3 images were skipped" in source.warnings()[0]


def test_one_bad_image_in_a_hundred_is_counted_without_a_warning(tmp_path):
    save(tmp_path, noise(99, 2, 2))
    (tmp_path / "bad.png").write_bytes(b"")
    source = open_source(tmp_path, on_bad_image="skip")
    assert len(read(source)) == 99
    assert (source.notes["skipped"], source.warnings()) == (1, [])


def test_a_folder_of_nothing_but_bad_images_is_an_error_even_when_they_are_skipped(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image of this folder is readable; the first: can't read .*bad\.png"):
        read(open_source(tmp_path, on_bad_image="skip"))


def test_damaged_containers_are_errors_that_name_them(tmp_path):
    for name in ("a.zip", "a.npz", "a.npy"):
        (tmp_path / name).write_bytes(b"PK\x03\x04garbage" if name != "a.npy" else b"garbage")
        with pytest.raises(ValueError, match=f"can't read .*{name}"):
            open_source(tmp_path / name)
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"can't read .*pickle\.npy"):
        open_source(tmp_path / "pickle.npy")
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(ValueError, match=r"no images in .*none\.zip: it has no entry that ends in \.png"):
        open_source(tmp_path / "none.zip")


def test_a_damaged_entry_of_a_zip_is_a_bad_image(tmp_path):
    data = io.BytesIO()
    pil(noise()[0]).save(data, "PNG")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("0.png", data.getvalue())
        archive.writestr("1.png", data.getvalue()[:40])
    with pytest.raises(BadImage, match=r"can't read .*a\.zip!1\.png"):
        read(open_source(tmp_path / "a.zip"))
    assert len(read(open_source(tmp_path / "a.zip", on_bad_image="skip"))) == 1


def test_archives_of_something_else_say_what_they_hold(tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"holds statistics \(mu, sigma\) and no images: .*load_stats"):
        open_source(tmp_path / "stats.npz")
    np.savez(tmp_path / "x.npz", x=np.zeros(2), y=np.zeros(2))
    with pytest.raises(ValueError, match="has no array 'images'; it has x, y"):
        open_source(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=r"must be \[N,H,W,3\] or \[N,3,H,W\] and not empty; got \[5, 7, 7, 2\]"):
        open_source(np.zeros((5, 7, 7, 2), np.uint8))
    with pytest.raises(ValueError, match=r"can be \[N,H,W,C\] or \[N,C,H,W\]; pass a tensor"):
        open_source(np.zeros((5, 3, 7, 3), np.uint8))
    with pytest.raises(ValueError, match="the dataset has no column 'image' but img, label: pass column="):
        open_source(type("D", (), {"column_names": ["img", "label"], "__len__": lambda s: 1, "__getitem__": None})())


def test_mixed_sizes_are_streamed_counted_and_resized_one_by_one(tmp_path):
    pil(noise(1, 8, 8)[0]).save(tmp_path / "a.png")
    pil(noise(1, 16, 16)[0]).save(tmp_path / "b.png")
    found = features(tmp_path, "pixels/4")
    assert found.x.shape == (2, 48)
    assert (found.notes["sizes"], found.notes["warnings"]) == ({"8x8": 1, "16x16": 1}, [])
    with pytest.raises(ValueError, match=r"one size: b\.png is 16x16, a\.png is 8x8"):
        load_images(tmp_path)


def test_mixed_aspect_ratios_are_a_warning_that_a_centre_crop_answers(tmp_path):
    pil(noise(1, 8, 8)[0]).save(tmp_path / "a.png")
    pil(noise(1, 8, 16)[0]).save(tmp_path / "b.png")
    with pytest.warns(UserWarning, match=r"aspect ratios \(width/height\) go from 1 to 2: .*crop='center'"):
        features(tmp_path, "pixels/4")
    cropped = open_source(tmp_path, crop="center")
    assert torch.equal(read(cropped)[1], noise(1, 8, 16)[0][:, :, 4:12])
    assert (cropped.notes["cropped to a square"], cropped.warnings()) == (1, [])


def test_grey_palette_and_cmyk_images_become_rgb_and_are_counted(tmp_path):
    image = pil(noise()[0])
    image.convert("L").save(tmp_path / "0.png")
    image.convert("LA").save(tmp_path / "1.png")
    image.convert("1").save(tmp_path / "2.png")
    image.quantize(4).save(tmp_path / "3.png")
    image.convert("CMYK").save(tmp_path / "4.jpg")
    image.save(tmp_path / "5.png")
    source = open_source(tmp_path)
    assert [tuple(x.shape) for x in read(source)] == [(3, 8, 8)] * 6
    assert dict(source.notes) == {"greyscale": 3, "palette": 1, "cmyk": 1}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize(("alpha", "colour"), [("white", 255), ("black", 0), ("drop", 100)])
def test_transparency_is_laid_on_a_colour_or_dropped_with_one_warning(mode, alpha, colour):
    clear = Image.new("RGBA", (2, 2), (100, 100, 100, 0))
    if mode == "P":
        clear = Image.new("P", (2, 2), 0)
        clear.putpalette([100, 100, 100])
        clear.info["transparency"] = 0
    else:
        clear = clear.convert(mode)
    source = open_source([clear, clear], alpha=alpha)
    with pytest.warns(UserWarning, match="image 0 of the list is transparent") as caught:
        images = read(source)
    assert [x.unique().tolist() for x in images] == [[colour], [colour]]
    assert (len(caught), source.notes["transparent"]) == (1, 2)


def test_an_opaque_alpha_channel_is_no_transparency(recwarn):
    assert torch.equal(load_images([pil(noise()[0]).convert("RGBA")]), noise())
    assert not recwarn.list


def test_sixteen_bit_greys_are_divided_by_257_where_pil_would_clip_to_white(tmp_path):
    values = np.array([[0, 257, 4096, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    with pytest.warns(UserWarning, match=r"deep\.png has 16 bits a channel; divided by 257"):
        images = load_images(tmp_path)
    assert images[0, :, 0].tolist() == [[0, 1, 16, 128, 255]] * 3


def test_sixteen_bit_colours_keep_their_eight_bit_values_and_are_counted(tmp_path):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = noise()[0].permute(1, 2, 0).numpy().astype(">u2") * 257
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(png)
    source = open_source(tmp_path)
    with pytest.warns(UserWarning, match="16 bits a channel"):
        assert torch.equal(read(source)[0], noise()[0])
    assert source.notes["16-bit"] == 1


def test_arrays_of_sixteen_bits_are_divided_too_and_wider_ones_are_errors(tmp_path):
    with pytest.warns(UserWarning, match="16 bits"):
        images = load_images(np.full((1, 4, 4, 3), 4096, dtype=np.uint16))
    assert images.unique().tolist() == [16]
    with pytest.raises(BadImage, match=r"more than 16 bits a channel \(PIL mode 'F'\)"):
        load_images([Image.fromarray(np.zeros((4, 4), np.float32))])


def test_rotated_photos_are_turned_upright_and_counted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(2):
        Image.new("RGB", (4, 2)).save(tmp_path / f"{i}.jpg", exif=exif)
    source = open_source(tmp_path)
    assert [tuple(x.shape) for x in read(source)] == [(3, 4, 2)] * 2
    assert source.notes["rotated by EXIF"] == 2


def test_of_an_animation_the_first_frame_counts(tmp_path):
    frames = [pil(image) for image in noise(2)]
    frames[0].save(tmp_path / "a.tiff", save_all=True, append_images=frames[1:])
    source = open_source(tmp_path)
    assert torch.equal(read(source)[0], noise(2)[0])
    assert source.notes["first frame of several"] == 1


def test_the_range_of_floats_is_never_guessed_and_a_decoders_overshoot_is_clipped():
    for images, hint in (
        (torch.rand(2, 3, 4, 4) * 2 - 1, r"\(x \+ 1\) / 2"),
        (torch.rand(2, 3, 4, 4) * 255, "x / 255"),
    ):
        for source in (images, list(images), [(images, 0)], lambda indices, seeds, images=images: images[indices]):
            with pytest.raises(ValueError, match=hint):
                read(open_source(source, n=2, on_bad_image="skip"))
    source = open_source(torch.tensor([-0.005, 1.2]).view(1, 1, 1, 2).expand(1, 3, 1, 2))
    assert read(source)[0][0].tolist() == [[0, 255]]
    assert source.notes["floats outside [0,1] clipped"] == 1


def test_images_that_are_not_finite_are_named_or_skipped():
    images = torch.rand(3, 3, 4, 4)
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in images \[1\]"):
        open_source(images)
    source = open_source(images, on_bad_image="skip")
    assert len(read(source)) == 2
    assert source.names == ["0", "2"]


def test_features_that_are_not_finite_name_their_images_or_drop_them(tmp_path):
    class Log(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3)).log()

    images = noise(3)
    images[1] = 0
    save(tmp_path, images)
    with pytest.raises(ValueError, match=r"NaN or infinite features for 1 images: 1\.png"):
        features(tmp_path, Log())
    found = features(tmp_path, Log(), on_nonfinite="drop")
    assert (found.names, len(found.hashes)) == (["0.png", "2.png"], 2)
    assert found.notes["counts"]["dropped: features not finite"] == 1


def test_different_container_formats_are_a_warning(tmp_path):
    for suffix in ("png", "jpg"):
        (tmp_path / suffix).mkdir()
        save(tmp_path / suffix, noise(2), suffix)
    png, jpg, memory = open_source(tmp_path / "png"), open_source(tmp_path / "jpg"), open_source(noise(2))
    for source in (png, jpg, memory):
        read(source)
    assert "generated PNG, reference JPEG" in format_warning(png, jpg)
    assert "generated from memory, reference JPEG" in format_warning(memory, jpg)
    assert format_warning(png, png) is None
    assert format_warning(memory, png) is None


def test_identical_images_are_counted_and_found_whatever_their_file(tmp_path):
    save(tmp_path, noise(3))
    pil(noise(3)[1]).save(tmp_path / "copy.png", compress_level=1)
    generated = features(tmp_path, "pixels/4")
    assert generated.notes["duplicates"] == 1
    assert duplicates(generated) == {"copy.png": "1.png"}
    train = features(noise(2), "pixels/4")
    assert duplicates(generated, train) == {"0.png": "0", "1.png": "1", "copy.png": "1"}


def test_one_folder_twice_gives_equal_features(tmp_path):
    save(tmp_path, noise(3))
    assert torch.equal(features(tmp_path, "pixels/4").x, features(str(tmp_path), "pixels/4").x)


def test_a_callable_that_yields_fewer_than_n_reports_how_many():
    def short(indices, seeds):
        return noise(10)[indices][: 4 - indices[0]]

    source = open_source(short, n=10)
    assert [len(batch) for batch in source.batches(3)] == [3, 1]
    assert (len(source), source.names, source.notes["missing"]) == (4, ["0", "1", "2", "3"], 6)
    assert "6 of 10 images are missing" in source.warnings()[0]
    with pytest.raises(ValueError, match="asked for 2 images and gave 10"):
        read(open_source(lambda indices, seeds: noise(10), n=2))


def test_a_callable_that_dies_says_where_to_go_on_and_goes_on_there():
    calls = itertools.count()

    def dies_once(indices, seeds):
        if next(calls) == 2:
            raise OSError("no memory")
        return noise(10)[indices]

    source = open_source(dies_once, n=10)
    made, batches = [], source.batches(3)
    made += [*next(batches), *next(batches)]
    with pytest.raises(RuntimeError, match=r"failed after 6 of 10 images \(OSError: no memory\); batches\(start=6\)"):
        next(batches)
    for batch in source.batches(3, start=len(made)):
        made += batch
    assert torch.equal(torch.stack(made), noise(10))


def test_a_callable_that_dies_under_skip_gives_what_it_made():
    def dies(indices, seeds):
        if indices[0]:
            raise OSError("no memory")
        return noise(10)[indices]

    source = open_source(dies, n=10, on_bad_image="skip")
    assert len([image for batch in source.batches(3) for image in batch]) == 3
    assert source.notes["missing"] == 7


def test_an_empty_source_is_an_error():
    with pytest.raises(ValueError, match="this iterable has no images"):
        read(open_source(iter([])))
    with pytest.raises(ValueError, match="the dataset is empty"):
        open_source(torch.utils.data.TensorDataset(torch.zeros(0, 3, 4, 4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_image": "ignore"}, "on_bad_image must be one of 'error', 'skip'; got 'ignore'"),
        ({"alpha": "red"}, "alpha must be one of 'white', 'black', 'drop'; got 'red'"),
        ({"crop": "left"}, "crop must be one of None, 'center'; got 'left'"),
    ],
)
def test_unknown_options_are_errors_with_the_valid_ones(options, message):
    with pytest.raises(ValueError, match=message):
        open_source(noise(), **options)


def test_a_file_that_only_claims_to_be_an_image_starts_no_interpreter(tmp_path):
    (tmp_path / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    with pytest.raises(ValueError, match=r"0.png: cannot identify image"):
        load_images(tmp_path)


def test_a_zip_entry_may_not_unpack_without_end(tmp_path, monkeypatch):
    import zipfile

    from diffgen.eval import images

    monkeypatch.setattr(images, "LARGEST_ENTRY", 1 << 10)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", b"\0" * (1 << 16))
    with pytest.raises(ValueError, match="unpacks to more than"):
        load_images(tmp_path / "a.zip")


def test_a_tuple_of_images_is_a_batch_and_not_one_image_with_labels():
    from PIL import Image

    several = tuple(Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(6))
    assert len(load_images(iter([several, several]))) == 12
    labelled = [(Image.new("RGB", (4, 4)), 3), (Image.new("RGB", (4, 4)), 4)]
    assert len(load_images(iter(labelled))) == 2
