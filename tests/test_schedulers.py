import logging

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diffgen.samplers import log_prob
from diffgen.schedulers import DDIMSDEScheduler, FlowSDEScheduler, stochastic

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Messages(logging.Handler):
    """Collects what diffusers logs; its loggers don't propagate to pytest's."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture
def messages():
    handler, logger = Messages(), logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.WARNING)  # another test may have made it quiet
    logger.addHandler(handler)
    yield handler.texts
    logger.removeHandler(handler)
    logger.setLevel(level)


def walk(scheduler, n=4, dtype=torch.float32, **step):
    """The latents of n steps on a stand-in for a denoiser."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(n)
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    path = [x]
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x) - 0.3, t, x, generator=generator, return_dict=False, **step)[0]
        path.append(x)
    return path


# --- configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowSDEScheduler(shift=3.0, noise_level=0.4, window=(1, 3)),
        DDIMSDEScheduler(**SD, prediction_type="v_prediction", eta=0.5, window=(0, 2)),
    ],
    ids=["flow", "ddim"],
)
def test_a_saved_scheduler_loads_with_its_configuration_and_takes_the_same_steps(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    differ = {k for k, v in scheduler.config.items() if not k.startswith("_") and loaded.config[k] != v}
    assert differ <= {"window"}
    assert tuple(loaded.config.window) == scheduler.config.window
    assert torch.equal(walk(loaded)[-1], walk(scheduler)[-1])


def test_the_schedulers_know_all_parameters_of_their_parents():
    for cls, parent, extra in (
        (FlowSDEScheduler, FlowMatchEulerDiscreteScheduler, {"noise_level": 0.7, "window": None}),
        (DDIMSDEScheduler, DDIMScheduler, {"eta": 1.0, "window": None}),
    ):
        ours = {k: v for k, v in cls().config.items() if not k.startswith("_")}
        theirs = {k: v for k, v in parent().config.items() if not k.startswith("_")}
        assert ours == theirs | extra


@pytest.mark.parametrize("theirs", [FlowMatchEulerDiscreteScheduler, DDIMScheduler])
def test_set_timesteps_has_the_parents_signature_since_pipelines_read_off_it_what_a_scheduler_takes(theirs):
    import inspect

    ours = {FlowMatchEulerDiscreteScheduler: FlowSDEScheduler, DDIMScheduler: DDIMSDEScheduler}[theirs]
    assert inspect.signature(ours.set_timesteps) == inspect.signature(theirs.set_timesteps)


SOURCES = {
    "unipc": (UniPCMultistepScheduler(**FLOW), FlowSDEScheduler, {"shift": 5.0}),
    "dpm flow": (DPMSolverMultistepScheduler(**FLOW), FlowSDEScheduler, {"shift": 5.0}),
    "flow euler": (
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.7, shift_terminal=0.1),
        FlowSDEScheduler,
        {"use_dynamic_shifting": True, "base_shift": 0.7, "shift_terminal": 0.1},
    ),
    "dpm": (DPMSolverMultistepScheduler(**SD), DDIMSDEScheduler, SD | {"prediction_type": "epsilon"}),
    "euler v": (EulerDiscreteScheduler(**SD, prediction_type="v_prediction", steps_offset=1), DDIMSDEScheduler, SD
        | {"prediction_type": "v_prediction", "steps_offset": 1}),
    "ddim": (DDIMScheduler(**SD, set_alpha_to_one=False), DDIMSDEScheduler, SD | {"set_alpha_to_one": False}),
    "ddim zero snr": (
        DDIMScheduler(**SD, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        DDIMSDEScheduler,
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "pndm": (PNDMScheduler(**SD, steps_offset=1, skip_prk_steps=True), DDIMSDEScheduler, SD | {"steps_offset": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_stochastic_carries_the_schedule_over_and_diffusers_has_nothing_to_warn_of(name, messages):
    source, cls, expected = SOURCES[name]
    logging.getLogger("diffusers").warning("a message that the collector must see")
    result = stochastic(source, window=(0, 2))
    assert type(result) is cls
    assert {k: result.config[k] for k in expected} == expected
    assert messages == ["a message that the collector must see"]
    assert result.config.window == (0, 2)
    if cls is DDIMSDEScheduler:
        assert torch.equal(result.alphas_cumprod, source.alphas_cumprod)
        assert not result.config.clip_sample
        assert not result.config.thresholding


def test_stochastic_sets_the_amount_of_noise_under_the_name_that_each_kind_has():
    assert stochastic(SOURCES["unipc"][0], noise_level=0.3).config.noise_level == 0.3
    assert stochastic(SOURCES["dpm"][0], noise_level=0.3).config.eta == 0.3
    assert stochastic(SOURCES["unipc"][0]).config.noise_level == 0.7
    assert stochastic(SOURCES["dpm"][0]).config.eta == 1.0
    again = stochastic(stochastic(SOURCES["unipc"][0], noise_level=0.3, window=(0, 1)))
    assert (again.config.noise_level, again.config.window) == (0.3, None)


# --- steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_noise_the_flow_scheduler_is_diffusers_euler_bit_for_bit(dtype):
    ours = walk(FlowSDEScheduler(shift=3.0, noise_level=0.0), dtype=dtype)
    stock = walk(FlowMatchEulerDiscreteScheduler(shift=3.0), dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))
    noisy = walk(FlowSDEScheduler(shift=3.0), dtype=dtype)
    assert not torch.equal(noisy[-1], stock[-1])
    assert noisy[-1].dtype == dtype


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_ddim_scheduler_takes_the_steps_of_diffusers_with_the_same_eta_and_noise(eta):
    ours = walk(DDIMSDEScheduler(**SD, eta=eta, clip_sample=False, steps_offset=1))
    stock = walk(DDIMScheduler(**SD, clip_sample=False, steps_offset=1), eta=eta)
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_steps_outside_the_window_are_deterministic_and_only_those_inside_are_recorded():
    for scheduler in (FlowSDEScheduler(window=(1, 3)), DDIMSDEScheduler(**SD, window=(1, 3), clip_sample=False)):
        for _ in range(2):  # the count of steps starts anew with each run
            with scheduler.recording() as transitions:
                path = walk(scheduler, 5)
            assert [t.index for t in transitions] == [1, 2]
        quiet = type(scheduler).from_config(scheduler.config, window=(0, 0))
        stock = walk(quiet, 5)
        assert torch.equal(path[1], stock[1])
        assert not torch.equal(path[2], stock[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [lambda: FlowSDEScheduler(shift=3.0), lambda: DDIMSDEScheduler(**SD, set_alpha_to_one=False, steps_offset=1)],
)
def test_a_recorded_log_prob_is_that_of_the_latent_that_the_model_sees_next(make, dtype):
    scheduler = make()
    with scheduler.recording() as transitions:
        path = walk(scheduler, dtype=dtype)
    walk(scheduler)
    assert len(transitions) == 4  # nothing is recorded after the block
    for i, t in enumerate(transitions):
        out = torch.tanh(path[i]) - 0.3
        assert t.index == i
        assert t.x is path[i]
        assert t.x_next is path[i + 1]
        assert t.logp.dtype == torch.float32
        assert torch.equal(t.logp, log_prob(t.x_next, t.remake(out)))
        some = t.remake(out[1:], slice(1, 2))
        assert torch.equal(log_prob(t.x_next[1:], some), t.logp[1:])
        assert not torch.equal(t.logp, log_prob(t.x_next, t.remake(out + 0.1)))


def test_recording_ends_with_an_exception_too():
    scheduler = FlowSDEScheduler()
    with pytest.raises(KeyError), scheduler.recording():
        raise KeyError
    assert scheduler._transitions is None


def test_noise_can_be_given_for_each_step():
    scheduler, asked = FlowSDEScheduler(shift=3.0), []

    def noise(step, like):
        asked.append((step, like.shape))
        return torch.zeros_like(like)

    scheduler.noise = noise
    with scheduler.recording() as transitions:
        path = walk(scheduler)
    assert asked == [(i, path[0].shape) for i in range(4)]
    for i, t in enumerate(transitions):
        torch.testing.assert_close(t.x_next, t.remake(torch.tanh(path[i]) - 0.3).mean)


def test_the_steps_generator_decides_the_noise():
    first, second = walk(FlowSDEScheduler()), walk(FlowSDEScheduler())
    assert torch.equal(first[-1], second[-1])


def test_ddim_without_timesteps_says_what_to_call():
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        DDIMSDEScheduler().step(torch.zeros(1, 1), 1, torch.zeros(1, 1))


# --- in pipelines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "WanPipeline"])
def test_stock_pipelines_run_with_a_stochastic_scheduler(name, scene):
    s = scene(name)
    euler = s.run()
    s.pipe.scheduler = stochastic(s.pipe.scheduler)
    torch.manual_seed(0)  # flow pipelines don't hand their generator to scheduler.step
    with s.pipe.scheduler.recording() as transitions:
        latents = s.run()
    assert [t.index for t in transitions] == [0, 1, 2]
    assert torch.equal(latents.flatten(), transitions[-1].x_next.flatten())
    assert latents.isfinite().all()
    assert not torch.equal(latents, euler)
    torch.manual_seed(0)
    assert torch.equal(latents, s.run())


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_a_pipeline_saved_with_a_stochastic_scheduler_reloads_with_it(name, scene, tmp_path):
    s = scene(name)
    s.pipe.scheduler = stochastic(s.pipe.scheduler, noise_level=0.4, window=(0, 2))
    torch.manual_seed(0)
    before = s.run()
    s.pipe.save_pretrained(tmp_path)
    s.pipe = DiffusionPipeline.from_pretrained(tmp_path)
    s.pipe.set_progress_bar_config(disable=True)
    assert type(s.pipe.scheduler) in (FlowSDEScheduler, DDIMSDEScheduler)
    assert tuple(s.pipe.scheduler.config.window) == (0, 2)
    torch.manual_seed(0)
    assert torch.equal(s.run(), before)
