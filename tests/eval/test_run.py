import json

import pytest
import torch

import diffgen.eval
from diffgen.eval import EvalResult, evaluate, functional
from diffgen.eval.extractors import get_extractor
from diffgen.eval.features import features, save_stats
from diffgen.eval.metrics_table import METRICS, NEEDS


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
        ({"metrics": ["vend"]}, "unknown metric 'vend'; nearest is 'vendi' of fd, kid, cmmd"),
        ({"metrics": []}, "metrics must name at least one of fd"),
        (
            {"metrics": ["fd"]},
            "metric 'fd' needs reference; without, there are is, pairwise, vendi, vendi2, saturation",
        ),
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
        assert set(metric.needs) <= set(NEEDS)


def test_the_package_exports_lazily_and_names_what_it_lacks():
    assert dir(diffgen.eval) == ["Comparison", "EvalResult", "compare", "evaluate", "functional"]
    assert EvalResult is diffgen.eval.result.EvalResult
    with pytest.raises(AttributeError, match="no attribute 'kid'"):
        _ = diffgen.eval.kid


def save(images, folder, suffix="png"):
    from PIL import Image

    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.{suffix}")
    return folder


@pytest.mark.filterwarnings("ignore:fd")
def test_all_metrics_are_those_of_the_plain_functions_on_the_same_features():
    train, test, groups = discs(60, seed=2), discs(60, seed=3), [i // 4 for i in range(80)]
    given = {"train": train, "test": test, "groups": groups, "ci_samples": 3, "k": 4}
    result = evaluate(SAME, REFERENCE, metrics="all", extractor="pixels/4", **given)
    assert result.skipped == {"verifier": "needs prompts and verifier", "is": "needs a classifier; pixels/4 is none"}
    x, y, t, fresh = (get_extractor("pixels/4")(images) for images in (SAME, REFERENCE, train, test))
    expected = functional.prdc(x, y, k=4)._asdict() | {
        "kid": functional.kid(x, y),
        "cmmd": functional.cmmd(x, y),
        "fd_infinity": functional.fd_infinity(x, y),
        "vendi2": functional.vendi(x, q=2),
        "intra_prompt": functional.intra_prompt(x, groups).value,
        "authpct": functional.authpct(x, t),
        "ct": functional.ct_score(x, t, fresh),
        "mifid": functional.mifid(x, t),
        "nn_ratio": functional.nn_audit(x, t).ratio,
        "colourfulness": float(functional.colourfulness(SAME).mean()),
    }
    assert {name: result.value(name) for name in expected} == pytest.approx(expected)
    assert result.scores["authpct"].baseline == functional.authpct(fresh, t)
    assert all(score.low is not None for name, score in result.scores.items() if name not in ("fd_infinity", "ct"))
    assert set(result.scores) | set(result.skipped) == set(METRICS)


def test_the_inception_score_comes_from_the_extractors_classes(efficientnet):
    logits = features(SAME, efficientnet, logits=True).logits
    value = evaluate(SAME, metrics=["is"], extractor=efficientnet, ci_samples=0).value("is")
    assert value == functional.inception_score(logits)[0]
    with pytest.raises(ValueError, match="pixels/4 is no classifier"):
        evaluate(SAME, metrics=["is"], extractor="pixels/4")


def test_fd_says_whether_it_can_be_told_from_the_reference():
    same = evaluate(SAME, REFERENCE, metrics=["fd"], extractor="pixels/4")
    noise = evaluate(SAME // 4, REFERENCE, metrics=["fd"], extractor="pixels/4")
    score = same.scores["fd"]
    assert (score.distinguishable, noise.scores["fd"].distinguishable) == (False, True)
    assert score.excess == {end: score.value - floor for end, floor in score.floor.items()}
    assert "not distinguishable from the reference" in same.table()
    assert "not distinguishable" not in noise.table()


@pytest.mark.filterwarnings("ignore:fd")
def test_statistics_serve_fd_alone_and_only_those_of_the_same_extractor(tmp_path):
    path = save_stats(tmp_path / "ref.npz", features(REFERENCE, "pixels/4"))
    images = evaluate(SAME, REFERENCE, metrics=["fd"], extractor="pixels/4").scores["fd"]
    stats = evaluate(SAME, path, metrics=["fd"], extractor="pixels/4").scores["fd"]
    assert (stats.value, stats.m) == (pytest.approx(images.value, rel=1e-9), 80)
    assert stats.floor == {"plug_in": pytest.approx(images.floor["plug_in"]), "split": None}
    assert stats.low is not None
    with pytest.raises(ValueError, match="'kid' needs the reference's images"):
        evaluate(SAME, path, metrics=["kid"], extractor="pixels/4")
    assert "images" in evaluate(SAME, path, metrics="all", extractor="pixels/4", ci_samples=0).skipped["kid"]
    with pytest.raises(ValueError, match="'pixels/8' and 'pixels/4'"):
        evaluate(SAME, path, metrics=["fd"], extractor="pixels/8")


def test_one_image_leaves_the_statistics_of_images_and_says_why_the_rest_is_gone():
    result = evaluate(SAME[:1], REFERENCE, metrics="all", extractor="pixels/4")
    assert set(result.scores) == {"saturation", "contrast", "colourfulness", "clipping"}
    assert result.skipped["fd"] == "needs at least 2 images; generated has 1"
    assert "skipped: fd: needs at least 2 images" in result.table()
    with pytest.raises(ValueError, match="'fd' needs at least 2 images; reference has 1"):
        evaluate(SAME, REFERENCE[:1], metrics=["fd"], extractor="pixels/4")
    with pytest.raises(ValueError, match="'recall' needs at least 6 images with k=5; generated has 5"):
        evaluate(SAME[:5], REFERENCE, metrics=["recall"], extractor="pixels/4")


def test_the_report_names_copies_the_same_set_twice_and_other_formats(tmp_path):
    png, jpg = save(SAME[:20], tmp_path / "png"), save(SAME[:20], tmp_path / "jpg", "jpg")
    same = evaluate(png, png, metrics=["prdc"], extractor="pixels/4", ci_samples=0)
    assert (same.value("precision"), same.value("recall")) == (1, 1)
    assert same.notes == ["generated and reference are the same images"]
    with pytest.warns(UserWarning, match="container formats differ: generated PNG, reference JPEG"):
        evaluate(png, jpg, metrics=["kid"], extractor="pixels/4", ci_samples=0)
    doubled = torch.cat([SAME[:20], SAME[:3]])
    found = evaluate(doubled, train=SAME[2:60], metrics=["authpct"], extractor="pixels/4", ci_samples=0).notes
    assert "3 of 23 generated images equal an earlier one" in found
    assert "18 different generated images are identical to images of train" in found


def test_an_unreadable_file_is_named_or_counted(tmp_path):
    folder = save(SAME[:9], tmp_path / "a")
    (folder / "3.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"3\.png"):
        evaluate(folder, metrics=["saturation"])
    prompts = [f"prompt {i}" for i in range(9)]
    seen = []
    with pytest.warns(UserWarning, match="1 of 9 images were skipped"):
        result = evaluate(
            folder, prompts=prompts, metrics=[], verifier=lambda i, p: seen.extend(p) or [1] * 8, on_bad_image="skip"
        )
    assert seen == [p for p in prompts if p != "prompt 3"]
    assert list(result.sources["generated"]["skipped"]) == ["3.png"]
    assert result.scores["verifier"].n == 8


def test_scorers_stand_beside_metrics_and_nan_means_that_a_question_did_not_arise():
    def scorer(images, prompts):
        return {"right": torch.tensor([1.0, float("nan")] * 40), "other": torch.full((80,), float("nan"))}

    result = evaluate(SAME, metrics=[], scorers=[scorer, "contrast"])
    assert (result.value("scorer/right"), result.scores["scorer/right"].n) == (1, 40)
    assert result.skipped == {"scorer/other": "applies to no image"}
    assert result.value("contrast") == pytest.approx(float(functional.contrast(SAME).mean()))
    with pytest.raises(ValueError, match="must return \\[80\\] values"):
        evaluate(SAME, metrics=[], scorers=[lambda images, prompts: torch.ones(3)])
    with pytest.raises(ValueError, match="did you mean 'contrast'"):
        evaluate(SAME, metrics=[], scorers=["contrst"])


def test_one_pass_serves_mixed_sizes_iterators_and_n():
    mixed = [*SAME[:5], *discs(5, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)]
    result = evaluate(iter(mixed), metrics=["vendi", "contrast"], extractor="pixels/4", ci_samples=0, n=8)
    assert (result.scores["vendi"].n, result.scores["contrast"].n) == (8, 8)
    assert result.sources["generated"]["sizes"] == {"32x32": 5, "64x64": 3}
    means = [float(functional.contrast(image[None])) for image in mixed[:8]]
    assert result.value("contrast") == pytest.approx(sum(means) / 8)
    assert result.sets["generated"].picture(7).shape == (3, 64, 64)


def test_features_from_the_cache_give_the_same_report(tmp_path):
    folder = save(SAME[:20], tmp_path / "a")
    runs = [
        evaluate(folder, metrics=["vendi", "contrast"], extractor="pixels/4", cache=tmp_path / "c", ci_samples=3)
        for _ in range(2)
    ]
    assert runs[0].scores == runs[1].scores
    assert runs[1].sources["generated"]["cached"] == 20


def test_repeated_prompts_are_resampled_as_a_whole():
    x, prompts = get_extractor("pixels/4")(SAME), [f"prompt {i // 4}" for i in range(80)]
    score = evaluate(SAME, prompts=prompts, metrics=["vendi"], extractor="pixels/4").scores["vendi"]
    sd = functional.bootstrap_sd(functional.vendi, x, samples=50, seed=0, clusters=prompts)
    assert score.high - score.value == pytest.approx(1.96 * sd)


def test_half_sampling_gives_the_standard_error_of_a_mean():
    from diffgen.eval.run import half_samples

    X, found = torch.randn(400, 1, generator=torch.Generator().manual_seed(0)), []
    scale = half_samples(lambda x: found.append(float(x.mean())), X, None, 400, 0, None, 2)
    assert scale * float(torch.tensor(found).std()) == pytest.approx(float(X.std()) / 20, rel=0.15)


def test_the_page_holds_all_and_needs_no_other_file(tmp_path):
    result = evaluate(
        SAME, REFERENCE, train=SAME[:40], metrics=["fd", "authpct"], scorers=["saturation"], extractor="pixels/4",
        ci_samples=3, out=tmp_path / "out",
    )  # fmt: skip
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["report.html", "report.json", "report.md"]
    page = (tmp_path / "out" / "report.html").read_text()
    for heading in ("Metrics", "Samples", "Best and worst", "Nearest training images", "Features", "Sources"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("data:image/png;base64,") >= 8
    assert not any(mark in page for mark in ("http://", "https://", "<script src", "<link"))
    for cell in result.rows()[1]:
        assert cell in page
    assert "| fd | ↓ |" in (tmp_path / "out" / "report.md").read_text()
