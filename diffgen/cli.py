"""The command line. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from diffgen import fit
from diffgen.eval import cli as eval_cli

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__.split("\n")[0]
)

app.add_typer(fit.app, name="fit")
app.add_typer(eval_cli.app, name="eval")

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
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts.")] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="World, folder or hub id.")] = "shapes",
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; repeatable.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the unconditional branch is given.")] = None,
    guidance: Annotated[
        str,
        typer.Option("--guidance", "-g", help="Rule, or wrappers around one: apg, rescale+cfg (see: diffgen methods)."),
    ] = "cfg",
    option: Annotated[
        list[str] | None, typer.Option("--set", "--option", help="Rule's options: --set scale=10 eta=0")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    seed: int = 0,
    out: Annotated[Path, typer.Option("--out", "-o")] = Path("samples"),
):
    """Sample images with a guidance rule: one PNG a prompt, and a grid of all beside their folder."""
    import inspect

    import torch

    from diffgen.eval.images import load_images
    from diffgen.files import check_writable
    from diffgen.grid import save_grid
    from diffgen.loading import load
    from diffgen.pipelines import guide, specs

    words, pairs = _prompts_and_options(prompts or [], bool(prompt), option or [], specs.option_names(guidance))
    texts = [*(prompt or []), *words]
    if not texts:
        raise ValueError('no prompt given: diffgen sample "a red circle", or --prompt "a red circle"')
    rule = specs.rule(guidance, specs.assignments(pairs))
    sheet = out.with_name(f"{out.name}-grid.png")  # not among the images, which `diffgen eval` reads as a set
    check_writable(out / "000.png", "--out")
    pipe = load(model)
    extra: dict = {"num_inference_steps": steps} if steps else {}
    if negative_prompt is not None:
        if "negative_prompt" not in inspect.signature(pipe.__call__).parameters:
            raise ValueError(f"{type(pipe).__name__} takes no negative prompt")
        extra["negative_prompt"] = negative_prompt
    with guide(pipe, rule) as run:
        images = pipe(texts, generator=torch.Generator().manual_seed(seed), **extra).images
    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(out / f"{i:03d}.png")
    save_grid(load_images(images), sheet)
    count = f"{len(images)} image{'s' * (len(images) > 1)}"
    typer.echo(f"{count} in {out}, {sheet.name} beside it; NFE {run.nfe:g} (denoiser evaluations a sample)")


@app.command()
def compare(
    model: Annotated[str, typer.Option("--model", "-m", help="World, folder or hub id.")] = "shapes",
    rules: Annotated[
        str, typer.Option("--rules", "-r", help="Comma-separated: cfg,apg:eta=0.5:momentum=0,rescale+cfg")
    ] = "cfg,apg",
    scales: Annotated[str, typer.Option("--scales", "-s", help="Comma-separated guidance scales.")] = "2,4,8,16",
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "--prompts", "-p", help="Repeatable; default: 64 prompts of the world shapes."),
    ] = None,
    images_per_prompt: Annotated[int, typer.Option("--images-per-prompt", "-n")] = 1,
    negative_prompt: Annotated[str | None, typer.Option(help="What the unconditional branch is given.")] = None,
    steps: int | None = None,
    seed: int = 0,
    clip: Annotated[Path | None, typer.Option(help="Folder of a CLIP model, for CLIP scores.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images in one call; default 64 for a world, else 4.")] = None,
    device: str | None = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16; default float32.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder, or an .html file.")] = Path("comparison"),
    quiet: bool = False,
    as_json: AsJson = False,
):
    """Guidance rules at several scales from the same seeds: one HTML page with pictures, measures and Pareto plots."""
    from diffgen.compare import compare as run
    from diffgen.compare import plan

    todo = plan(
        model, rules, scales, prompt, images_per_prompt, steps, seed, out, clip, negative_prompt, batch
    )  # fmt: skip
    numbers = run(todo, device=device, dtype=dtype, quiet=quiet)
    if as_json:
        typer.echo(json.dumps(numbers, indent=1))
        return
    for cell in numbers["cells"]:
        if cell["error"]:
            typer.echo(f"{cell['rule']} at {cell['scale']:g} failed: {cell['error']}", err=True)
    typer.echo(numbers["finding"])
    typer.echo(f"page: {todo.page.resolve()}")


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


def _prompts_and_options(
    words: list[str], prompted: bool, pairs: list[str], known: list[str]
) -> tuple[list[str], list[str]]:
    """(prompts, KEY=VALUE pairs): after `--set scale=10 eta=0` the word eta=0 is an option, not a prompt.

    A word KEY=VALUE is an option if --set is there and KEY is one of the rule's options (or the prompts came by --prompt,
    so that no word is meant as one).
    """

    def is_option(word: str) -> bool:
        key, equals, _ = word.partition("=")
        return bool(pairs and equals) and (key in known or (prompted and key.isidentifier()))

    return [w for w in words if not is_option(w)], [*pairs, *(w for w in words if is_option(w))]


def main() -> None:
    """Bad input ends with one message and exit code 2, missing weights with 3: no traceback."""
    try:
        app()
    except ModuleNotFoundError as error:
        if os.environ.get("DIFFGEN_TRACEBACK") or type(error).__name__ != "MissingWeights":
            raise
        typer.echo(f"diffgen: {error}", err=True)
        raise SystemExit(3) from None
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        if os.environ.get("DIFFGEN_TRACEBACK"):
            raise
        typer.echo(f"diffgen: {error}", err=True)
        raise SystemExit(2) from None
