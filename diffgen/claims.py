"""Claims: experiments that show a method's effect, over seeds. `diffgen claims NAME` writes benchmarks/results/NAME.json."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from diffgen.names import nearest

RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class Claim:
    """measure(seed) -> (baseline, result), both in the unit of `measured`; it holds where result - baseline >= margin."""

    text: str
    measured: str
    budget: str
    margin: float
    measure: Callable[[int], tuple[float, float]]


def _flow_grpo(seed: int) -> tuple[float, float]:
    """Held-out verifier accuracy (480 samples, no guidance, no noise) before and after the default recipe."""
    import tempfile

    from diffgen.training import Trainer, load_config
    from diffgen.worlds import shapes

    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"output_dir={folder}", f"seed={seed}", "checkpoint.every=0", "logging.tracker=none"]
        trainer = Trainer(load_config("shapes_flow_grpo", overrides))
        prompts = shapes.prompts(480, seed=999, split="held_out")
        before = shapes.verify(trainer.draw(prompts, seed=seed), prompts).mean()
        trainer.fit()
        after = shapes.verify(trainer.draw(prompts, seed=seed), prompts).mean()
    return float(before), float(after)


CLAIMS: dict[str, Claim] = {
    "flow_grpo_shapes": Claim(
        text="Flow-GRPO raises verifier accuracy by 25 points on prompts whose colour-shape pairs were never trained on",
        measured="share of 480 held-out samples that pass the verifier",
        budget="configs/shapes_flow_grpo.yaml, at most 20 minutes a seed on one core",
        margin=0.25,
        measure=_flow_grpo,
    ),
}


def run(name: str, seeds: list[int]) -> dict:
    """Runs the claim and writes its result, together with seeds measured before by the same versions.

    verdict: holds (every seed reaches the margin), fails (no seed does), else null.
    """
    if name not in CLAIMS:
        raise ValueError(f"claim {name!r} is unknown: {nearest(name, CLAIMS)}")
    claim, rows, path = CLAIMS[name], [], RESULTS / f"{name}.json"
    versions = {package: version(package) for package in ("diffgen", "torch", "diffusers", "transformers", "peft")}
    for seed in seeds:
        started = time.time()
        baseline, result = claim.measure(seed)
        row = {"seed": seed, "baseline": round(baseline, 4), "result": round(result, 4)}
        rows.append(row | {"minutes": round((time.time() - started) / 60, 1)})
        print(json.dumps(rows[-1]), file=sys.stderr)
    before = json.loads(path.read_text()) if path.is_file() else {}
    if before.get("versions") == versions:
        rows = sorted([r for r in before["seeds"] if r["seed"] not in seeds] + rows, key=lambda r: r["seed"])
    differences = [row["result"] - row["baseline"] for row in rows]
    reached = [d >= claim.margin for d in differences]
    mean = statistics.mean(differences)
    half = None
    if len(differences) > 1:  # Student's t: seeds are few
        from scipy.stats import t

        half = float(t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / len(differences) ** 0.5
    report = {
        "claim": claim.text,
        "command": f"diffgen claims {name} --seeds {','.join(str(r['seed']) for r in rows)}",
        "measure": claim.measured,
        "budget": claim.budget,
        "seeds": rows,
        "difference": round(mean, 4),
        "interval": None if half is None else [round(mean - half, 4), round(mean + half, 4)],
        "margin": claim.margin,
        "verdict": "holds" if all(reached) else "null" if any(reached) else "fails",
        "versions": versions,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return report


def results() -> list[dict]:
    """The committed results."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def results_table() -> str:
    """Markdown table of all claims: the committed result, or that there is none yet."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    lines = ["| claim | verdict | difference [95%] | seeds (before → after) | command |", "|---|---|---|---|---|"]
    for name, claim in CLAIMS.items():
        row = found.get(name)
        if row is None:
            lines.append(f"| {claim.text} | not run | | | `diffgen claims {name}` |")
            continue
        seeds = ", ".join(f"{s['baseline']:.3f} → {s['result']:.3f}" for s in row["seeds"])
        interval = "" if row["interval"] is None else f" [{row['interval'][0]:+.3f}, {row['interval'][1]:+.3f}]"
        lines.append(
            f"| {row['claim']} | {row['verdict']} | {row['difference']:+.3f}{interval} | {seeds} | `{row['command']}` |"
        )
    return "\n".join(lines)
