import copy
import inspect
import json
import pickle
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline

from diffgen.pipelines import APG, CFG, GuidedStableDiffusion3Pipeline, guide, guided
from diffgen.tiny import tiny_pipeline

READY = ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"]
pytestmark = pytest.mark.filterwarnings("ignore:.*guidance-distilled")


@pytest.fixture
def build(scene):
    """A scene whose pipeline is of the guided class, from the components of the tiny one."""

    def build(name):
        s = scene(name)
        s.pipe = guided(type(s.pipe)).from_pipe(s.pipe)
        s.pipe.set_progress_bar_config(disable=True)
        return s

    return build


@pytest.fixture
def sd3(build):
    return build("StableDiffusion3Pipeline")


@pytest.mark.parametrize("name", [*READY, "WanPipeline", "QwenImagePipeline"])
def test_the_rule_in_the_call_guides_that_call_and_no_other(name, build):
    s = build(name)
    stock, default = s.run(), s.run(s.call)
    assert s.pipe.nfe == 0
    assert torch.equal(s.run({**s.call, "guidance": CFG(4.0)}), stock)
    assert s.pipe.nfe == 6
    apg = s.run({**s.call, "guidance": APG(4.0, eta=0.0)})
    assert not torch.equal(apg, stock)
    with guide(s.pipe, APG(4.0, eta=0.0)):
        assert torch.equal(s.run(s.call), apg)
    assert torch.equal(s.run({**s.call, "guidance": None}), default)
    assert type(s.pipe) is guided(getattr(diffusers, name))
    assert "_guidance_run" not in vars(s.pipe)


@pytest.mark.parametrize("name", READY)
def test_the_ready_classes_are_those_of_guided(name):
    import diffgen.pipelines

    cls = getattr(diffgen.pipelines, f"Guided{name}")
    assert cls is guided(getattr(diffusers, name)) is guided(cls)
    assert issubclass(cls, getattr(diffusers, name))
    assert repr(cls) == f"<class 'diffgen.pipelines.guided.Guided{name}'>"
    stock = inspect.signature(getattr(diffusers, name).__call__).parameters
    ours = inspect.signature(cls.__call__).parameters
    assert [k for k in ours if k != "guidance"] == list(stock)
    assert all(ours[k] == v for k, v in stock.items())
    assert ours["guidance"].default is None
    assert "guidance (`diffgen.pipelines.Guidance`" in cls.__call__.__doc__
    assert "num_inference_steps" in cls.__call__.__doc__


def test_importing_the_pipelines_does_not_import_diffusers_pipelines():
    code = (
        "import sys, diffgen.pipelines as p; assert not [m for m in sys.modules if m.startswith('diffusers.pipelines.')];"
        "import diffgen.pipelines.guided; assert callable(p.guided), p.guided"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stock_folders_load_and_it_saves_stock_folders(tmp_path, scene):
    s = scene("StableDiffusion3Pipeline")
    stock = s.run()
    s.pipe.save_pretrained(tmp_path / "stock")
    s.pipe = GuidedStableDiffusion3Pipeline.from_pretrained(tmp_path / "stock")
    assert type(s.pipe) is GuidedStableDiffusion3Pipeline
    s.pipe.set_progress_bar_config(disable=True)
    assert torch.equal(s.run({**s.call, "guidance": CFG(4.0)}), stock)
    s.pipe.save_pretrained(tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    index.pop("_name_or_path")  # where it was loaded from
    assert index == json.loads((tmp_path / "stock" / "model_index.json").read_text())
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "ours")) is StableDiffusion3Pipeline
    assert type(StableDiffusion3Pipeline.from_pretrained(tmp_path / "ours")) is StableDiffusion3Pipeline


def test_positional_arguments_and_a_scale_in_the_call_work(sd3):
    rest = {k: v for k, v in sd3.call.items() if k != "prompt"}
    two = sd3.run({**sd3.call, "guidance_scale": 2.0})
    seed = torch.Generator().manual_seed(0)
    out = sd3.pipe(sd3.call["prompt"], **rest, generator=seed, guidance=CFG(4.0), guidance_scale=2.0)[0]
    assert torch.equal(out, two)


def test_other_tasks_of_the_same_components_are_guided_too(sd3):
    pipe = guided(StableDiffusion3Img2ImgPipeline).from_pipe(sd3.pipe)
    pipe.set_progress_bar_config(disable=True)
    other = diffusers.AutoPipelineForImage2Image.from_pipe(sd3.pipe)
    assert type(other) is StableDiffusion3Img2ImgPipeline
    call = {"prompt": "a red circle", "image": torch.rand(1, 3, 16, 16), "num_inference_steps": 4, "strength": 0.5}
    call |= {"height": 16, "width": 16, "max_sequence_length": 16, "output_type": "latent"}

    def seed():
        return torch.Generator().manual_seed(0)

    stock = other(**call, guidance_scale=3.0, generator=seed()).images
    assert torch.equal(pipe(**call, guidance=CFG(3.0), generator=seed()).images, stock)
    assert pipe.nfe == 4


def test_an_error_in_the_call_leaves_the_pipeline_as_it_was(sd3):
    default = sd3.run(sd3.call)
    with pytest.raises(ValueError, match="divisible"):
        sd3.run({**sd3.call, "guidance": CFG(4.0), "height": 15})
    with pytest.raises(TypeError, match="rule must be a Guidance"):
        sd3.run({**sd3.call, "guidance": 4.0})
    assert type(sd3.pipe) is GuidedStableDiffusion3Pipeline
    assert torch.equal(sd3.run(sd3.call), default)


def test_a_rule_in_the_call_under_another_rule_is_an_error_and_guide_alone_works(sd3):
    stock = sd3.run()
    with guide(sd3.pipe, CFG(4.0)) as run:
        assert torch.equal(sd3.run(sd3.call), stock)
        assert run.nfe == 6
        assert guided(type(sd3.pipe)) is GuidedStableDiffusion3Pipeline
        with pytest.raises(ValueError, match=r"take that rule off with guide\(pipe, None\)"):
            sd3.run({**sd3.call, "guidance": CFG(2.0)})
        assert torch.equal(sd3.run(sd3.call), stock)
    assert type(sd3.pipe) is GuidedStableDiffusion3Pipeline


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_and_pickles_are_of_the_same_class(copied):
    stock = tiny_pipeline("StableDiffusion3Pipeline")
    pipe = copied(GuidedStableDiffusion3Pipeline.from_pipe(stock))
    assert type(pipe) is GuidedStableDiffusion3Pipeline
    assert sorted(pipe.components) == sorted(stock.components)
    assert pickle.loads(pickle.dumps(GuidedStableDiffusion3Pipeline)) is GuidedStableDiffusion3Pipeline


@pytest.mark.parametrize("thing", [3, "StableDiffusion3Pipeline", torch.nn.Linear, diffusers.AutoPipelineForText2Image])
def test_what_is_no_pipeline_class_is_a_type_error(thing):
    with pytest.raises(TypeError, match="guided expects a diffusers pipeline class, got"):
        guided(thing)


def test_a_pipeline_object_is_sent_to_guide(sd3):
    with pytest.raises(TypeError, match=r"for a pipeline object use guide\(pipe, rule\)"):
        guided(sd3.pipe)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("StableDiffusionInstructPix2PixPipeline", "three branches"),
        ("LatentConsistencyModelPipeline", "never runs CFG"),
        ("DDPMPipeline", "has no guidance_scale"),
        ("KandinskyPriorPipeline", "has no denoiser"),
    ],
)
def test_classes_that_cannot_be_guided_are_value_errors_with_the_reason(name, reason):
    with pytest.raises(ValueError, match=reason):
        guided(getattr(diffusers, name))


def test_every_exported_class_has_its_guided_form_under_a_name():
    from diffgen.pipelines import guided as function
    from diffgen.pipelines.guided import GuidedStableDiffusionXLInpaintPipeline as cls

    assert cls is function(diffusers.StableDiffusionXLInpaintPipeline)
    with pytest.raises(ImportError):
        from diffgen.pipelines.guided import GuidedNothingPipeline  # noqa: F401
