import numpy as np
import pytest
import torch
from PIL import Image

from diffgen.eval.images import load_images


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


def test_sixteen_bit_images_are_an_error_that_names_the_file(tmp_path):
    Image.fromarray(np.full((4, 4), 4096, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png has more than 8 bits"):
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
        ([Image.new("RGB", (2, 2)), "a.png"], TypeError, "image 1 of the list must be a PIL image; got str"),
        (7, TypeError, "a folder, a tensor or a list of PIL images; got int"),
    ],
)
def test_unclear_sources_are_errors_and_never_guesses(images, error, message):
    with pytest.raises(error, match=message):
        load_images(images)
