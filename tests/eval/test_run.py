import json

import pytest
import torch

import diffgen.eval
from diffgen.eval import EvalResult, evaluate, functional
from diffgen.eval.extractors import get_extractor
from diffgen.eval.run import METRICS


def discs(n, seed, kinds=2):
    """Coloured discs (and, as the second kind, squares) at random places: uint8 [n,3,32,32]."""
    generator = torch.Generator().manual_seed(seed)
    row, column = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    images = []
    for i in range(n):
        x, y, r = (torch.rand(3, generator=generator) * torch.tensor([16, 16, 6]) + torch.tensor([8, 8, 4])).tolist()
        colour = torch.rand(3, generator=generator) * 255
        dx, dy = (column - x).abs(), (row - y).abs()
        inside = dx**2 + dy**2 < r**2 if i % kinds == 0 else torch.maximum(dx, dy) < r
        images.append(torch.where(inside, colour[:, None, None], 255.0))
    return torch.stack(images).byte()


def noisy(images, amount=40):
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(9)) * 2 * amount - amount
    return (images + noise).clamp(0, 255).byte()


REFERENCE, SAME = discs(80, seed=0), discs(80, seed=1)


@pytest.fixture(scope="module")
def efficientnet():
    return get_extractor("efficientnet-lite0", size=64)


@pytest.mark.filterwarnings("ignore:fd")
def test_fd_orders_same_below_collapsed_below_noisy_and_vendi_sees_the_collapse(efficientnet):
    def measure(images):
        return evaluate(images, REFERENCE, metrics=["fd", "vendi"], extractor=efficientnet, ci_samples=0)

    same, noise = measure(SAME), measure(noisy(SAME))
    collapsed = measure(SAME[:8].repeat(10, 1, 1, 1))
    assert same.value("fd") < collapsed.value("fd") < noise.value("fd")
    assert collapsed.value("vendi") < 0.75 * same.value("vendi")


@pytest.mark.filterwarnings("ignore:fd")
def test_fd_of_the_same_distribution_lies_near_its_floor_bracket_and_noise_far_above(efficientnet):
    floor = evaluate(SAME, REFERENCE, metrics=["fd"], extractor=efficientnet, ci_samples=0).scores["fd"].floor
    same = evaluate(SAME, REFERENCE, metrics=["fd"], extractor=efficientnet, ci_samples=0).value("fd")
    assert floor["plug_in"] < same < 1.2 * floor["split"]
    noise = evaluate(noisy(SAME), REFERENCE, metrics=["fd"], extractor=efficientnet, ci_samples=0).value("fd")
    assert noise > 3 * floor["split"]


def test_values_are_those_of_the_plain_functions():
    result = evaluate(SAME, REFERENCE, metrics=["fd", "pairwise", "vendi", "clipping"], extractor="pixels/4")
    pixels = get_extractor("pixels/4")
    x, y = pixels(SAME), pixels(REFERENCE)
    assert result.value("fd") == functional.fd(x, y)
    assert result.value("pairwise") == functional.mean_pairwise(x)
    assert result.value("vendi") == functional.vendi(x)
    assert result.value("clipping") == pytest.approx(float(functional.clipping(SAME).mean()))
    fd = result.scores["fd"]
    margin = 1.96 * functional.bootstrap_sd(functional.fd, x, y, samples=50, seed=0)
    assert (fd.low, fd.high) == pytest.approx((fd.value - margin, fd.value + margin))
    assert (fd.n, fd.m, fd.extractor) == (80, 80, "pixels/4")


def test_the_table_shows_value_margin_floor_counts_and_extractor():
    result = evaluate(SAME, REFERENCE, metrics=["fd", "saturation"], extractor="pixels/4")
    fd_line = next(line for line in result.table().splitlines() if "fd" in line)
    floor = result.scores["fd"].floor
    for text in (f"{result.value('fd'):.4g}", "±", f"[{floor['plug_in']:.4g}, {floor['split']:.4g}]", "80", "pixels/4"):
        assert text in fd_line
    assert "warning" not in result.table()


def test_fewer_images_than_features_are_a_warning_in_python_and_in_the_table():
    with pytest.warns(UserWarning, match="fd: n=20, m=30, d=3072: too few images"):
        result = evaluate(SAME[:20], REFERENCE[:30], metrics=["fd"], extractor="pixels/32", ci_samples=2)
    assert "warning: fd: n=20, m=30, d=3072" in result.table()


@pytest.mark.filterwarnings("ignore:fd")
def test_a_reference_too_small_to_split_leaves_a_lower_bound_of_the_floor():
    result = evaluate(SAME, REFERENCE[:3], metrics=["fd"], extractor="pixels/4", ci_samples=2)
    assert result.scores["fd"].floor["split"] is None
    assert f"> {result.scores['fd'].floor['plug_in']:.4g}" in result.table()


def test_json_holds_what_the_result_holds(tmp_path):
    result = evaluate(SAME, REFERENCE, metrics=["fd", "vendi"], extractor="pixels/4", ci_samples=5, seed=3)
    text = result.to_json(tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    assert report == json.loads(text)
    assert report["metrics"]["fd"]["value"] == result.value("fd")
    assert set(report["metrics"]["fd"]["floor"]) == {"plug_in", "split"}
    assert (report["seed"], report["ci_samples"], report["metrics"]["fd"]["extractor"]) == (3, 5, "pixels/4")


def test_a_seed_fixes_the_whole_report():
    def report():
        return evaluate(SAME, REFERENCE, extractor="pixels/4", ci_samples=5, seed=3).to_json()

    assert report() == report()


def test_the_verifier_is_reported_as_accuracy_with_its_wilson_interval():
    seen = {}

    def verifier(images, prompts):
        seen.update(images=images, prompts=prompts)
        return [prompt == "disc" for prompt in prompts]

    prompts = ("disc", "square") * 40
    result = evaluate(SAME, prompts=prompts, metrics=[], verifier=verifier)
    score = result.scores["verifier"]
    assert (score.value, score.interval) == (0.5, "wilson")
    assert (score.low, score.high) == functional.wilson(40, 80)
    assert torch.equal(seen["images"], SAME)
    assert seen["prompts"] == list(prompts)


def test_the_extractor_runs_once_a_source_and_not_without_need():
    class Counting(torch.nn.Module):
        calls = 0

        def forward(self, images):
            self.calls += 1
            return images.mean((2, 3))

    counting = Counting()
    evaluate(SAME[:50], REFERENCE[:50], metrics=["fd", "pairwise", "vendi"], extractor=counting, ci_samples=3)
    assert counting.calls == 2
    evaluate(SAME[:50], metrics=["saturation", "contrast", "clipping"], extractor=counting)
    assert counting.calls == 2


def test_one_image_is_enough_for_image_statistics():
    result = evaluate(SAME[:1], metrics=["saturation"])
    assert result.scores["saturation"].low is None


def test_a_folder_against_itself_has_distance_zero(tmp_path):
    from PIL import Image

    for i, image in enumerate(SAME[:20]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    with pytest.warns(UserWarning, match="too few images"):
        result = evaluate(tmp_path, str(tmp_path), metrics=["fd"], extractor="pixels/4", ci_samples=0)
    assert result.value("fd") == pytest.approx(0, abs=1e-9)
    assert (result.scores["fd"].low, result.scores["fd"].interval) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["vend"]}, "unknown metric 'vend'; nearest is 'vendi' of fd, pairwise"),
        ({"metrics": []}, "metrics must name at least one of fd"),
        ({"metrics": ["fd"]}, "metric 'fd' needs reference; without, there are pairwise, vendi, saturation"),
        ({"metrics": ["verifier"]}, "metric 'verifier' needs prompts and verifier"),
        ({"metrics": ["vendi"], "verifier": lambda i, p: [1] * 80}, "metric 'verifier' needs prompts"),
        ({"metrics": ["clipping"], "prompts": ["a"]}, "one an image; got 1 prompts and 80 images"),
        ({"metrics": ["vendi"], "ci_samples": 1}, "ci_samples must be 0 .* at least 2; got 1"),
        (
            {"metrics": [], "prompts": ["a"] * 80, "verifier": lambda i, p: [1]},
            r"\[80\] values, one an image; got \[1\]",
        ),
        ({"metrics": [], "prompts": ["a"] * 80, "verifier": lambda i, p: [0.5] * 80}, r"values in \{0,1\}; got 0.5"),
    ],
)
def test_bad_arguments_are_value_errors_that_say_what_would_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(SAME, **arguments)


def test_a_string_for_metrics_is_an_error_with_the_list_to_pass():
    with pytest.raises(TypeError, match=r"did you mean \['fd'\]\?"):
        evaluate(SAME, REFERENCE, metrics="fd")


def test_a_metric_that_was_not_evaluated_is_named_in_the_error():
    with pytest.raises(KeyError, match="'fd' was not evaluated; there are saturation"):
        evaluate(SAME, metrics=["saturation"]).value("fd")


def test_every_metric_has_a_summary_and_known_needs():
    for metric in METRICS.values():
        assert metric.summary
        assert set(metric.needs) <= {"x", "y", "images", "prompts", "verifier"}


def test_the_package_exports_lazily_and_names_what_it_lacks():
    assert dir(diffgen.eval) == ["EvalResult", "evaluate", "functional"]
    assert EvalResult is diffgen.eval.run.EvalResult
    with pytest.raises(AttributeError, match="no attribute 'kid'"):
        _ = diffgen.eval.kid
