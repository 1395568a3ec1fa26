"""The command line. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__.split("\n")[0]
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the report.")] = Path("demo-report"),
    n: Annotated[int, typer.Option(min=8, help="Samples in each measurement.")] = 240,
    override: Annotated[list[str] | None, typer.Argument(help="Config overrides: train.steps=50")] = None,
):
    """Sample, fine-tune and judge the embedded world "shapes"; writes one HTML report."""
    from diffgen.demo import run

    run(out, override, n)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped recipe.")],
    override: Annotated[
        list[str] | None, typer.Argument(help="Overrides: train.steps=50 rollout.group_size=16")
    ] = None,
    plugin: Annotated[list[str] | None, typer.Option(help="Python file that registers methods.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Allow classes outside diffusers, transformers, diffgen.")
    ] = False,
    quiet: bool = False,
):
    """Run a training from a config; run it again to resume."""
    from diffgen.training.config import load_config

    extra = [f"plugins={json.dumps(plugin)}"] if plugin else []
    extra += ["trust_remote_code=true"] if trust_remote_code else []
    checked = load_config(config, [*(override or []), *extra])
    from diffgen.training.trainer import Trainer

    trainer = Trainer(checked, quiet=quiet)
    trainer.fit()
    typer.echo(f"trained weights: {trainer.folder / 'final'}")


@app.command()
def sample(
    prompts: Annotated[list[str], typer.Argument(help="Prompts.")],
    model: Annotated[str, typer.Option("--model", "-m", help="World, folder or hub id.")] = "shapes",
    guidance: Annotated[str, typer.Option("--guidance", "-g", help="Rule: cfg, apg (see: diffgen methods).")] = "cfg",
    option: Annotated[list[str] | None, typer.Option(help="Rule's option: scale=10")] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    seed: int = 0,
    out: Annotated[Path, typer.Option("--out", "-o")] = Path("samples"),
):
    """Sample images with a guidance rule; one PNG a prompt."""
    import torch

    from diffgen import registry
    from diffgen.loading import load
    from diffgen.pipelines import guide

    rule = registry.build("guidance", guidance, _options(option))
    pipe = load(model)
    extra = {"num_inference_steps": steps} if steps else {}
    with guide(pipe, rule) as run:
        images = pipe(prompts, generator=torch.Generator().manual_seed(seed), **extra).images
    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(out / f"{i:03d}.png")
    typer.echo(f"{len(images)} images in {out}, {run.nfe:g} denoiser evaluations a sample")


@app.command("eval")
def evaluate_command(
    generated: Annotated[str, typer.Argument(help="Folder of images.")],
    reference: Annotated[str | None, typer.Option("--reference", "-r", help="Folder of reference images.")] = None,
    metrics: Annotated[
        str | None, typer.Option("--metrics", "-m", help="Comma-separated; default: fd (with -r), pairwise, vendi.")
    ] = None,
    as_json: AsJson = False,
):
    """Metrics of a set of images, with 95% intervals."""
    from diffgen.eval import evaluate

    names = metrics or ("fd,pairwise,vendi" if reference else "pairwise,vendi")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they stand under the table
        result = evaluate(generated, reference, metrics=[m.strip() for m in names.split(",")])
    typer.echo(result.to_json() if as_json else result.table())


@app.command()
def methods(stage: Annotated[str | None, typer.Argument(help="Only this stage.")] = None, as_json: AsJson = False):
    """Every registered method: stage, name, paper, what it does, options."""
    from diffgen import registry
    from diffgen.names import nearest

    if stage is not None and stage not in registry.STAGES:
        raise ValueError(f"stage {stage!r} is unknown: {nearest(stage, registry.STAGES)}")
    rows: list[dict] = [
        {"stage": m.stage, "name": m.name, "paper": m.paper, "summary": m.summary, "options": m.options}
        for m in registry.methods(stage)
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1, default=str))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("stage", "name", "paper", "what it does", "options and defaults")
    for row in rows:
        options = ", ".join(f"{k}={v}" for k, v in row["options"].items())
        table.add_row(*(escape(cell) for cell in (row["stage"], row["name"], row["paper"], row["summary"], options)))
    console = Console()
    Console(width=max(console.width, 150)).print(table)


@app.command()
def claims(
    name: Annotated[str | None, typer.Argument(help="The claim to test; none lists them.")] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0,1,2",
    table: Annotated[bool, typer.Option("--table", help="Print the committed results.")] = False,
    as_json: AsJson = False,
):
    """Run the experiment that shows a method's effect; writes benchmarks/results/NAME.json."""
    from diffgen import claims as module

    if name is None or table:
        typer.echo(json.dumps(module.results(), indent=1) if as_json else module.results_table())
        return
    result = module.run(name, [int(s) for s in seeds.split(",")])
    typer.echo(json.dumps(result, indent=1))


@app.command()
def doctor(as_json: AsJson = False):
    """What is installed, what works, what doesn't and why."""
    from diffgen.doctor import diagnose

    rows = diagnose()
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        for row in rows:
            typer.echo(f"{'ok  ' if row['ok'] else 'BAD '} {row['what']}: {row['finding']}")
    if not all(row["ok"] for row in rows):
        raise typer.Exit(1)


def _options(pairs: list[str] | None) -> dict:
    import yaml

    options = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"option {pair!r}: expected KEY=VALUE, for example scale=10")
        options[key] = yaml.safe_load(value)
    return options


def main() -> None:
    """Bad input ends with one message and exit code 2, not with a traceback."""
    try:
        app()
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        if os.environ.get("DIFFGEN_TRACEBACK"):
            raise
        typer.echo(f"diffgen: {error}", err=True)
        raise SystemExit(2) from None
