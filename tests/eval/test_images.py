import contextlib
import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffgen.eval.images import PipelineSource, load_images, open_source


def noise(n=1, size=8, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def test_a_folder_gives_its_images_in_natural_order(tmp_path):
    images = noise(3)
    for name, image in zip(["1.png", "2.PNG", "10.png"], images):
        pil(image).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    assert torch.equal(load_images(tmp_path), images)
    assert torch.equal(load_images(str(tmp_path)), images)


def test_jpeg_files_are_read(tmp_path):
    for name in ("a.jpg", "b.jpeg"):
        Image.new("RGB", (8, 8), (200, 30, 90)).save(tmp_path / name)
    assert load_images(tmp_path).shape == (2, 3, 8, 8)


def test_a_list_of_pil_images_equals_the_tensor_it_came_from():
    assert torch.equal(load_images([pil(image) for image in noise(3)]), noise(3))


def test_a_uint8_tensor_is_returned_as_it_is():
    images = noise(2)
    assert load_images(images) is images


def test_floats_are_rounded_and_not_truncated():
    floats = torch.tensor([0, 0.25, 0.5, 0.75, 1]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert load_images(floats)[0, 0, 0].tolist() == [0, 64, 128, 191, 255]
    assert torch.equal(load_images(noise(4).float() / 255), noise(4))


def test_greyscale_palette_and_rotated_images_become_upright_rgb(tmp_path):
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    torch.testing.assert_close(load_images([grey])[0, 2], torch.arange(64, dtype=torch.uint8).view(8, 8))
    palette = pil(noise()[0]).quantize(4)
    assert torch.equal(load_images([palette]), load_images([palette.convert("RGB")]))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_images(tmp_path).shape == (1, 3, 4, 2)


def test_transparent_images_are_laid_on_white_with_a_warning():
    with pytest.warns(UserWarning, match="image 0 of the list is transparent"):
        images = load_images([Image.new("RGBA", (2, 2), (255, 0, 0, 0))])
    assert images.unique().tolist() == [255]


def test_a_missing_path_a_file_and_an_empty_folder_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        load_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no images in .*: it has no file that ends in .png, .jpg, .jpeg"):
        load_images(tmp_path)
    (tmp_path / "file.png").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match=r"got a file: .*file.png"):
        load_images(tmp_path / "file.png")


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"garbage", lambda b: b""])
def test_a_corrupt_file_is_an_error_that_names_it(tmp_path, damage):
    pil(noise(size=32)[0]).save(tmp_path / "bad.png")
    (tmp_path / "bad.png").write_bytes(damage((tmp_path / "bad.png").read_bytes()))
    with pytest.raises(ValueError, match=r"can't read .*bad\.png"):
        load_images(tmp_path)


def test_mixed_sizes_are_an_error_that_names_both_files(tmp_path):
    pil(noise(size=8)[0]).save(tmp_path / "a.png")
    pil(noise(size=9)[0]).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"one size: .*b\.png is 9x9, .*a\.png is 8x8"):
        load_images(tmp_path)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(1, 3, 4, 4) * 2 - 1, ValueError, r"must be in \[0,1\].*pass \(x \+ 1\) / 2"),
        (torch.rand(1, 3, 4, 4) * 255, ValueError, r"pass x / 255"),
        (torch.full((2, 3, 4, 4), float("nan")), ValueError, r"NaN or infinity in images \[0, 1\]"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int64), TypeError, "uint8 or floating point; got torch.int64"),
        (torch.zeros(3, 4, 4), ValueError, r"\[N,3,H,W\] and not empty; got \[3, 4, 4\]"),
        (torch.zeros(0, 3, 4, 4), ValueError, "not empty"),
        ([], ValueError, "list of images is empty"),
        ([Image.new("RGB", (2, 2)), "a.png"], TypeError, "image 1 of the list must be a PIL image, .*; got str"),
        (7, TypeError, "must be a tensor, a folder, .* a callable; got int"),
    ],
)
def test_unclear_sources_are_errors_and_never_guesses(images, error, message):
    with pytest.raises(error, match=message):
        load_images(images)


# ---- sources


def images_of(source, batch_size=2):
    return [image for batch in source.batches(batch_size) for image in batch]


def same(source, images=None):
    images = noise(3) if images is None else images
    got = images_of(source)
    return len(got) == len(images) and all(torch.equal(a, b) for a, b in zip(got, images))


def write_zip(path, images, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name, image in zip(names, images):
            data = io.BytesIO()
            pil(image).save(data, "PNG")
            archive.writestr(name, data.getvalue())
        archive.writestr("__MACOSX/._1.png", b"not an image")
        archive.writestr("readme.txt", b"text")


class Labelled(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], 7


class Columns:
    """A Hugging Face dataset, as far as a reader sees it."""

    column_names = ("image", "label")

    def __len__(self):
        return 3

    def __getitem__(self, i):
        if i == 2:  # with decode=False
            data = io.BytesIO()
            pil(noise(3)[2]).save(data, "PNG")
            return {"image": {"bytes": data.getvalue(), "path": None}, "label": 0}
        return {"image": pil(noise(3)[i]), "label": 0}


def test_zip_npz_and_npy_stream_the_same_images_as_the_folder(tmp_path):
    write_zip(tmp_path / "a.zip", noise(3), ["1.png", "2.png", "sub/10.png"])
    source = open_source(tmp_path / "a.zip")
    assert same(source)
    assert (source.kind, source.names, len(source)) == ("zip", ["1.png", "2.png", "sub/10.png"], 3)
    channels_last = noise(3).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", images=channels_last)
    np.savez(tmp_path / "openai.npz", channels_last)
    np.save(tmp_path / "a.npy", noise(3).numpy())
    for name in ("a.npz", "openai.npz", "a.npy"):
        assert same(open_source(tmp_path / name)), name
    assert same(open_source(channels_last))


def test_every_suffix_is_read_and_formats_come_from_the_content(tmp_path):
    for i, suffix in enumerate(["png", "jpg", "webp", "bmp", "tiff"]):
        pil(noise(1, 16)[0]).save(tmp_path / f"{i}.{suffix}")
    pil(noise(1, 16)[0]).save(tmp_path / "6.png", "JPEG")  # a JPEG by another name
    source = open_source(tmp_path)
    assert len(images_of(source)) == 6
    assert dict(source.formats) == {"PNG": 1, "JPEG": 2, "WEBP": 1, "BMP": 1, "TIFF": 1}
    assert dict(source.sizes) == {(16, 16): 6}


def test_subfolders_are_read_on_request(tmp_path):
    (tmp_path / "b").mkdir()
    for name, image in zip(["a.png", "b/2.png", "b/10.png"], noise(3)):
        pil(image).save(tmp_path / name)
    assert open_source(tmp_path).names == ["a.png"]
    source = open_source(tmp_path, recursive=True)
    assert same(source)
    assert source.names == ["a.png", "b/2.png", "b/10.png"]
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="recursive=True looks in subfolders"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x.float() / 255,
        lambda x: [pil(image) for image in x],
        lambda x: list(x),
        lambda x: Labelled(x),
        lambda x: Labelled([pil(image) for image in x]),
        lambda x: torch.utils.data.DataLoader(Labelled(x), batch_size=2),
        lambda x: torch.utils.data.DataLoader(x, batch_size=2),
        lambda x: [(x[:2], torch.tensor([0, 1])), (x[2:], torch.tensor([2]))],
        lambda x: (image for image in x),
        lambda x: ({"image": image} for image in x),
        lambda x: ([pil(x[0]), pil(x[1])] if i == 0 else [pil(x[2])] for i in range(2)),
        lambda x: Columns(),
    ],
    ids="uint8 float pil tensors dataset pil-dataset loader loader-unlabelled batches generator dicts pil-batches hf".split(),
)
def test_everything_that_holds_images_is_a_source_of_the_same_images(make):
    source = open_source(make(noise(3)))
    assert same(source)
    assert (source.names, len(source)) == (["0", "1", "2"], 3)


def test_a_generator_has_no_length_before_and_no_second_pass():
    source = open_source(image for image in noise(3))
    with pytest.raises(TypeError, match="length of this iterable is not known before a pass"):
        len(source)
    assert same(source)
    with pytest.raises(ValueError, match="can be read only once"):
        images_of(source)
    again = open_source(torch.utils.data.DataLoader(noise(3), batch_size=2))
    assert same(again)
    assert same(again)


def test_a_callable_gets_indices_with_seeds_that_depend_on_nothing_else():
    asked = {}

    def fn(indices, seeds):
        asked.update(zip(indices, seeds))
        return noise(3)[indices]

    assert same(open_source(fn, n=3))
    first = dict(asked)
    assert len(set(first.values())) == 3
    assert [len(batch) for batch in open_source(fn, n=3).batches(3)] == [3]
    assert asked == first
    assert torch.equal(next(open_source(fn, n=3).batches(1, start=2))[0], noise(3)[2])
    images_of(open_source(fn, n=3, seed=1))
    assert not set(asked.values()) & set(first.values())
    with pytest.raises(ValueError, match="needs n"):
        open_source(fn)


class Pipe:
    """What a diffusers pipeline is to a source: the image is its prompt's length and its noise."""

    rule = None

    def __call__(self, prompts, generator, output_type, steps=1):
        images = [torch.rand(3, 4, 4, generator=g) * len(p) / 10 * (self.rule or 1) for p, g in zip(prompts, generator)]
        return type("Output", (), {"images": torch.stack(images)})


def test_a_pipeline_source_makes_per_prompt_images_that_no_batch_size_changes():
    source = PipelineSource(Pipe(), ["ab", "abcd"], per_prompt=2, seed=3, steps=2)
    assert source.prompts == ["ab", "ab", "abcd", "abcd"]
    images = images_of(source, 4)
    assert (len(source), source.kind) == (4, "pipeline")
    assert not torch.equal(images[0], images[1])
    assert all(torch.equal(a, b) for a, b in zip(images, images_of(source, 3)))
    assert torch.equal(next(source.batches(1, start=2))[0], images[2])


def test_a_pipeline_sources_rule_is_on_while_it_draws():
    @contextlib.contextmanager
    def guide(pipe, rule):
        pipe.rule = rule
        yield
        pipe.rule = None

    pipe = Pipe()
    dark = PipelineSource(pipe, ["abcd"], rule=0.5, guide=guide)
    assert max(image.max() for image in images_of(dark)) <= 0.2 * 255
    assert pipe.rule is None
    with pytest.raises(ValueError, match=r"guide=diffgen\.guide"):
        PipelineSource(pipe, ["abcd"], rule=0.5)


def test_a_pipeline_source_draws_what_pipelines_draw_does(scene):
    from diffgen.pipelines import CFG
    from diffgen.pipelines.draw import draw
    from diffgen.pipelines.guide import guide

    pipe = scene("StableDiffusion3Pipeline").pipe
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "height": 16, "width": 16}
    drawn = draw(pipe, CFG(3.0), ["a red circle", "a square"], seed=5, **call)
    source = PipelineSource(pipe, ["a red circle", "a square"], 1, 5, CFG(3.0), guide=guide, **call)
    assert torch.equal(torch.stack(images_of(source)), drawn.images)
