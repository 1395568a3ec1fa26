"""Claims: experiments that show a method's effect, over seeds. `diffgen claims NAME` writes benchmarks/results/NAME.json.

A claim measures some pairs (baseline, result) at each seed; each of its checks says what must be true of one pair.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffgen.files import write_text
from diffgen.names import nearest

RESULTS = Path("benchmarks/results")
MODULES = ("diffgen.claims.evaluation", "diffgen.claims.guidance", "diffgen.claims.training")


@dataclass(frozen=True)
class Check:
    """What a pair must show. result - baseline >= margin at every seed (with better="lower": baseline - result).

    margin None: "not worse", the 95% interval of the difference over seeds reaches 0 or lies on the better side, and the
    mean difference is no worse than slack: a wide interval alone proves nothing.
    report: nothing is demanded; the verdict says on which side of 0 the interval lies. measured: the quantity and its unit.
    """

    text: str
    measured: str
    margin: float | None = None
    better: str = "higher"
    report: bool = False
    slack: float = 0.02

    def verdict(self, pairs: list[tuple[float, float]]) -> dict[str, Any]:
        sign = 1 if self.better == "higher" else -1
        differences = [result - baseline for baseline, result in pairs]
        mean, interval = statistics.mean(differences), t_interval(differences)
        if self.report:
            low, high = sorted(sign * x for x in (interval or (0.0, 0.0)))
            verdict = "better" if low > 0 else "worse" if high < 0 else "no difference seen"
        elif self.margin is None:
            best = max(sign * x for x in (interval or differences))
            verdict = "fails" if best < 0 else "holds" if sign * mean >= -self.slack else "null"
        else:
            reached = [sign * d >= self.margin for d in differences]
            verdict = "holds" if all(reached) else "null" if any(reached) else "fails"
        return {
            "check": self.text,
            "measure": self.measured,
            "seeds": [{"baseline": round(b, 4), "result": round(r, 4)} for b, r in pairs],
            "difference": round(mean, 4),
            "interval": None if interval is None else [round(x, 4) for x in interval],
            "margin": self.margin,
            "better": self.better,
            "verdict": verdict,
        }


@dataclass(frozen=True)
class Claim:
    """measure(seed) -> {check: (baseline, result)}, and under "details" anything else worth keeping (curves, settings).

    A claim whose checks only report says what a method does, whatever that is.
    """

    text: str
    budget: str
    measure: Callable[[int], dict[str, Any]]
    checks: dict[str, Check] = field(default_factory=dict)


def t_interval(values: list[float]) -> list[float] | None:
    """95% interval of the mean by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.mean(values)
    return [mean - half, mean + half]


def claims() -> dict[str, Claim]:
    return {name: claim for module in MODULES for name, claim in importlib.import_module(module).CLAIMS.items()}


def run(name: str, seeds: list[int]) -> dict:
    """Runs the claim and writes its result, together with seeds measured before by the same versions.

    verdict: holds (every check does), fails (one does), else null; "reported" where nothing is demanded.
    """
    known = claims()
    if name not in known:
        raise ValueError(f"claim {name!r} is unknown: {nearest(name, known)}")
    claim, path = known[name], RESULTS / f"{name}.json"
    versions = {package: version(package) for package in ("diffgen", "torch", "diffusers", "transformers", "peft")}
    # seeds measured before are kept if the experiment is still the same: by versions, and by its module's text
    source = Path(inspect.getsourcefile(claim.measure) or __file__).read_bytes()
    versions["experiment"] = hashlib.sha256(source).hexdigest()[:12]
    rows = []
    for seed in seeds:
        started = time.time()
        measured = claim.measure(seed)
        details = measured.pop("details", {})
        pairs = {check: [round(float(x), 6) for x in measured[check]] for check in claim.checks}
        rows.append({"seed": seed, "pairs": pairs, "minutes": round((time.time() - started) / 60, 1)} | details)
        print(json.dumps({"seed": seed, **pairs, "minutes": rows[-1]["minutes"]}), file=sys.stderr)
    before = (
        json.loads(path.read_text()) if path.is_file() else {}
    )  # now: another process may have measured other seeds
    if before.get("versions") == versions:
        rows += [row for row in before["seeds"] if row["seed"] not in seeds]
    rows.sort(key=lambda row: row["seed"])
    checks = {n: c.verdict([tuple(row["pairs"][n]) for row in rows]) for n, c in claim.checks.items()}
    verdicts = {check["verdict"] for check in checks.values()}
    verdict = next((v for v in ("fails", "null", "holds") if v in verdicts), "reported")
    report = {
        "claim": claim.text,
        "command": f"diffgen claims {name} --seeds {','.join(str(r['seed']) for r in rows)}",
        "budget": claim.budget,
        "verdict": verdict,
        "checks": checks,
        "seeds": rows,
        "versions": versions,
    }
    write_text(path, json.dumps(report, indent=1) + "\n")
    return report


def results() -> list[dict]:
    """The committed results."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def results_table() -> str:
    """Markdown table of all claims, a line a check: the committed result, or that there is none yet."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    lines = ["| claim | verdict | difference [95%] | seeds (before → after) | command |", "|---|---|---|---|---|"]
    for name, claim in claims().items():
        report = found.get(name)
        if report is None:
            lines.append(f"| {claim.text} | not run | | | `diffgen claims {name}` |")
            continue
        lines.append(f"| **{report['claim']}** | **{report['verdict']}** | | | `{report['command']}` |")
        for check in report["checks"].values():
            seeds = ", ".join(f"{s['baseline']:.3f} → {s['result']:.3f}" for s in check["seeds"])
            low_high = check["interval"]
            interval = "" if low_high is None else f" [{low_high[0]:+.3f}, {low_high[1]:+.3f}]"
            change = f"{check['difference']:+.3f}{interval}"
            lines.append(f"| {check['check']} ({check['measure']}) | {check['verdict']} | {change} | {seeds} | |")
    return "\n".join(lines)
