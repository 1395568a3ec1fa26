import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffgen.eval import extractors
from diffgen.eval.extractors import get_extractor, load_efficientnet_lite0, resize


def stripes(n=3, size=32):
    """Procedural images: image i has vertical stripes of width i+1."""
    column = torch.arange(size)
    return torch.stack([(column // (i + 1) % 2 * 255).byte().expand(3, size, size) for i in range(n)])


@pytest.fixture(scope="module")
def efficientnet():
    return get_extractor("efficientnet-lite0")


def test_efficientnet_gives_1280_deterministic_features_under_a_versioned_id(efficientnet):
    features = efficientnet(stripes())
    assert (efficientnet.id, efficientnet.dim) == ("efficientnet-lite0/pool@bicubic96", 1280)
    assert features.shape == (3, 1280)
    assert features.dtype == torch.float32
    assert torch.isfinite(features).all()
    assert not features.requires_grad
    assert torch.equal(features, efficientnet(stripes()))
    assert (features[0] - features[1]).norm() > 1


def test_batches_do_not_change_features(efficientnet):
    whole = efficientnet(stripes(5))
    efficientnet.batch_size = 2
    torch.testing.assert_close(efficientnet(stripes(5)), whole, rtol=1e-4, atol=1e-4)


def test_the_wheels_weights_fit_timms_network_in_order():
    """The weights are loaded by position, so only predictions can prove them: matplotlib's portrait of Grace Hopper."""
    from matplotlib.cbook import get_sample_data

    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as photo:
        square = photo.convert("RGB").crop((0, 0, 512, 512)).resize((224, 224), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        top5 = load_efficientnet_lite0()((pixels - 127) / 128).topk(5).indices[0].tolist()
    assert 652 in top5  # ImageNet class 652: military uniform


def test_resize_equals_pils_bicubic_on_float_channels():
    images = torch.randint(0, 256, (1, 3, 50, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for size in (96, 17):
        channels = [Image.fromarray(channel.float().numpy()) for channel in images[0]]
        expected = [np.array(c.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 255) for c in channels]
        np.testing.assert_allclose(resize(images, size)[0].numpy() * 255, np.stack(expected), atol=0.01)


def test_the_input_size_is_an_option_and_an_id_gives_its_extractor_again():
    assert get_extractor("efficientnet-lite0", size=64).id == "efficientnet-lite0/pool@bicubic64"
    assert get_extractor("efficientnet-lite0/pool@bicubic64").size == 64
    assert get_extractor("pixels").id == "pixels/32"
    assert get_extractor("pixels/16").dim == 3 * 16 * 16


def test_pixels_are_the_image_itself_at_its_own_size():
    torch.testing.assert_close(get_extractor("pixels/32")(stripes()), stripes().flatten(1) / 255)


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.drop = nn.Dropout(0.9)

    def forward(self, x):
        return self.drop(self.scale * x.mean((2, 3)))


def test_a_users_module_gets_floats_in_0_1_runs_in_eval_mode_and_gets_its_mode_back():
    module = Mean().train()
    module.drop.eval()
    extractor = get_extractor(module)
    assert extractor.dim is None
    white = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    assert extractor(white).tolist() == [[2.0] * 3] * 2
    assert extractor.dim == 3
    assert (module.training, module.drop.training) == (True, False)


def test_a_users_modules_id_changes_with_its_weights_and_size():
    module = Mean()
    before = get_extractor(module).id
    assert before.startswith("custom:")
    assert before == get_extractor(Mean()).id
    assert get_extractor(module, size=16).id == f"{before}@bicubic16"
    module.scale.data += 1
    assert get_extractor(module).id != before


def test_a_module_without_feature_rows_is_an_error():
    with pytest.raises(ValueError, match=r"must return features \[3,D\]; got \[3, 3, 32, 32\]"):
        get_extractor(nn.Identity())(stripes())


def test_a_missing_wheel_is_an_error_with_the_pip_command(monkeypatch):
    monkeypatch.setattr(extractors, "EFFICIENTNET_WHEEL", "no-such-wheel")
    with pytest.raises(ModuleNotFoundError, match=r"pip install no-such-wheel==0\.1\.0"):
        get_extractor("efficientnet-lite0")


def test_an_altered_weight_file_is_an_error(monkeypatch):
    monkeypatch.setattr(extractors, "EFFICIENTNET_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"efficientnet-lite0-57934424\.pth has sha256 579344248a93"):
        get_extractor("efficientnet-lite0")


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("efficientnet", None, "unknown extractor 'efficientnet'; nearest is 'efficientnet-lite0'"),
        ("pixels/pool@32", None, "unknown extractor 'pixels/pool@32'; nearest is 'pixels/32'"),
        ("pixels/32", 16, "size=16 contradicts extractor 'pixels/32'"),
    ],
)
def test_unknown_names_and_contradicting_sizes_are_errors_with_the_nearest_valid(name, size, message):
    with pytest.raises(ValueError, match=message):
        get_extractor(name, size=size)


def test_wrong_types_are_errors():
    with pytest.raises(TypeError, match=r"must be a name, an nn\.Module or an Extractor; got int"):
        get_extractor(3)
    with pytest.raises(TypeError, match=r"takes a uint8 tensor \[N,3,H,W\]; got torch.float32 \[1, 3, 4, 4\]"):
        get_extractor("pixels")(torch.zeros(1, 3, 4, 4))


def test_importing_diffgen_eval_does_not_import_torch():
    code = "import sys, diffgen.eval; assert 'torch' not in sys.modules; diffgen.eval.functional.wilson(1, 2)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
