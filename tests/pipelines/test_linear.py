import dataclasses
import json
import math

import pytest
import torch

from diffgen.parametrization import Level
from diffgen.pipelines import APG, CFG, AdaptiveGuidance, Interval, LinearAG, Scheduled, ZeroStar, guide
from diffgen.pipelines.linear import Coefficients, _Collect, _solve, fit
from diffgen.tap import StepInfo

PROMPTS = ["a red circle", "two blue squares", "a green cross", "three yellow circles"]


def step(x, index=0, steps=6, state=None):
    return StepInfo(index, steps, 0, Level.flow(0.5), "flow_prediction", x, {} if state is None else state)


def solved(history, steps=5, intercept=False, offset=0.0):
    """Fits u_t = 0.9 u_{t-1} + 0.5 c_t - 0.4 c_{t-1} (+ offset) on random c; returns ({t: solution}, c, u)."""
    generator = torch.Generator().manual_seed(0)
    c = torch.randn(steps, 4, 3, 8, 8, generator=generator, dtype=torch.float64)
    u = [torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)]
    for t in range(1, steps):
        u.append(0.9 * u[-1] + 0.5 * c[t] - 0.4 * c[t - 1] + offset)
    collect, state = _Collect(CFG(3.0), history=history, intercept=intercept), {}
    for t in range(steps):
        collect(c[t], u[t], step(c[t], t, steps, state))
    return {t: _solve(collect.sums[t], collect.counts[t], intercept) for t in collect.sums}, c, torch.stack(u)


def test_least_squares_finds_the_recurrence():
    """The spec's oracle: at every step (c_t, c_{t-1}, u_{t-1}) = (0.5, -0.4, 0.9)."""
    found, _, _ = solved(history=1)
    for t in range(1, 5):
        assert found[t]["cond"] == pytest.approx([0.5, -0.4], abs=1e-6)
        assert found[t]["uncond"] == pytest.approx([0.9], abs=1e-6)
        assert found[t]["r2"] == pytest.approx(1.0, abs=1e-12)
        assert found[t]["r2_cond"] < found[t]["r2"]
        assert found[t]["r2_last"] < found[t]["r2"]
    assert math.isnan(found[0]["r2"])  # no past, never replaced


def test_collinear_regressors_still_predict_exactly():
    """With all the past as regressors the design is rank-deficient from t = 2 on: coefficients differ, estimates don't."""
    found, c, u = solved(history=4)
    coefficients = Coefficients(
        cond=[found[t]["cond"] for t in range(5)],
        uncond=[found[t]["uncond"] for t in range(5)],
        intercept=[0.0] * 5,
        r2=[],
        r2_cond=[],
        r2_last=[],
        made_for={"model": "", "weights": [], "scheduler": "", "timesteps": [4, 3, 2, 1, 0], "rule": ""},
    )
    for t in range(1, 5):
        past_c, past_u = (x[:t].flip(0).transpose(0, 1) for x in (c, u))
        torch.testing.assert_close(coefficients.estimate(t, c[t], past_c, past_u), u[t], rtol=0, atol=1e-6)


def test_the_intercept_is_found():
    found, _, _ = solved(history=1, intercept=True, offset=0.25)
    assert found[3]["intercept"] == pytest.approx(0.25, abs=1e-6)
    assert solved(history=1, offset=0.25)[0][3]["r2"] < found[3]["r2"]


def sd3_call(s, steps=6):
    call = {k: v for k, v in s.call.items() if k not in ("prompt", "negative_prompt", "output_type")}
    return call | {"num_inference_steps": steps}


@pytest.fixture(scope="module")
def fitted(scene):
    s = scene("StableDiffusion3Pipeline")
    call = sd3_call(s)
    rule = LinearAG(4.0).fitted(s.pipe, PROMPTS, batch_size=2, **call)
    return s, call, rule


def run(s, rule, call, **more):
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    with guide(s.pipe, rule) as opened:
        latents = s.pipe(PROMPTS[:2], generator=generators, output_type="latent", **{**call, **more})[0]
    return latents, opened


def test_it_really_leaves_evaluations_out_and_stays_near_the_guided_sample(fitted, relative):
    s, call, rule = fitted
    full, opened = run(s, CFG(4.0), call)
    assert opened.nfe == 12
    linear, opened = run(s, dataclasses.replace(rule, until=1.0), call)
    assert opened.nfe == 9  # steps 1, 3, 5 are estimated
    paper, opened = run(s, rule, call)
    assert opened.nfe == 6 + 2  # evaluated at 0 and 2, estimated at 1, conditional from 3 on
    truncated, opened = run(s, LinearAG(4.0, every=1, until=0.5), call)
    assert opened.nfe == 9
    conditional, _ = run(s, CFG(1.0), call)
    assert relative(linear, full) < 0.5 * relative(conditional, full)
    assert relative(linear, full) < relative(truncated, full)
    assert not torch.equal(paper, conditional)
    assert "linear_c" not in opened.state  # dropped once nothing needs it


def test_nothing_replaced_is_the_inner_rule_bit_for_bit(fitted):
    s, call, rule = fitted
    for inner in (CFG(4.0), APG(8.0)):
        full, _ = run(s, inner, call)
        assert torch.equal(run(s, LinearAG(inner, every=1, until=1.0), call)[0], full)
    assert torch.equal(run(s, dataclasses.replace(rule, warmup=6, until=1.0), call)[0], run(s, CFG(4.0), call)[0])


def test_the_warmup_is_evaluated(fitted):
    s, call, rule = fitted
    assert run(s, dataclasses.replace(rule, warmup=3, until=1.0), call)[1].nfe == 12 - 2  # 3 and 5 estimated
    assert run(s, dataclasses.replace(rule, every=3, until=1.0), call)[1].nfe == 6 + 2


def test_negative_prompts_work_and_adaptive_guidance_goes_around_it(fitted):
    s, call, rule = fitted
    plain, _ = run(s, rule, call)
    negative, opened = run(s, rule, call, negative_prompt=["green", "dark background"])
    assert opened.nfe == 8
    assert not torch.equal(plain, negative)
    again, opened = run(s, AdaptiveGuidance(dataclasses.replace(rule, until=1.0), threshold=-1.0), call)
    assert opened.nfe == 7  # stops after the first step
    assert torch.isfinite(again).all()


def test_two_calls_a_step_lose_their_second_call(scene):
    s = scene("WanPipeline")
    call = sd3_call(s)
    rule = LinearAG(4.0).fitted(s.pipe, PROMPTS[:2], **call)
    full, _ = run(s, CFG(4.0), call)
    linear, opened = run(s, dataclasses.replace(rule, until=1.0), call)
    assert opened.nfe == 9
    conditional, _ = run(s, CFG(1.0), call)
    assert (linear - full).norm() < (conditional - full).norm()


def test_coefficients_survive_a_file_and_are_found_beside_the_model(fitted, tmp_path):
    s, call, rule = fitted
    path = rule.coefficients.save(tmp_path / "linear_ag" / "six.json")
    want, _ = run(s, rule, call)
    assert torch.equal(run(s, LinearAG(4.0, coefficients=str(path)), call)[0], want)
    s.pipe.register_to_config(_name_or_path=str(tmp_path))
    try:
        assert torch.equal(run(s, LinearAG(4.0), call)[0], want)
        with pytest.raises(
            ValueError,
            match=r"none in .* 5 steps .*there are 6 steps with CFG\(scale=4\) \(other timesteps\)",
        ):
            run(s, LinearAG(4.0), call | {"num_inference_steps": 5})
    finally:
        s.pipe.register_to_config(_name_or_path="")
    with pytest.raises(ValueError, match=r"none given, and none in .* Fit them: diffgen fit linear-ag"):
        run(s, LinearAG(4.0), call)


def test_coefficients_of_another_run_are_refused_naming_both(fitted, scene):
    s, call, rule = fitted
    with pytest.raises(ValueError, match=r"another number of steps: 6; this run has 5"):
        run(s, rule, call | {"num_inference_steps": 5})
    with pytest.raises(ValueError, match=r"fitted for another rule: CFG\(scale=4\); this run has CFG\(scale=5\)"):
        run(s, rule, call | {"guidance_scale": 5.0})
    with pytest.raises(ValueError, match=r"fitted for another rule: CFG.* this run has APG"):
        run(s, LinearAG(APG(4.0), rule.coefficients), call)
    other = scene("StableDiffusion3Pipeline")
    with torch.no_grad():
        for parameter in other.pipe.transformer.parameters():
            parameter.mul_(1.5)
    with pytest.raises(ValueError, match="fitted for another weights"):
        run(other, rule, call)
    wan = scene("WanPipeline")
    with pytest.raises(ValueError, match=r"fitted for another model: SD3Transformer2DModel .* this run has Wan"):
        run(wan, rule, sd3_call(wan))
    from diffusers import FlowMatchHeunDiscreteScheduler

    s.pipe.scheduler, kept = FlowMatchHeunDiscreteScheduler(), s.pipe.scheduler
    try:
        with pytest.raises(
            ValueError, match=r"fitted for another scheduler: FlowMatchEuler.* this run has FlowMatchHeun"
        ):
            run(s, rule, call)
    finally:
        s.pipe.scheduler = kept


def test_a_scale_that_changes_on_the_way_belongs_inside(fitted):
    s, call, rule = fitted
    with pytest.raises(ValueError, match=r"put it outside: LinearAG\(Scheduled"):
        run(s, Scheduled(rule), call)


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"LinearAG.coefficients '.*missing.json' cannot be read: No such file"):
        LinearAG(4.0, coefficients=str(tmp_path / "missing.json"))
    for content in ("{", json.dumps({"cond": []}), "[]", json.dumps({"unknown": 1})):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=r"LinearAG.coefficients '.*bad.json' is no file written by LinearAG"):
            LinearAG(4.0, coefficients=str(tmp_path / "bad.json"))


def test_a_fit_needs_prompts_and_a_guided_run(scene):
    s = scene("StableDiffusion3Pipeline")
    with pytest.raises(ValueError, match="at least one prompt"):
        fit(s.pipe, CFG(4.0), [])
    with pytest.raises(ValueError, match="history must be a whole number >= 1, got 0"):
        fit(s.pipe, CFG(4.0), PROMPTS, history=0)
    with pytest.raises(ValueError, match="ran no guided step at scale 1"):
        fit(s.pipe, CFG(1.0), PROMPTS[:1], **sd3_call(s, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "LinearAG.every must be a whole number >= 1, got 0"),
        ({"every": 1.5}, "LinearAG.every"),
        ({"warmup": 0}, "LinearAG.warmup must be a whole number >= 1, got 0"),
        ({"until": 0.0}, r"LinearAG.until must be a fraction of the steps in \(0, 1\], got 0.0"),
        ({"until": math.nan}, "LinearAG.until"),
        ({"coefficients": 3}, "LinearAG.coefficients must be Coefficients, a file of them, or None, got 3"),
    ],
)
def test_a_bad_option_is_an_error_that_names_it(options, message):
    with pytest.raises(ValueError, match=message):
        LinearAG(4.0, **options)


def test_the_coefficients_that_ship_are_found_for_int_and_float_scales():
    from diffgen import load

    pipe = load("shapes")
    for rule, steps in ((LinearAG(CFG(3)), 10), (LinearAG(3.0), 20), (LinearAG(7.5), 10), (LinearAG(CFG(7.5)), 20)):
        with guide(pipe, rule) as opened:
            pipe("a red circle", num_inference_steps=steps, output_type="latent")
        assert opened.nfe == steps + math.ceil(steps / 4)  # every second step of the first half


@pytest.mark.parametrize(
    "around", [lambda r: ZeroStar(r), lambda r: Interval(r, 0.2, 1.0), lambda r: Interval(r, 0.34, 1.0)]
)
def test_inside_a_rule_that_skips_steps_it_evaluates_until_it_has_a_past(fitted, around):
    s, call, rule = fitted
    latents, opened = run(s, around(dataclasses.replace(rule, until=1.0)), call)
    assert torch.isfinite(latents).all()
    assert opened.nfe < 12


def test_the_warmup_comes_before_everything_else(fitted):
    s, call, rule = fitted
    assert run(s, dataclasses.replace(rule, warmup=5, until=0.2), call)[1].nfe == 6 + 5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d["cond"][1].__setitem__(0, float("nan")), "cond must be 6 lists of finite numbers"),
        (lambda d: d["cond"].__setitem__(1, []), "uncond must be one number shorter than cond at each step"),
        (lambda d: d["uncond"].__setitem__(0, [1.0]), "uncond must be one number shorter"),
        (lambda d: d.__setitem__("cond", {"0": []}), "cond must be 6 lists"),
        (lambda d: d["intercept"].append(0.0), "intercept must be 6 finite numbers"),
        (lambda d: d["made_for"].pop("rule"), "made_for must be a dict of model, rule, scheduler, timesteps, weights"),
        (lambda d: d.__setitem__("made_for", None), "made_for must be a dict"),
        (lambda d: d.__setitem__("version", 99), "version must be 1"),
    ],
)
def test_a_damaged_file_is_refused_naming_the_field(fitted, tmp_path, damage, message):
    path = fitted[2].coefficients.save(tmp_path / "c.json")
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"c.json' is no file written by LinearAG: {message}"):
        LinearAG(4.0, coefficients=str(path))


def test_a_json_bomb_and_a_device_are_refused(fitted, tmp_path):
    (tmp_path / "bomb.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="is no file written by LinearAG"):
        LinearAG(4.0, coefficients=str(tmp_path / "bomb.json"))
    with pytest.raises(OSError, match="is no regular file"):
        fitted[2].coefficients.save(tmp_path)
    assert not list(tmp_path.parent.glob("*.tmp"))


def test_what_is_fitted_is_fitted_at_the_rules_scale(fitted):
    s, call, rule = fitted
    for method in (rule.fitted, AdaptiveGuidance(4.0).calibrated):
        with pytest.raises(ValueError, match=r"guidance_scale=2.0: give the scale to the rule"):
            method(s.pipe, PROMPTS, guidance_scale=2.0, **call)
        with pytest.raises(ValueError, match="prompts must be a list of texts, got the text 'a red circle'"):
            method(s.pipe, "a red circle", **call)
