import json
from pathlib import Path

import pytest

from diffgen import claims
from diffgen.claims import Check, Claim, t_interval

ROOT = Path(__file__).parents[1]


def test_the_interval_is_students():
    assert t_interval([0.5]) is None
    low, high = t_interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2.0)
    assert high - 2.0 == pytest.approx(4.302652729749464 / 3**0.5)  # t(0.975, 2) s / sqrt(n), s = 1


@pytest.mark.parametrize(
    ("check", "pairs", "verdict"),
    [
        (Check("", "", 0.1), [(0.0, 0.2), (0.1, 0.25)], "holds"),
        (Check("", "", 0.1), [(0.0, 0.2), (0.1, 0.15)], "null"),
        (Check("", "", 0.1), [(0.0, 0.05), (0.1, 0.15)], "fails"),
        (Check("", "", 0.1, "lower"), [(0.5, 0.2), (0.4, 0.25)], "holds"),
        (Check("", "", 0.1, "lower"), [(0.2, 0.5), (0.25, 0.4)], "fails"),
        (Check("", ""), [(0.6, 0.61), (0.6, 0.58), (0.6, 0.6)], "holds"),  # mean -0.3 points, interval reaches 0
        (
            Check("", ""),
            [(0.60, 0.55), (0.60, 0.45), (0.60, 0.58)],
            "null",
        ),  # so does this one, but the mean is -7 points
        (Check("", ""), [(0.6, 0.50), (0.6, 0.51), (0.6, 0.49)], "fails"),
        (Check("", "", report=True), [(0.6, 0.50), (0.6, 0.51), (0.6, 0.49)], "worse"),
        (Check("", "", report=True, better="lower"), [(0.6, 0.50), (0.6, 0.51), (0.6, 0.49)], "better"),
        (Check("", "", report=True), [(0.6, 0.7), (0.6, 0.5), (0.6, 0.6)], "no difference seen"),
    ],
)
def test_a_check_says_what_the_pairs_show(check, pairs, verdict):
    assert check.verdict(pairs)["verdict"] == verdict


def test_a_run_keeps_earlier_seeds_of_the_same_experiment_only(tmp_path, monkeypatch):
    measured = {0: (0.0, 1.0), 1: (0.0, 0.5)}
    claim = Claim("a", "b", lambda seed: {"x": measured[seed], "details": {"note": seed}}, {"x": Check("c", "d", 0.6)})
    monkeypatch.setattr(claims, "claims", lambda: {"toy": claim})
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    assert claims.run("toy", [0])["verdict"] == "holds"
    both = claims.run("toy", [1])
    assert [(row["seed"], row["note"]) for row in both["seeds"]] == [(0, 0), (1, 1)]
    assert both["verdict"] == "null"
    assert both["command"] == "diffgen claims toy --seeds 0,1"
    path = tmp_path / "toy.json"
    other = json.loads(path.read_text())
    other["versions"]["experiment"] = "another"
    path.write_text(json.dumps(other))
    assert [row["seed"] for row in claims.run("toy", [1])["seeds"]] == [1]
    with pytest.raises(ValueError, match="did you mean 'toy'"):
        claims.run("toi", [0])


def test_every_committed_result_belongs_to_a_claim_and_the_docs_show_the_table(monkeypatch):
    monkeypatch.chdir(ROOT)
    known = claims.claims()
    found = {path.stem: json.loads(path.read_text()) for path in claims.RESULTS.glob("*.json")}
    assert found
    assert set(found) <= set(known)
    for name, report in found.items():
        assert set(report["checks"]) == set(known[name].checks), name
        for key, check in known[name].checks.items():  # the verdict is the one of the committed pairs
            pairs = [tuple(row["pairs"][key]) for row in report["seeds"]]
            assert report["checks"][key]["verdict"] == check.verdict(pairs)["verdict"], (name, key)
    assert claims.results_table() in (ROOT / "docs" / "claims.md").read_text()
