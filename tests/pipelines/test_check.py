import pytest
import torch

from diffgen import table
from diffgen.pipelines import CFG, check, guide
from diffgen.table import row_for
from diffgen.tiny import TINY, call_kwargs

pytestmark = pytest.mark.filterwarnings("ignore:.*guidance-distilled")


@pytest.mark.parametrize("name", TINY)
def test_pipelines_of_the_table_pass(name, scene):
    difference = check(scene(name).pipe, **call_kwargs(name))
    assert difference < 1e-5 if name == "ZImagePipeline" else difference == 0


@pytest.mark.parametrize("name", ["QwenImagePipeline", "Lumina2Pipeline"])
def test_a_renorm_that_the_row_does_not_know_is_an_error_with_the_difference(name, scene, monkeypatch):
    """The tap alone can't see it: on equal predictions the pipeline's renorm does nothing."""
    s = scene(name)
    known = row_for(s.pipe)
    row = table.Row("two_calls", scale=known.scale, needs_negative=known.needs_negative, post=known.post)
    monkeypatch.setitem(table.ROWS, name, row)
    with pytest.raises(RuntimeError, match=rf"differs from {name}'s own by 0\.\d+ of the largest value .* add a row"):
        check(s.pipe, **call_kwargs(name))


def test_the_wrong_order_of_the_halves_is_an_error(scene, monkeypatch):
    monkeypatch.setitem(table.ROWS, "StableDiffusion3Pipeline", table.Row(cond_first=True))
    with pytest.raises(RuntimeError, match="CFG through the tap differs from StableDiffusion3Pipeline's own by"):
        check(scene("StableDiffusion3Pipeline").pipe, **call_kwargs("StableDiffusion3Pipeline"))


def test_a_pipeline_that_runs_no_cfg_is_an_error(scene, monkeypatch):
    monkeypatch.setitem(table.ROWS, "FluxPipeline", table.Row("two_calls"))  # guidance_scale is the embedded one
    with pytest.raises(RuntimeError, match=r"FluxPipeline ran no CFG at guidance_scale=4.0: it never predicted"):
        check(scene("FluxPipeline").pipe, **call_kwargs("FluxPipeline"))


def test_scale_steps_prompt_and_images_are_taken_and_a_guided_pipeline_is_checked_as_the_stock_one(scene):
    s = scene("StableDiffusion3Pipeline")
    calls = []
    s.pipe.transformer.register_forward_hook(lambda *args: calls.append(1))
    guide(s.pipe, CFG(9.0))
    assert check(s.pipe, "a red circle", 2.0, steps=3, **call_kwargs(s.name) | {"output_type": "np"}) == 0
    assert len(calls) == 9  # stock twice, then tapped
    assert check(s.pipe, ["a red circle", "blue"], steps=1, **call_kwargs(s.name) | {"output_type": "pil"}) == 0
    with guide(s.pipe, CFG(4.0)):
        assert torch.equal(s.run(s.call), s.run(s.call))
