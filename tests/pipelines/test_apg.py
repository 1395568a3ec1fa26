import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

from diffgen.parametrization import Level, to_x0
from diffgen.pipelines import APG, CFG, guide
from diffgen.pipelines.apg import projected_update
from diffgen.tap import StepInfo

# shared/methods/guidance.md section 1.4: float64, one sample, c = (3, 4), u = (1, 0), w = 3
C = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
U = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
X = torch.tensor([[2.0, 1.0]], dtype=torch.float64)


def step(x=X, level=None, kind="flow_prediction", state=None, index=0):
    return StepInfo(index, 10, 0, level or Level.flow(0.8), kind, x, {} if state is None else state)


def native(scale=3.0, **options):
    return APG(scale, **({"momentum": 0.0, "norm_threshold": 0.0, "space": "native"} | options))


def random(*shape, n=2, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).unbind()


def near(a, b):
    torch.testing.assert_close(a, torch.tensor([b], dtype=torch.float64), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"eta": 1.0}, (7, 12)),
        ({"eta": 1.0, "norm_threshold": 1e9}, (7, 12)),  # not by way of the CFG shortcut
        ({"eta": 0.0}, (1.72, 4.96)),
        ({"eta": 0.0, "norm_threshold": 2}, (2.4275665977600536, 4.42932505167996)),
        ({"eta": 1.0, "norm_threshold": 2}, (4.788854381999832, 7.577708763999663)),
    ],
)
def test_one_step_in_the_native_space_gives_the_reference_values(options, expected):
    near(native(**options)(C, U, step()), expected)


def test_momentum_sums_the_differences_and_keeps_them_unclipped():
    rule, state = native(eta=1.0, momentum=-0.5), {}
    for buffer, expected in (((2, 4), (7, 12)), ((1, 2), (5, 8)), ((1.5, 3), (6, 10))):
        near(rule(C, U, step(state=state)), expected)
        near(state["momentum"], buffer)
    for _ in range(60):
        rule(C, U, step(state=state))
    near(state["momentum"], (4 / 3, 8 / 3))  # d / (1 - beta)
    clipped, other = native(eta=1.0, momentum=-0.5, norm_threshold=0.1), {}
    clipped(C, U, step(state=other))
    near(other["momentum"], (2, 4))


@pytest.mark.parametrize(
    ("kind", "level", "denoised", "expected"),
    [
        ("flow_prediction", Level.flow(0.8), (-2.3712, -1.8416), (5.464, 3.552)),
        ("epsilon", Level(0.6, 0.8), (-3.952, -3.0693333333), (5.464, 3.552)),
        ("v_prediction", Level(0.6, 0.8), (-1.4029268293, -2.5063414634), (3.2536585366, 3.8829268293)),
    ],
)
def test_in_x0_space_the_projection_is_on_the_denoised_prediction(kind, level, denoised, expected):
    rule = APG(3.0, momentum=0.0, norm_threshold=0.0)
    guided = rule(C, U, step(level=level, kind=kind))
    near(guided, expected)
    near(to_x0(guided, X, level, kind), denoised)


@pytest.mark.parametrize("kind", ["flow_prediction", "epsilon", "v_prediction", "sample"])
def test_in_x0_space_the_threshold_bounds_the_denoised_update(kind):
    level = Level(0.6, 0.8)
    guided = APG(3.0, eta=1.0, momentum=0.0, norm_threshold=0.5)(C, U, step(level=level, kind=kind))
    update = to_x0(guided, X, level, kind) - to_x0(C, X, level, kind)
    assert float(update.norm()) == pytest.approx((3 - 1) * 0.5)  # |D_c - D_u| is at least 0.8 / 1.4 |(2, 4)| = 2.6


def test_a_model_that_predicts_the_sample_is_guided_as_it_is():
    rule = APG(3.0, momentum=0.0, norm_threshold=0.0)
    near(rule(C, U, step(level=Level(0.6, 0.8), kind="sample")), (1.72, 4.96))


def test_diffusers_original_formulation_with_scale_minus_one_is_the_native_space():
    rule, buffer, state = native(7.5, eta=0.3, norm_threshold=2.5, momentum=-0.5), MomentumBuffer(-0.5), {}
    for i in range(5):
        c, u = random(2, 4, 8, 8, seed=i)
        theirs = normalized_guidance(c, u, 6.5, buffer, 0.3, 2.5, use_original_formulation=True)
        assert (rule(c, u, step(c, state=state)) - theirs).abs().max() < 1e-12  # measured: 8.9e-16


def test_diffusers_default_formulation_is_another_method_and_has_a_form_of_its_own():
    theirs = normalized_guidance(C, U, 3.0, None, 0.0, 0.0, use_original_formulation=False)
    near(theirs, (-0.92, 1.44))
    assert (native(eta=0.0)(C, U, step()) - theirs).abs().max() > 1
    near(native(eta=0.0, form="diffusers")(C, U, step()), (-0.92, 1.44))


def test_the_diffusers_form_is_cfg_where_nothing_is_projected_or_clipped_and_else_not_the_condition_at_scale_1():
    c, u = random(2, 4, 8, 8)
    neutral = APG(7.5, eta=1.0, norm_threshold=0.0, momentum=0.0, form="diffusers")
    assert torch.equal(neutral(c, u, step(c)), CFG(7.5)(c, u, step(c)))
    for space in ("x0", "native"):
        unclipped = APG(7.5, eta=1.0, norm_threshold=1e9, momentum=0.0, form="diffusers", space=space)
        torch.testing.assert_close(unclipped(c, u, step(c)), CFG(7.5)(c, u, step(c)))
        assert (APG(1.0, form="diffusers", space=space)(c, u, step(c)) - c).norm() > 1


def test_in_x0_space_the_diffusers_form_starts_from_the_denoised_unconditional_prediction():
    level = Level.flow(0.8)
    guided = APG(3.0, momentum=0.0, norm_threshold=0.0, form="diffusers")(C, U, step(level=level))
    d_c, d_u = (to_x0(out, X, level, "flow_prediction") for out in (C, U))
    update = projected_update(d_c - d_u, d_c, 0.0, 0.0)
    torch.testing.assert_close(to_x0(guided, X, level, "flow_prediction"), d_u + 3 * update)


def test_during_the_cfg_steps_it_is_cfg_at_their_scale_and_the_momentum_gathers():
    """Buffers of c - u = (2, 4) three times at -0.5: (2, 4), (1, 2), (1.5, 3); c + 2 m at step 2."""
    rule, state = native(eta=1.0, momentum=-0.5, cfg_steps=2, cfg_scale=2.0), {}
    for i, (buffer, expected) in enumerate((((2, 4), (5, 8)), ((1, 2), (5, 8)), ((1.5, 3), (6, 10)))):
        near(rule(C, U, step(state=state, index=i)), expected)
        near(state["momentum"], buffer)
    c, u = random(2, 4, 8, 8)
    assert torch.equal(APG(7.5, cfg_steps=1)(c, u, step(c)), CFG(3.5)(c, u, step(c)))


def test_the_cfg_steps_hold_for_neutral_options_too():
    rule = APG(7.0, eta=1.0, norm_threshold=0.0, momentum=0.0, cfg_steps=1, cfg_scale=2.0)
    near(rule(C, U, step()), (5, 8))
    near(rule(C, U, step(index=1)), (15, 28))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_with_eta_1_and_neither_clipping_nor_momentum_it_is_cfg_bit_for_bit(dtype):
    c, u = (x.to(dtype) for x in random(2, 4, 8, 8))
    for space in ("x0", "native"):
        rule = APG(7.5, eta=1.0, norm_threshold=0.0, momentum=0.0, space=space)
        assert torch.equal(rule(c, u, step(c)), CFG(7.5)(c, u, step(c)))


@pytest.mark.parametrize("kind", ["flow_prediction", "epsilon", "v_prediction", "sample"])
def test_with_eta_1_and_no_effective_clipping_it_is_cfg_in_every_space(kind):
    c, u = random(2, 4, 8, 8)
    rule = APG(7.5, eta=1.0, norm_threshold=1e9, momentum=0.0)
    torch.testing.assert_close(rule(c, u, step(c, Level(0.6, 0.8), kind)), CFG(7.5)(c, u, step(c)))


def test_scale_1_is_the_conditional_prediction():
    c, u = random(2, 4, 8, 8)
    for space in ("x0", "native"):
        assert torch.equal(APG(1.0, space=space)(c, u, step(c)), c)


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (3, 6, 5), (3, 4, 2, 3, 3)])
def test_without_a_parallel_part_the_update_is_orthogonal_to_the_direction_and_below_the_threshold(shape):
    d, direction = random(*shape)
    update = projected_update(d, direction, 0.0, 0.0)
    dot = (update * direction).flatten(1).sum(1)
    assert dot.abs().max() < 1e-10
    assert (update.flatten(1).norm(dim=1) > 1).all()
    torch.testing.assert_close(projected_update(d, 5 * direction, 0.0, 0.0), update)
    clipped = projected_update(d, direction, 1.0, 1.5)
    torch.testing.assert_close(clipped.flatten(1).norm(dim=1), torch.full((3,), 1.5, dtype=torch.float64))
    assert (projected_update(d, direction, 0.0, 1.5).flatten(1).norm(dim=1) <= 1.5).all()
    torch.testing.assert_close(projected_update(d, direction, 1.0, 1e6), d)


def test_each_sample_is_guided_as_if_it_were_alone():
    c, u = random(3, 4, 8, 8)
    x = random(3, 4, 8, 8, seed=9)[0]
    rule, together, alone = APG(5.0, norm_threshold=2.0), {}, {}
    for _ in range(2):
        whole = rule(c, u, step(x, state=together))
        single = rule(c[1:2], u[1:2], step(x[1:2], state=alone))
        torch.testing.assert_close(single, whole[1:2], rtol=1e-12, atol=1e-12)


def test_the_order_of_the_elements_does_not_matter():
    c, u = random(2, 6, 8)
    x = random(2, 6, 8, seed=9)[0]
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    whole = APG(5.0, norm_threshold=2.0)(c, u, step(x))[:, order]
    torch.testing.assert_close(APG(5.0, norm_threshold=2.0)(c[:, order], u[:, order], step(x[:, order])), whole)


def test_a_zero_direction_or_difference_is_no_division_by_zero():
    d = C - U
    zero = torch.zeros_like(d)
    assert torch.equal(projected_update(d, zero, 0.0, 0.0), d)  # nothing is parallel to it
    assert torch.equal(projected_update(zero, d, 0.0, 2.0), zero)
    assert torch.equal(APG(5.0)(C, C, step()), C)
    at_the_end = APG(5.0)(C, U, step(level=Level.flow(0.0)))  # sigma 0: the slope is clamped
    assert at_the_end.isfinite().all()


def test_the_automatic_threshold_carries_sdxls_15_over_to_the_latents_size():
    c, u = random(1, 4, 16, 16)
    rule = native(5.0, eta=1.0, norm_threshold="auto")
    u = c - 100 * (c - u)
    update = (rule(c, u, step(c)) - c) / 4
    assert float(update.norm()) == pytest.approx(1.875)  # 15 sqrt(1024 / 65536)


def test_half_precision_predictions_come_back_in_their_dtype_and_are_computed_in_float64():
    c, u = (x.bfloat16() for x in random(2, 4, 8, 8))
    rule = APG(7.5, norm_threshold=2.0)
    guided = rule(c, u, step(c))
    assert guided.dtype == torch.bfloat16
    exact = rule(c.double(), u.double(), step(c.double()))
    assert torch.equal(guided, exact.bfloat16())


def test_x0_space_and_native_space_are_different_methods_in_a_pipeline_and_neutral_settings_are_cfg(scene, relative):
    s = scene("StableDiffusion3Pipeline")
    results = {}
    for name, rule in {
        "x0": APG(4.0, norm_threshold=0.0, momentum=0.0),
        "native": APG(4.0, norm_threshold=0.0, momentum=0.0, space="native"),
        "neutral": APG(4.0, eta=1.0, norm_threshold=0.0, momentum=0.0),
    }.items():
        with guide(s.pipe, rule):
            results[name] = s.run(s.call)
    stock = s.run()
    assert relative(results["x0"], results["native"]) > 1e-2
    assert relative(results["x0"], stock) > 1e-2
    assert torch.equal(results["neutral"], stock)


def test_the_momentum_of_one_call_does_not_reach_the_next(scene):
    s = scene("WanPipeline")
    with guide(s.pipe, APG(4.0, norm_threshold=0.5)):
        first = s.run(s.call)
        assert torch.equal(s.run(s.call), first)
    with guide(s.pipe, APG(4.0, norm_threshold=0.5, momentum=0.0)):
        assert not torch.equal(s.run(s.call), first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_threshold": -1.0}, r"APG.norm_threshold must be a number >= 0 \(0: off\) or 'auto', got -1.0"),
        ({"norm_threshold": float("nan")}, "APG.norm_threshold"),
        ({"norm_threshold": "automatic"}, "APG.norm_threshold .* got 'automatic'"),
        ({"momentum": 1.0}, r"APG.momentum must be in \(-1, 1\), got 1.0"),
        ({"momentum": -1.0}, "APG.momentum"),
        ({"momentum": float("nan")}, "APG.momentum"),
        ({"eta": float("inf")}, "APG.eta must be finite, got inf"),
        ({"space": "eps"}, "APG.space must be 'x0' or 'native', got 'eps'"),
        ({"momentum": "high"}, "APG.momentum .* got 'high'"),
        ({"norm_threshold": True}, "APG.norm_threshold .* got True"),
        ({"form": "original"}, "APG.form must be 'paper' or 'diffusers', got 'original'"),
        ({"cfg_steps": -1}, "APG.cfg_steps must be a whole number >= 0, got -1"),
        ({"cfg_steps": 1.5}, "APG.cfg_steps"),
        ({"cfg_scale": float("inf")}, "APG.cfg_scale must be a number in \\[0, 1000\\], got inf"),
        ({"scale": float("nan")}, "APG.scale must be a number in \\[0, 1000\\], got nan"),
        ({"scale": -1.0}, "APG.scale"),
        ({"scale": "high"}, "APG.scale .* got 'high'"),
    ],
)
def test_a_bad_argument_is_an_error_that_names_the_field(options, message):
    with pytest.raises(ValueError, match=message):
        APG(**options)


def test_predictions_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"cond \(1, 2\) and uncond \(1, 1\) must have one shape"):
        APG(3.0)(C, U[:, :1], step())
