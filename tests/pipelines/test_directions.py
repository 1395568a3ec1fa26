import pytest
import torch

from diffgen.parametrization import Level
from diffgen.pipelines import CFG, PAG, TCFG, Interval, Rescale, ZeroStar, guide
from diffgen.pipelines.directions import tangential
from diffgen.tap import StepInfo

# shared/methods/guidance.md section 3: c = (3, 4), u = (1, 0), w = 3
C = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
U = torch.tensor([[1.0, 0.0]], dtype=torch.float64)


def step(x=C, index=1, n=5):
    return StepInfo(index, n, 0, Level.flow(0.5), "flow_prediction", x)


def random(*shape, n=2, seed=0, dtype=torch.float64):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).unbind()


def near(a, b, tolerance=1e-7):
    torch.testing.assert_close(a, torch.tensor([b], dtype=a.dtype), rtol=tolerance, atol=tolerance)


def by_svd(c, u):
    """The paper's definition, with the library's singular vectors."""
    both = torch.stack([c.flatten(1), u.flatten(1)], 1)
    v = torch.linalg.svd(both, full_matrices=False).Vh[:, 0]
    return ((u.flatten(1) * v).sum(1, keepdim=True) * v).view_as(u)


def test_zero_star_scales_the_unconditional_prediction_to_fit_the_conditional():
    near(ZeroStar(3.0)(C, U, step()), (3, 12))  # s = 3: (3, 0) + 3 (0, 4)
    near(ZeroStar(CFG(3.0), zero_steps=0)(C, U, step(index=0)), (3, 12))


def test_tcfg_gives_the_reference_value():
    near(TCFG(3.0)(C, U, step()), (8.2425356, 11.0298576))


@pytest.mark.parametrize("k", [0, 1, 3])
def test_the_first_k_steps_of_zero_star_are_zero_and_ask_for_no_other_evaluation(k):
    rule = ZeroStar(PAG(3.0, layers=(0,)), zero_steps=k)
    for i in range(5):
        assert bool(rule.wants_uncond(step(index=i))) is (i >= k)
        assert bool(rule.extra(step(index=i))) is (i >= k)
    rule = ZeroStar(3.0, zero_steps=k)
    assert [bool(rule(C, U, step(index=i)).any()) for i in range(5)] == [i >= k for i in range(5)]
    assert rule.wants_uncond(step(index=4)) is True


def test_zero_star_with_parallel_predictions_is_the_conditional_prediction():
    c, _ = random(2, 4, 8, 8)
    torch.testing.assert_close(ZeroStar(7.5)(c, -0.3 * c, step(c)), c, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ZeroStar(7.5)(c, c, step(c)), c, rtol=1e-7, atol=1e-7)


def test_tcfg_with_parallel_predictions_is_the_rule_alone():
    c, _ = random(2, 4, 8, 8)
    for factor in (1.0, -0.3, 4.0):
        torch.testing.assert_close(TCFG(7.5)(c, factor * c, step(c)), CFG(7.5)(c, factor * c, step(c)))


@pytest.mark.parametrize("rule", [ZeroStar(1.0), TCFG(1.0)])
def test_scale_1_is_the_conditional_prediction(rule):
    c, u = random(2, 4, 8, 8)
    torch.testing.assert_close(rule(c, u, step(c)), c, rtol=1e-14, atol=1e-14)


def test_inside_zero_star_and_tcfg_any_rule_sees_the_changed_unconditional_prediction():
    c, u = random(2, 4, 8, 8)
    s = (c * u).flatten(1).sum(1) / ((u * u).flatten(1).sum(1) + 1e-8)
    inner = Rescale(CFG(5.0), 0.7)
    torch.testing.assert_close(ZeroStar(inner)(c, u, step(c)), inner(c, s.view(2, 1, 1, 1) * u, step(c)))
    torch.testing.assert_close(TCFG(inner)(c, u, step(c)), inner(c, by_svd(c, u), step(c)))
    assert ZeroStar(inner).scale == TCFG(inner).scale == 5.0
    assert TCFG(inner).with_scale(3.0) == TCFG(Rescale(CFG(3.0), 0.7))
    assert ZeroStar(inner, zero_steps=2).with_scale(3.0).zero_steps == 2


@pytest.mark.parametrize("shape", [(3, 6, 5), (3, 4, 8, 8), (3, 4, 2, 3, 3)])
@pytest.mark.parametrize(("offset", "factor"), [(0.0, 1.0), (0.9, 1.0), (-2.0, 0.1), (0.0, 30.0), (1.0, 1e-3)])
def test_the_closed_form_of_the_projection_is_the_singular_value_decomposition(shape, offset, factor):
    c, noise = random(*shape)
    u = offset * c + factor * noise
    torch.testing.assert_close(tangential(c, u), by_svd(c, u), rtol=1e-10, atol=1e-11)


def test_the_projection_keeps_of_u_what_is_along_the_larger_of_two_orthogonal_predictions():
    x, y = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert tangential(x, y).tolist() == [[0.0, 0.0]]  # the first direction is c
    assert tangential(y, x).tolist() == [[2.0, 0.0]]  # it is u
    assert tangential(x / 2, y).tolist() == [[0.0, 0.5]]  # a tie: no direction is first


def test_zero_predictions_are_no_division_by_zero():
    zero = torch.zeros_like(C)
    for rule in (ZeroStar(3.0), TCFG(3.0)):
        assert torch.equal(rule(zero, zero, step()), zero)
        near(rule(C, zero, step()), (9, 12))  # CFG with u = 0
        assert rule(zero, U, step()).isfinite().all()


@pytest.mark.parametrize("rule", [ZeroStar(5.0), TCFG(5.0)])
def test_each_sample_is_guided_as_if_it_were_alone(rule):
    c, u = random(3, 4, 8, 8)
    whole = rule(c, u, step(c))
    assert torch.equal(rule(c[1:2], u[1:2], step(c[1:2])), whole[1:2])


@pytest.mark.parametrize("rule", [ZeroStar(5.0), TCFG(5.0)])
def test_half_precision_predictions_come_back_in_their_dtype(rule):
    c, u = random(2, 4, 8, 8, dtype=torch.bfloat16)
    guided = rule(c, u, step(c))
    assert guided.dtype == torch.bfloat16
    exact = rule(c.double(), u.double(), step(c))
    assert float((guided.double() - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("rule", [ZeroStar(5.0), TCFG(5.0)])
def test_gradients_are_finite_also_where_both_predictions_are_the_same(rule):
    c, u = (x.requires_grad_() for x in random(2, 4, 8, 8))
    rule(c, u, step(c)).sum().backward()
    assert c.grad.isfinite().all()
    assert u.grad.any()
    rule(c, u, step(c, index=0)).sum().backward()  # also in the zeroed step
    same = c.detach().requires_grad_()
    rule(same, same, step(c)).sum().backward()
    assert same.grad.isfinite().all()


def test_in_a_pipeline_the_zeroed_step_does_not_move_the_latent_and_saves_its_evaluation(scene):
    s = scene("StableDiffusion3Pipeline")
    latents = []

    def keep(pipe, i, t, tensors):
        latents.append(tensors["latents"].clone())
        return tensors

    with guide(s.pipe, ZeroStar(4.0)) as run:
        s.run(s.call, callback_on_step_end=keep)
    assert run.nfe == 2 * s.STEPS - 1
    start = []
    with guide(s.pipe, ZeroStar(4.0, zero_steps=s.STEPS)) as run:
        start.append(s.run(s.call))
    assert run.nfe == s.STEPS
    assert torch.equal(latents[0], start[0])
    assert not torch.equal(latents[1], latents[0])


def test_interval_and_zero_star_compose_in_a_pipeline_with_two_calls_a_step(scene):
    s = scene("WanPipeline")
    with guide(s.pipe, ZeroStar(Interval(4.0, 0.0, 0.7))) as run:
        s.run(s.call)
    assert run.nfe == 1 + 2 + 1  # zeroed, guided, after the interval


@pytest.mark.parametrize("k", [-1, 1.5, True, "one", float("nan")])
def test_a_bad_number_of_zero_steps_is_an_error_that_names_the_field(k):
    with pytest.raises(ValueError, match=r"ZeroStar.zero_steps must be a whole number >= 0, got "):
        ZeroStar(4.0, zero_steps=k)


@pytest.mark.parametrize("rule", [ZeroStar, TCFG])
def test_what_is_no_rule_is_refused(rule):
    with pytest.raises(TypeError, match=f"{rule.__name__}.rule must be a Guidance or a scale, got 'cfg'"):
        rule("cfg")
