"""diffgen.load: what it loads, what it refuses, and what it says."""

import json
import pickle
import subprocess
import sys
import types

import pytest
import torch

import diffgen
from diffgen.loading import _check_index
from diffgen.tiny import call_kwargs, tiny_pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny SD3 pipelines on disk, with and without T5."""
    root = tmp_path_factory.mktemp("models")
    for t5 in (True, False):
        tiny_pipeline("StableDiffusion3Pipeline", t5=t5).save_pretrained(root / str(t5))
    return root


def draw(pipe):
    return pipe(
        "a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt",
        **call_kwargs("StableDiffusion3Pipeline"),
    )[0]  # fmt: skip


@pytest.mark.parametrize("t5", [True, False])
def test_a_folder_gives_the_pipeline_that_was_saved(t5, folders):
    """Also one whose T5 was saved as None, which stock diffusers can't load without being told."""
    pipe = diffgen.load(folders / str(t5))
    assert type(pipe).__name__ == "StableDiffusion3Pipeline"
    assert (pipe.text_encoder_3 is not None) == t5
    assert not pipe.transformer.training
    built = tiny_pipeline("StableDiffusion3Pipeline", t5=t5)
    assert all(torch.equal(v, pipe.transformer.state_dict()[k]) for k, v in built.transformer.state_dict().items())
    torch.testing.assert_close(draw(pipe), draw(built), atol=1e-5, rtol=0)  # memory is aligned otherwise


def test_the_dtype_is_that_of_all_components(folders):
    pipe = diffgen.load(str(folders / "True"), dtype=torch.bfloat16)
    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    assert {p.dtype for m in modules for p in m.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("model", ["shaeps", "/nowhere/model", "./model", "~/model", "a/b/c"])
def test_a_model_that_is_nothing_is_named_with_the_worlds(model, no_network):
    with pytest.raises(
        FileNotFoundError, match=rf"model '{model}' is neither an embedded world \(.*shapes.*\), nor a folder"
    ):
        diffgen.load(model)


def test_the_nearest_world_is_named(no_network):
    with pytest.raises(FileNotFoundError, match="did you mean 'shapes'"):
        diffgen.load("shaeps")


def test_a_hub_id_out_of_reach_fails_at_once(tmp_path):
    """Offline, in an empty cache; a time-out stands for a hang."""
    code = """
import diffgen
try:
    diffgen.load("nobody/no-such-model")
except FileNotFoundError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert "model 'nobody/no-such-model' is no embedded world (shapes" in done.stdout
    assert "could not be fetched from the hub: LocalEntryNotFoundError" in done.stdout


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)


# --- model_index.json -----------------------------------------------------------------------------------------------


def index(folder, content):
    (folder / "model_index.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_a_folder_without_an_index_is_no_pipeline(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no diffusers pipeline: it has no model_index.json"):
        diffgen.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not valid JSON"), ("[]", "must hold a JSON object, got list")]
)
def test_an_index_that_is_no_json_object_is_named(content, message, tmp_path):
    with pytest.raises(ValueError, match=rf"model_index.json.* {message}"):
        diffgen.load(index(tmp_path, content))


@pytest.mark.parametrize(
    "library",
    ["os", "mymodule", "diffusers_evil", "transformersx.y", "..", "diffgen-x", "stable_diffusion/../../x", ""],
)
def test_a_foreign_library_is_refused_without_importing_it(library, tmp_path, monkeypatch):
    (tmp_path / "mymodule.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    index(tmp_path, {"_class_name": "StableDiffusion3Pipeline", "vae": [library, "system"]})
    with pytest.raises(
        ValueError, match=r"component 'vae' names the library .*only diffusers, transformers, diffgen are allowed"
    ):
        diffgen.load(tmp_path)
    assert "mymodule" not in sys.modules


def test_a_foreign_library_is_imported_only_with_the_users_word(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mymodule", types.ModuleType("mymodule"))
    index(tmp_path, {"_class_name": "StableDiffusion3Pipeline", "vae": ["mymodule", "VAE"]})
    _check_index(tmp_path, trust_remote_code=True)
    with pytest.raises(ValueError, match="mymodule"):
        _check_index(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize("value", [["os", "system", "x"], ["os"]])
def test_a_longer_or_shorter_entry_hides_no_library(value, tmp_path):
    index(tmp_path, {"_class_name": "StableDiffusion3Pipeline", "vae": value})
    with pytest.raises(ValueError, match="component 'vae' names the library 'os'"):
        diffgen.load(tmp_path)


def test_a_pipeline_class_of_its_own_code_is_refused(tmp_path):
    index(tmp_path, {"_class_name": ["pipeline", "Mine"], "vae": [None, None]})
    (tmp_path / "pipeline.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    with pytest.raises(ValueError, match=r"(?s)custom code in pipeline.py.*trust_remote_code"):
        diffgen.load(tmp_path)
    assert not (tmp_path / "marker").exists()


def test_the_index_of_published_checkpoints_passes(tmp_path):
    """Stable Diffusion 1.5's safety checker lies in diffusers.pipelines.stable_diffusion."""
    content = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0", "requires_safety_checker": True,
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"], "image_encoder": [None, None], "boundary_ratio": 0.9,
        "force_zeros_for_empty_prompt": True, "expand_timesteps": False,
    }  # fmt: skip
    _check_index(index(tmp_path, content), trust_remote_code=False)


class _Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_a_pickle_is_refused_and_not_run(folders, tmp_path):
    import shutil

    model = shutil.copytree(folders / "True", tmp_path / "model")
    (model / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (model / "transformer" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(tmp_path / "marker")))
    with pytest.raises(
        ValueError, match=r"diffusion_pytorch_model.bin is a pickle; only safetensors weights are loaded"
    ):
        diffgen.load(model)
    (model / "transformer" / "other.safetensors").write_text("")  # its presence makes no pickle safe
    with pytest.raises(ValueError, match=r"no file named diffusion_pytorch_model.safetensors"):
        diffgen.load(model)
    assert not (tmp_path / "marker").exists()


def test_a_pipeline_without_a_known_denoiser_is_named_before_training():
    from diffgen.training.policy import DiffusionPolicy

    class NoDenoiser:
        components = {"prior": None, "vae": None}  # noqa: RUF012

    with pytest.raises(
        ValueError, match=r"NoDenoiser has no denoiser: .* transformer, transformer_2, unet; found .*'prior', 'vae'"
    ):
        DiffusionPolicy(NoDenoiser())


# --- defaults -------------------------------------------------------------------------------------------------------


def test_defaults_of_a_world_apply_and_yield_to_what_is_given(folders):
    pipe = diffgen.with_defaults(
        diffgen.load(folders / "True"), num_inference_steps=2, **call_kwargs("StableDiffusion3Pipeline")
    )
    plain = diffgen.load(folders / "True")

    def run(p, **given):
        return p("a red circle", generator=torch.Generator().manual_seed(0), output_type="pt", **given)[0]

    full = call_kwargs("StableDiffusion3Pipeline")
    assert torch.equal(run(pipe), run(plain, num_inference_steps=2, **full))
    assert torch.equal(run(pipe, num_inference_steps=3), run(plain, num_inference_steps=3, **full))


def test_a_pipeline_with_defaults_saves_as_its_stock_class(folders, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    pipe = diffgen.with_defaults(diffgen.load(folders / "True"), num_inference_steps=2)
    assert isinstance(pipe, StableDiffusion3Pipeline)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusion3Pipeline"
    assert torch.equal(draw(StableDiffusion3Pipeline.from_pretrained(tmp_path)), draw(pipe))


def test_an_unknown_default_is_named(folders):
    with pytest.raises(
        ValueError, match=r"StableDiffusion3Pipeline has no argument 'guidance': did you mean 'guidance_scale'"
    ):
        diffgen.with_defaults(diffgen.load(folders / "True"), guidance=3.0)


def test_the_embedded_world_loads_and_draws():
    pipe = diffgen.load("shapes")
    images = pipe(["a red circle", "three blue squares"], num_inference_steps=2, output_type="pt")[0]
    assert images.shape == (2, 3, 32, 32)
    assert images.isfinite().all()


def test_a_shard_index_that_names_anything_but_safetensors_is_refused(tmp_path):
    tiny_pipeline("StableDiffusionPipeline").save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({"x": torch.zeros(1)}, tmp_path / "unet" / "w.bin")
    index = {"metadata": {}, "weight_map": {"x": "w.bin"}}
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    weights.rename(tmp_path / "unet" / "other.safetensors")
    with pytest.raises(ValueError, match=r"names 'w.bin'; only safetensors"):
        diffgen.load(tmp_path)


def test_weights_that_are_missing_from_the_file_are_named(tmp_path):
    from safetensors.torch import save_file

    tiny_pipeline("StableDiffusionPipeline").save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"unet"):
        diffgen.load(tmp_path)
