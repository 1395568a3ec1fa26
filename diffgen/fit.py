"""`diffgen fit`: what a guidance rule has to learn from a pipeline before it can be used."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from diffgen.files import check_writable

app = typer.Typer(no_args_is_help=True, help=__doc__.split(": ")[1])

Model = Annotated[str, typer.Option("--model", "-m", help="World, folder or hub id.")]
Rule = Annotated[str, typer.Option("--guidance", "-g", help="The rule inside: cfg, apg, ...")]
Options = Annotated[list[str] | None, typer.Option("--set", help="Its options: --set scale=4. Repeatable.")]
Prompts = Annotated[
    Path | None, typer.Option("--prompts", help="Text file, a prompt a line; default: the world's own.")
]
Number = Annotated[int, typer.Option("-n", min=1, help="Prompts used, from the start of the file.")]
Steps = Annotated[int | None, typer.Option(min=2, help="Denoising steps; default: the pipeline's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("linear-ag")
def linear_ag(
    model: Model = "shapes",
    guidance: Rule = "cfg",
    option: Options = None,
    prompts: Prompts = None,
    n: Number = 200,
    steps: Steps = None,
    history: Annotated[int, typer.Option(min=1, help="Past steps that the estimate may use.")] = 3,
    intercept: Annotated[bool, typer.Option(help="Fit a constant, too.")] = False,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File; default: <model>/linear_ag/ of a folder.")
    ] = None,
    as_json: AsJson = False,
):
    """LinearAG's coefficients, by least squares on guided trajectories; says how well each step's estimate fits."""
    from diffgen.loading import load
    from diffgen.pipelines import linear, specs

    rule = specs.rule(guidance, specs.assignments(option or []))
    texts = _prompts(model, prompts, n, seed)
    if out is None:
        name = re.sub(r"[^\w.+=-]+", "_", linear.brief(rule)).strip("_") + (f"-steps{steps}" if steps else "")
        out = (Path(model) if Path(model).is_dir() else Path()) / "linear_ag" / f"{name}.json"
    check_writable(out, "--out")
    pipe = load(model, device=device, dtype=dtype)
    call: dict[str, Any] = {"num_inference_steps": steps} if steps else {}
    found = linear.fit(pipe, rule, texts, history=history, intercept=intercept, batch_size=batch, seed=seed, **call)
    count = len(found.made_for["timesteps"])
    found.save(out)
    if as_json:
        typer.echo(json.dumps({"file": str(out), "prompts": len(texts), "r2": found.r2}, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("step", "R² of the estimate", "of u = c", "of u = the last u")
    for t in range(1, count):
        table.add_row(str(t), *(f"{r2[t]:.5f}" for r2 in (found.r2, found.r2_cond, found.r2_last)))
    Console().print(table)
    chosen = " ".join(option or [])
    typer.echo(f"{len(texts)} prompts, {count} steps; saved {out}")
    typer.echo(f"--guidance linear_ag+{guidance} --set coefficients={out} {chosen}".rstrip() + f" --steps {count}")


@app.command("ag")
def ag(
    model: Model = "shapes",
    guidance: Rule = "cfg",
    option: Options = None,
    prompts: Prompts = None,
    n: Number = 64,
    steps: Steps = None,
    saving: Annotated[float, typer.Option(help="Share of CFG's evaluations to leave out, below 0.5.")] = 0.25,
    space: Annotated[str, typer.Option(help="native (the paper's), x0, epsilon.")] = "native",
    warmup: Annotated[int, typer.Option(min=0)] = 0,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    as_json: AsJson = False,
):
    """AG's threshold for a wanted saving, from cosines recorded on guided trajectories."""
    from diffgen.loading import load
    from diffgen.pipelines import AdaptiveGuidance, specs

    rule = AdaptiveGuidance(specs.rule(guidance, specs.assignments(option or [])), space=space, warmup=warmup)
    texts = _prompts(model, prompts, n, seed)
    pipe = load(model, device=device, dtype=dtype)
    call = {"num_inference_steps": steps} if steps else {}
    found = rule.calibrated(pipe, texts, saving=saving, batch_size=batch, seed=seed, **call)
    if as_json:
        typer.echo(json.dumps({"threshold": found.threshold, "space": space, "warmup": warmup, "prompts": len(texts)}))
    else:
        shown = math.floor(found.threshold * 1e6) / 1e6  # not up: that would save less
        typer.echo(f"{len(texts)} prompts: at threshold {shown} AG leaves out {saving:.0%} or a little more")
        given = " ".join(option or [])
        set_ = f"--set threshold={shown} space={space} warmup={warmup} {given}".rstrip()
        typer.echo(f"--guidance ag+{guidance} {set_}" + (f" --steps {steps}" if steps else ""))


def _prompts(model: str, file: Path | None, n: int, seed: int) -> list[str]:
    """The prompts of the file, or of the world."""
    from diffgen.worlds import WORLDS

    if file is not None:
        if not file.is_file():
            raise FileNotFoundError(f"--prompts {str(file)!r}: no such file")
        try:
            texts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise ValueError(f"--prompts {str(file)!r} is no UTF-8 text file") from None
        if not texts:
            raise ValueError(f"--prompts {str(file)!r} has no line with a prompt")
        return texts[:n]
    if model not in WORLDS:
        raise ValueError(
            f"--prompts FILE is needed: {model!r} is no world with prompts of its own ({', '.join(WORLDS)})"
        )
    return WORLDS[model].load().prompts(n, seed=seed)
