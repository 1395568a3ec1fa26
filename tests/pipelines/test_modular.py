"""Rules as guiders of diffusers' modular pipelines, and guiders as rules under guide()."""

import contextlib
import copy
import functools
import importlib
import json
import sys
from dataclasses import dataclass

import diffusers
import pytest
import torch
from diffusers import guiders

from diffgen import registry
from diffgen.pipelines import APG, CFG, Guidance, Rescale, Wrapper, as_guider, from_guider, guide
from diffgen.pipelines.base import per_sample
from diffgen.pipelines.modular import RuleGuider
from diffgen.tap import StepInfo
from diffgen.tiny import call_kwargs, tiny_pipeline

BLOCKS = {
    "StableDiffusion3Pipeline": ("stable_diffusion_3", "StableDiffusion3AutoBlocks"),  # hands the latents to its guider
    "QwenImagePipeline": ("qwenimage", "QwenImageAutoBlocks"),  # doesn't, as most
    "StableDiffusionXLPipeline": ("stable_diffusion_xl", "StableDiffusionXLAutoBlocks"),  # calls with positions
    "WanPipeline": ("wan", "WanBlocks"),  # fields of the block state
    "ZImagePipeline": ("z_image", "ZImageAutoBlocks"),  # lists, a frame axis, the sign turned
    "FluxPipeline": ("flux", "FluxAutoBlocks"),  # has no guider
}
GUIDED = [name for name in BLOCKS if name != "FluxPipeline"]
STEPS = 3
NEGATIVE = ["green", "dark background"]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """diffusers' own warnings (experimental, no image encoder given) and bars."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    yield
    diffusers.utils.logging.set_verbosity(level)
    diffusers.utils.logging.enable_progress_bar()


class Scene:
    """A classic tiny pipeline and the modular one with the same components, without its decoder."""

    def __init__(self, name, **variants):
        self.name, self.classic = name, tiny_pipeline(name, **variants)
        module, blocks = BLOCKS[name]
        blocks = getattr(importlib.import_module(f"diffusers.modular_pipelines.{module}"), blocks)()
        blocks.sub_blocks.pop("decode")
        self.pipe = blocks.init_pipeline()
        self.pipe.update_components(**self.classic.components)
        self.denoiser = getattr(self.classic, "transformer", None) or self.classic.unet

    @property
    def call(self):
        prompts = {
            "prompt": ["a red circle", "two large blue squares left of a cross"],
            "negative_prompt": list(NEGATIVE),
        }
        return prompts | {"num_inference_steps": STEPS, **call_kwargs(self.name)}

    def run(self, guider, seed=0, **more):
        if guider is not None:
            self.pipe.update_components(guider=guider)
        generator = torch.Generator().manual_seed(seed)
        return self.pipe(**self.call | more, generator=generator, output="latents")

    def run_classic(self, rule=None, **more):
        call = {"generator": torch.Generator().manual_seed(0), "output_type": "latent", "return_dict": False}
        with contextlib.nullcontext() if rule is None else guide(self.classic, rule):
            return self.classic(**self.call | call | more)[0]

    @contextlib.contextmanager
    def rows(self):
        """The number of rows that each call of the denoiser's forward evaluates."""
        seen, original = [], self.denoiser.forward

        @functools.wraps(original)  # Qwen-Image's blocks read its signature
        def forward(*args, **kwargs):
            sample = next(
                (kwargs[k] for k in ("sample", "hidden_states", "x") if k in kwargs), args[0] if args else None
            )
            seen.append(len(sample))
            return original(*args, **kwargs)

        self.denoiser.forward = forward
        try:
            yield seen
            assert self.denoiser.forward is forward
        finally:
            del self.denoiser.forward

    def guider(self, rule):
        return as_guider(rule, scheduler=self.pipe.scheduler)

    @property
    def clean(self):
        return "forward" not in vars(self.denoiser)


@pytest.fixture(scope="module")
def scenes():
    made = {}

    def scene(name="StableDiffusion3Pipeline"):
        if name not in made:
            made[name] = Scene(name)
        return made[name]

    return scene


@dataclass
class First(Wrapper):
    """Guidance in the first k steps only; of `late` also later, for the second sample alone."""

    k: int = 1
    late: bool = False

    def wants_uncond(self, step):
        return True if step.index < self.k else torch.tensor([False, True]) if self.late else False


@dataclass
class Counting(Guidance):
    """Writes down its steps; its state counts them."""

    def __call__(self, cond, uncond, step):
        step.state["n"] = step.state.get("n", torch.zeros(len(cond))) + 1
        self.seen = [*getattr(self, "seen", []), (step.index, int(step.state["n"][0]))]
        return uncond + self.scale * (cond - uncond) * step.state["n"].view(-1, *[1] * (cond.ndim - 1))


@dataclass
class Louder(Wrapper):
    """Away from the denoiser with one of its modules scaled."""

    factor: float = 3.0
    weak: torch.nn.Module | None = None

    def extra(self, step):
        @contextlib.contextmanager
        def alter(denoiser):
            part = denoiser.transformer_blocks[0].ff
            handle = part.register_forward_hook(lambda module, args, out: self.factor * out)
            try:
                yield denoiser
            finally:
                handle.remove()

        @contextlib.contextmanager
        def other(denoiser):
            yield self.weak

        return {"loud": alter if self.weak is None else other}

    def wants_uncond(self, step):
        return False

    def __call__(self, cond, uncond, step):
        assert torch.equal(uncond, cond)
        return self.inner(cond, step.extra["loud"], step)


@dataclass
class Failing(Louder):
    def extra(self, step):
        @contextlib.contextmanager
        def alter(denoiser):
            with super(Failing, self).extra(step)["loud"](denoiser):
                handle = denoiser.transformer_blocks[1].register_forward_pre_hook(broken)
                try:
                    yield denoiser
                finally:
                    handle.remove()

        def broken(module, args):
            raise ZeroDivisionError("in the denoiser")

        return {"loud": alter}


# --- as_guider --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GUIDED)
def test_cfg_is_diffusers_own_guider_bit_for_bit_and_makes_as_many_calls(scenes, name):
    scene = scenes(name)
    with scene.rows() as theirs:
        stock = scene.run(guiders.ClassifierFreeGuidance(4.0))
    with scene.rows() as ours:
        assert torch.equal(scene.run(as_guider(CFG(4.0))), stock)
    assert ours == theirs == [2] * 2 * STEPS
    assert scene.clean


@pytest.mark.parametrize("name", GUIDED)
def test_a_rule_in_x0_space_gives_what_it_gives_in_the_classic_pipeline(scenes, relative, name):
    scene = scenes(name)
    rule = APG(6.0, norm_threshold=2.0)
    modular = scene.run(scene.guider(rule))
    classic = scene.run_classic(rule)
    if modular.shape != classic.shape:
        modular = scene.pipe.pachifier.pack_latents(modular)
    assert relative(modular, classic) < 1e-4
    assert relative(modular, scene.run_classic(APG(6.0, norm_threshold=2.0, space="native"))) > 1e-3


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "QwenImagePipeline"])
def test_the_rule_sees_the_step_as_under_guide(scenes, name):
    scene, seen = scenes(name), []

    @dataclass
    class Watch(Wrapper):
        def wants_uncond(self, step):
            seen.append(step)
            return True

        def begin(self, pipe, step):
            assert pipe.transformer is scene.denoiser
            assert pipe.scheduler is scene.classic.scheduler

    scene.run(scene.guider(Watch(4.0)))
    modular, seen = seen, []
    scene.run_classic(Watch(4.0))
    assert [s.index for s in modular] == [0, 1, 2]
    for a, b in zip(modular, seen, strict=True):
        for name in ("index", "num_steps", "level", "kind", "order", "denoiser"):
            assert getattr(a, name) == getattr(b, name), name
        assert float(a.timestep) == float(b.timestep)
        torch.testing.assert_close(a.x, b.x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["StableDiffusion3Pipeline", "StableDiffusionXLPipeline", "WanPipeline", "ZImagePipeline"]
)
def test_predictions_that_the_rule_does_not_want_are_not_made(scenes, relative, name):
    scene = scenes(name)
    with scene.rows() as rows:
        first = scene.run(scene.guider(First(6.0)))
    assert rows == [2, 2, 2, 2]
    with scene.rows() as rows:
        late = scene.run(scene.guider(First(6.0, late=True)))
    assert rows == [2, 2, 2, 1, 2, 1]
    full = scene.run(scene.guider(CFG(6.0)))
    assert relative(late[1], full[1]) < 1e-4
    assert relative(late[0], first[0]) < 1e-4
    assert relative(first, full) > 1e-3
    assert relative(first, scene.run_classic(First(6.0))) < 1e-4


def test_without_guidance_there_is_one_call_a_step(scenes):
    scene = scenes()
    disabled = as_guider(CFG(4.0))
    disabled.disable()
    plain = scene.run(guiders.ClassifierFreeGuidance(1.0))
    for guider in (as_guider(CFG(1.0)), disabled):
        assert guider.num_conditions == 1
        with scene.rows() as rows:
            assert torch.equal(scene.run(guider), plain)
        assert rows == [2] * STEPS


def test_every_run_starts_with_an_empty_state(scenes):
    scene = scenes()
    rule = Counting(2.0)
    guider = as_guider(rule)
    assert torch.equal(scene.run(guider), scene.run(None))
    assert rule.seen == [(0, 1), (1, 2), (2, 3)] * 2
    momentum = as_guider(APG(6.0, space="native"))
    assert torch.equal(scene.run(momentum), scene.run(None))


def test_a_guider_that_comes_in_late_forgets_its_last_run_too():
    guider = as_guider(Counting(2.0))  # as Wan 2.2's guider_2, which never sees step 0
    guider._state["n"] = torch.ones(2)
    for step, kept in ((2, False), (3, True), (2, False), (2, False)):
        guider.set_state(step, 4, torch.tensor(1.0))
        assert bool(guider._state) is kept
        guider._state["n"] = torch.ones(2)


def test_a_rule_that_needs_the_noise_level_says_so_when_there_is_no_scheduler(scenes):
    scene = scenes()

    @dataclass
    class Scheduled(Wrapper):
        def begin(self, pipe, step):
            _ = pipe.scheduler.timesteps

    for rule in (APG(6.0), Scheduled(6.0)):
        with pytest.raises(ValueError, match=r"as_guider\(rule, scheduler=pipe.scheduler\)"):
            scene.run(as_guider(rule))
        assert scene.clean
    scene.run(as_guider(APG(6.0, space="native")))


@pytest.mark.parametrize("steps", [None, STEPS, 7])
def test_another_scheduler_than_the_running_one_is_refused(scenes, steps):
    scene = scenes()
    other = copy.deepcopy(scene.pipe.scheduler)
    if steps is not None:
        other.set_timesteps(steps)
        other.set_begin_index(0)
    with pytest.raises(ValueError, match="isn't the one that the pipeline runs"):
        scene.run(as_guider(APG(6.0), scheduler=other))
    assert scene.clean


def test_without_a_negative_prompt_there_is_nothing_to_guide_by(scenes):
    scene = scenes()  # SD3 encodes none unless asked; diffusers' guider then calls twice on the same and guides nothing
    with pytest.raises(ValueError, match="CFG has nothing to guide by: give the pipeline a negative_prompt"):
        scene.run(as_guider(CFG(4.0)), negative_prompt=None)
    with scene.rows() as rows:
        scene.run(as_guider(CFG(1.0)), negative_prompt=None)
    assert rows == [2] * STEPS


def test_further_evaluations_are_made_by_the_altered_denoiser(scenes, relative):
    scene = scenes()
    with scene.rows() as rows:
        loud = scene.run(scene.guider(Louder(4.0)))
    assert rows == [2] * 2 * STEPS
    assert scene.clean
    assert not scene.denoiser.transformer_blocks[0].ff._forward_hooks
    assert relative(loud, scene.run_classic(Louder(4.0))) < 1e-4
    assert relative(loud, scene.run(scene.guider(CFG(1.0)))) > 1e-3


def test_a_further_evaluation_may_be_another_models(scenes, relative):
    scene = scenes()
    weak = tiny_pipeline("StableDiffusion3Pipeline", seed=1).transformer
    with scene.rows() as rows:
        guided = scene.run(scene.guider(Louder(4.0, weak=weak)))
    assert rows == [2] * STEPS
    assert relative(guided, scene.run_classic(Louder(4.0, weak=weak))) < 1e-4


def test_nothing_stays_on_the_denoiser_after_an_exception(scenes):
    scene = scenes()
    stock = scene.run(as_guider(CFG(4.0)))
    with pytest.raises(ZeroDivisionError):
        scene.run(scene.guider(Failing(4.0)))
    assert scene.clean
    assert not scene.denoiser.transformer_blocks[0].ff._forward_hooks
    assert torch.equal(scene.run(as_guider(CFG(4.0))), stock)


def test_an_exception_between_preparing_and_calling_the_denoiser_is_made_up_for_at_the_next_step(scenes):
    denoiser = scenes().denoiser
    guider = as_guider(CFG(4.0))
    guider.set_state(0, 2, torch.tensor(1.0))
    guider.prepare_inputs({"text": (torch.zeros(2), torch.ones(2))})
    guider.prepare_models(denoiser)
    assert not scenes().clean
    guider.set_state(0, 2, torch.tensor(1.0))
    assert scenes().clean


def test_a_pipeline_that_copies_the_list_of_conditions_is_refused(scenes):
    guider = as_guider(CFG(4.0))
    guider.set_state(0, 2, torch.tensor(1.0))
    batches = list(guider.prepare_inputs({"text": (torch.zeros(2), torch.ones(2))}))
    with pytest.raises(RuntimeError, match="so a rule cannot guide it"):
        guider(batches)


def test_an_in_place_compiled_denoiser_is_guided_too():
    scene = Scene("StableDiffusion3Pipeline")
    eager = scene.run(scene.guider(Louder(4.0)), num_inference_steps=1)
    scene.denoiser.compile(backend="eager")
    own = scene.denoiser._compiled_call_impl
    compiled = scene.run(scene.guider(Louder(4.0)), num_inference_steps=1)
    assert scene.denoiser._compiled_call_impl is own
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    assert scene.clean


def test_flux_has_no_guider_and_guide_refuses_modular_pipelines(scenes):
    scene = scenes("FluxPipeline")
    assert "guider" not in scene.pipe.component_names, "as_guider's description says that Flux has none"
    with pytest.raises(ValueError, match="FluxModularPipeline has no guidance_scale"), guide(scene.pipe, CFG(4.0)):
        pass


# --- config -----------------------------------------------------------------------------------------------------------

RULES = [
    CFG(3.0, rescale=0.5),
    APG(10.0, norm_threshold="auto", momentum=0.0),
    Rescale(APG(10.0, eta=0.5), phi=0.3),
    First(Rescale(CFG(2.0)), k=2),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_config_round_trip(rule, tmp_path):
    guider = as_guider(rule, scheduler=object())
    guider.save_pretrained(tmp_path)
    json.loads((tmp_path / "guider_config.json").read_text())
    assert RuleGuider.from_pretrained(tmp_path).rule == rule
    assert guider.new().rule == rule
    assert guider.new().scheduler is guider.scheduler
    assert guider.new(rule=CFG(9.0)).rule == CFG(9.0)
    scheduler = object()
    assert RuleGuider.from_pretrained(tmp_path, scheduler=scheduler).scheduler is scheduler
    assert repr(rule) in repr(guider)


def test_the_config_names_rules_within_rules():
    config = as_guider(Rescale(APG(10.0))).config["rule"]
    assert config["name"] == "rescale"
    assert config["rule"]["name"] == "apg"
    assert config["rule"]["scale"] == 10.0
    assert config["phi"] == 0.7


def test_every_registered_rule_comes_back_from_its_config(tmp_path):
    for method in registry.methods("guidance"):
        rule = method.function()
        as_guider(rule).save_pretrained(tmp_path)
        assert RuleGuider.from_pretrained(tmp_path).rule == rule, method.name


def test_bad_configs_and_bad_rules_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"'cgf' is unknown.* did you mean 'cfg'"):
        RuleGuider({"name": "cgf"})
    for name in ("builtins:dict", "antigravity:Rule"):  # a file's name is neither called nor imported
        with pytest.raises(ValueError, match="is unknown, or its module not imported yet"):
            RuleGuider({"name": name})
    assert "antigravity" not in sys.modules
    with pytest.raises(TypeError, match="rule must be a Guidance"):
        as_guider(4.0)
    guider = as_guider(Louder(4.0, weak=torch.nn.Linear(1, 1)))  # runs, but no JSON holds a module
    repr(guider)
    with pytest.raises(TypeError, match="Linear is not JSON serializable"):
        guider.save_pretrained(tmp_path)


# --- from_guider ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "StableDiffusionXLPipeline", "WanPipeline"])
def test_diffusers_cfg_guider_is_the_stock_pipeline_bit_for_bit(scenes, name):
    scene = scenes(name)
    stock = scene.run_classic(guidance_scale=4.0)
    guider = guiders.ClassifierFreeGuidance(4.0)
    assert torch.equal(scene.run_classic(from_guider(guider)), stock)
    assert torch.equal(scene.run_classic(from_guider(guiders.ClassifierFreeGuidance(9.0)), guidance_scale=4.0), stock)
    assert guider._step is None, "the guider was copied"


MOMENTUM = {
    "adaptive_projected_guidance_momentum": -0.5,
    "adaptive_projected_guidance_rescale": 2.0,
    "eta": 0.3,
    "use_original_formulation": True,
}


def zero_star(cond, uncond, step):
    if step.index == 0:
        return torch.zeros_like(cond)
    c, u = cond.flatten(1), uncond.flatten(1)
    s = per_sample((c * u).sum(1) / ((u * u).sum(1) + 1e-8), cond)
    return s * uncond + 4.0 * (cond - s * uncond)


def magnitude(cond, uncond, step):
    d = cond - uncond
    ratio = d.flatten(1).norm(dim=1) / uncond.flatten(1).norm(dim=1)
    return uncond + per_sample(1 + 3.0 * torch.exp(-8 * ratio), d) * d


@dataclass
class Formula(Guidance):
    f: object = None

    def __call__(self, cond, uncond, step):
        return self.f(cond, uncond, step)


@pytest.mark.parametrize(
    ("guider", "rule"),
    [
        (guiders.AdaptiveProjectedGuidance(5.0, **MOMENTUM), APG(6.0, 0.3, -0.5, 2.0, "native")),
        (guiders.ClassifierFreeZeroStarGuidance(4.0, zero_init_steps=1), Formula(4.0, zero_star)),
        (guiders.MagnitudeAwareGuidance(4.0), Formula(4.0, magnitude)),
        (guiders.ClassifierFreeGuidance(4.0, stop=0.34), First(4.0)),
    ],
    ids=["apg", "zero star", "magnitude", "interval"],
)
def test_guiders_agree_with_rules_of_the_same_formula_and_forget_between_runs(scenes, relative, guider, rule):
    packed = isinstance(
        guider, guiders.MagnitudeAwareGuidance
    )  # its torch.norm is an error on [B, C, h, w] in torch 2.14
    scene, asked = scenes("QwenImagePipeline" if packed else "StableDiffusion3Pipeline"), from_guider(guider)
    with scene.rows() as theirs:
        first = scene.run_classic(asked)
    with scene.rows() as ours:
        assert relative(first, scene.run_classic(rule)) < 1e-5
    assert theirs == ours
    assert torch.equal(scene.run_classic(asked), first)


@pytest.mark.parametrize(
    "guider",
    [
        guiders.TangentialClassifierFreeGuidance(4.0),
        guiders.AdaptiveProjectedMixGuidance(3.5),
        guiders.ClassifierFreeGuidance(3.0),
    ],
    ids=lambda g: type(g).__name__,
)
def test_the_same_guider_agrees_in_modular_and_classic_pipelines(scenes, relative, guider):
    scene = scenes()
    if not isinstance(guider, guiders.TangentialClassifierFreeGuidance):  # its is_conditional reads a missing attribute
        modular = scene.run(guider)
        assert relative(scene.run_classic(from_guider(guider)), modular) < 1e-4
    rule = from_guider(guider)
    assert torch.equal(scene.run_classic(rule), scene.run_classic(rule))
    assert relative(scene.run(scene.guider(rule)), scene.run_classic(rule)) < 1e-4


def test_scale_and_activity_are_the_guiders():
    assert from_guider(guiders.ClassifierFreeGuidance(4.0)).scale == 4
    assert from_guider(guiders.ClassifierFreeGuidance(3.0, use_original_formulation=True)).scale == 4
    original = from_guider(guiders.ClassifierFreeGuidance(3.0, use_original_formulation=True)).with_scale(6.0)
    assert (original.scale, original.guider.guidance_scale) == (6.0, 5.0)
    assert from_guider(guiders.ClassifierFreeGuidance(4.0)).active
    assert not from_guider(guiders.ClassifierFreeGuidance(1.0)).active
    assert not from_guider(guiders.ClassifierFreeGuidance(4.0, enabled=False)).active
    rule = CFG(4.0)
    assert from_guider(as_guider(rule)) is rule


def test_momentum_stands_in_the_steps_state_so_that_a_step_can_be_repeated():
    rule = from_guider(guiders.AdaptiveProjectedGuidance(5.0, **MOMENTUM))
    cond, uncond = torch.randn(2, 2, 4, 8, generator=torch.Generator().manual_seed(0)).unbind()
    step = StepInfo(0, 3, torch.tensor(999), None, "", cond)
    rule(cond, uncond, step)
    step.index = 1
    kept = {k: v.clone() for k, v in step.state.items()}
    second = rule(cond, uncond, step)
    again = StepInfo(1, 3, torch.tensor(999), None, "", cond, state=kept)
    assert torch.equal(rule(cond[1:], uncond[1:], again.rows(slice(1, 2))), second[1:])


@pytest.mark.parametrize(
    ("guider", "name"),
    [
        (lambda: guiders.SkipLayerGuidance(skip_layer_guidance_layers=[0]), "SLG"),
        (lambda: guiders.PerturbedAttentionGuidance(perturbed_guidance_layers=[0]), "PAG"),
        (lambda: guiders.SmoothedEnergyGuidance(seg_guidance_layers=[0]), "SEG"),
        (lambda: guiders.AutoGuidance(auto_guidance_layers=[0], dropout=0.1), "AutoGuidance"),
    ],
)
def test_guiders_that_need_more_than_two_predictions_are_refused_by_name_of_our_rule(guider, name):
    with pytest.raises(ValueError, match=rf"use diffgen\.pipelines\.{name}$"):
        from_guider(guider())


def test_what_is_no_guider_or_has_no_rule_here_is_refused():
    with pytest.raises(ValueError, match=r"LTX2Guidance .*no rule here stands for it"):
        from_guider(guiders.LTX2Guidance())
    with pytest.raises(TypeError, match="takes a guider of diffusers, got CFG"):
        from_guider(CFG(4.0))
