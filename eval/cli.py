"""`diffgen eval`: measure images, keep statistics, compare two sets, look after the cache."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help=__doc__.split(": ")[1])
cache_app = typer.Typer(no_args_is_help=True, help="Features that earlier runs kept.")
app.add_typer(cache_app, name="cache")

Reference = Annotated[str | None, typer.Argument(help="Reference images, or their statistics (.npz).")]
Metrics = Annotated[
    str | None,
    typer.Option("--metrics", "-m", help="Comma-separated, or all; default: fd (with a reference), pairwise, vendi."),
]
Network = Annotated[str, typer.Option("--extractor", "-e", help="Name or id; auto takes the best that is here.")]
Train = Annotated[str | None, typer.Option("--train", help="Training images: authpct, ct, mifid, nn_ratio.")]
Test = Annotated[str | None, typer.Option("--test", help="Images that were not trained on: ct, and baselines.")]
Prompts = Annotated[Path | None, typer.Option("--prompts", help="Text file, a prompt a line, in the images' order.")]
Scorers = Annotated[list[str] | None, typer.Option("--scorer", "-s", help="NAME or NAME:path=FOLDER. Repeatable.")]
Number = Annotated[int | None, typer.Option("-n", min=1, help="Only the first n images.")]
Neighbours = Annotated[int, typer.Option("-k", min=1, help="Neighbours of precision, recall, density, coverage.")]
Samples = Annotated[int, typer.Option("--ci-samples", help="Resamples for intervals; 0: none.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1)]
Skip = Annotated[bool, typer.Option("--skip-bad", help="Count unreadable images instead of stopping.")]
Store = Annotated[bool, typer.Option("--cache/--no-cache", help="Keep features for the next run.")]
Assume = Annotated[str | None, typer.Option(help="Extractor's id, for statistics of other programs.")]
Device = Annotated[str, typer.Option(help="cpu, cuda ...")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Json = Annotated[str | None, typer.Option("--json", help="File to write; - prints JSON in place of the table.")]
Html = Annotated[Path | None, typer.Option("--html", help="File to write.")]
Markdown = Annotated[Path | None, typer.Option("--md", help="File to write.")]
AsJson = Annotated[bool, typer.Option("--as-json", help="Print JSON.")]


@app.command()
def run(
    generated: Annotated[str, typer.Argument(help="Folder, .zip or .npz of images.")],
    reference: Reference = None,
    metrics: Metrics = None,
    extractor: Network = "efficientnet-lite0",
    train: Train = None,
    test: Test = None,
    prompts: Prompts = None,
    scorer: Scorers = None,
    n: Number = None,
    k: Neighbours = 5,
    ci_samples: Samples = 50,
    seed: int = 0,
    batch_size: Batch = 64,
    skip_bad: Skip = False,
    cache: Store = True,
    assume_extractor: Assume = None,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: AsJson = False,
    json_to: Json = None,
    html: Html = None,
    md: Markdown = None,
):
    """Metrics of a set of images, with 95% intervals and noise floors. Under accelerate launch the images are shared out."""
    from diffgen.eval import evaluate

    options = _options(
        reference, metrics, extractor, train, test, prompts, scorer, n, k, ci_samples, seed, batch_size, skip_bad, cache,
        assume_extractor, device, quiet,
    )  # fmt: skip
    _show(lambda: evaluate(generated, reference, **options), as_json, json_to, html, md)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="Images of one generator.")],
    b: Annotated[str, typer.Argument(help="Those of another, for the same prompts and seeds in the same order.")],
    reference: Reference = None,
    metrics: Metrics = None,
    extractor: Network = "efficientnet-lite0",
    train: Train = None,
    test: Test = None,
    prompts: Prompts = None,
    scorer: Scorers = None,
    n: Number = None,
    k: Neighbours = 5,
    ci_samples: Samples = 50,
    seed: int = 0,
    batch_size: Batch = 64,
    skip_bad: Skip = False,
    cache: Store = True,
    assume_extractor: Assume = None,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: AsJson = False,
    json_to: Json = None,
    html: Html = None,
    md: Markdown = None,
):
    """Paired differences of two sets, A - B, with 95% intervals."""
    from diffgen.eval import compare as paired

    options = _options(
        reference, metrics, extractor, train, test, prompts, scorer, n, k, ci_samples, seed, batch_size, skip_bad, cache,
        assume_extractor, device, quiet,
    )  # fmt: skip
    _show(lambda: paired(a, b, reference, **options), as_json, json_to, html, md)


@app.command()
def stats(
    images: Annotated[str, typer.Argument(help="Folder, .zip or .npz of images.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .npz to write.")],
    extractor: Network = "efficientnet-lite0",
    n: Number = None,
    batch_size: Batch = 64,
    skip_bad: Skip = False,
    cache: Store = True,
    device: Device = "cpu",
    quiet: Quiet = False,
):
    """Mean and covariance of the images' features: a reference for fd that needs no images, readable by pytorch-fid and EDM."""
    from diffgen.eval.extractors import get_extractor
    from diffgen.eval.features import Features, save_stats
    from diffgen.eval.features import stats as moments
    from diffgen.eval.passes import opened, read
    from diffgen.files import check_writable

    if out.suffix != ".npz":
        raise ValueError(f"statistics are written as .npz; got {out}")
    check_writable(out, "--out")
    extract = get_extractor(extractor, device=device)
    source = opened(images, n, 0, "skip" if skip_bad else "error")
    found = read("images", source, extract, cache=cache, batch_size=batch_size, progress=not quiet)
    for text in found.warnings:
        typer.echo(f"warning: {text}", err=True)
    assert found.x is not None
    kept = moments(Features(found.x, extract.id, found.names, found.hashes))
    typer.echo(f"{save_stats(out, kept)}: {kept.n} images, {kept.id}, {len(kept.mu)} features")


@cache_app.command("ls")
def cache_ls(
    folder: Annotated[Path | None, typer.Option(help="Default: $DIFFGEN_CACHE, or ~/.cache/diffgen.")] = None,
    as_json: Annotated[bool, typer.Option("--json", "--as-json", help="Print JSON.")] = False,
):
    """What is kept: key, images, size, extractor, source."""
    from dataclasses import asdict

    from diffgen.eval import cache

    entries = cache.ls(folder)
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in entries], indent=1))
        return
    for e in entries:
        typer.echo(f"{e.key[:12]}  {e.n:7} images  {e.bytes / 1e6:9.1f} MB  {e.extractor}  {e.source}")
    typer.echo(
        f"{len(entries)} sets, {sum(e.bytes for e in entries) / 1e6:.1f} MB in {folder or cache.default_folder()}"
    )


@cache_app.command("rm")
def cache_rm(
    which: Annotated[str | None, typer.Argument(help="Beginning of a key, an extractor's id, or partial.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Delete everything.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Default: $DIFFGEN_CACHE, or ~/.cache/diffgen.")] = None,
):
    """Delete some of it, or --all."""
    from diffgen.eval import cache

    if (which is None) != everything:
        raise ValueError("say what to delete: a key (diffgen eval cache ls), an extractor's id, partial, or --all")
    typer.echo(f"{cache.rm(which, folder)} bytes freed")


def _options(
    reference, metrics, extractor, train, test, prompts, scorers, n, k, ci_samples, seed, batch_size, skip_bad, cache,
    assume_extractor, device, quiet,
) -> dict[str, Any]:  # fmt: skip
    from diffgen.eval.extractors import MissingWeights
    from diffgen.eval.passes import world
    from diffgen.eval.work import scorer_of

    names = metrics or ("fd,pairwise,vendi" if reference else "" if scorers else "pairwise,vendi")
    try:
        ready = [scorer_of(text) for text in scorers or []]
    except MissingWeights:
        raise
    except ModuleNotFoundError as error:
        raise MissingWeights(str(error)) from error
    texts = prompts.read_text(encoding="utf-8").splitlines() if prompts else None
    return {
        "metrics": "all" if names == "all" else [name.strip() for name in names.split(",") if name.strip()],
        "extractor": extractor, "train": train, "test": test, "scorers": ready,
        "prompts": [text for text in texts if text.strip()] if texts is not None else None,
        "n": n, "k": k, "ci_samples": ci_samples, "seed": seed, "batch_size": batch_size, "cache": cache,
        "on_bad_image": "skip" if skip_bad else "error", "assume_extractor": assume_extractor, "device": device,
        "progress": not quiet, "distributed": world()[1] > 1,
    }  # fmt: skip


def _show(measure, as_json: bool, json_to: str | None, html: Path | None, md: Path | None) -> None:
    from diffgen.eval.passes import world
    from diffgen.files import check_writable

    printed = as_json or json_to == "-"
    files = {"--json": None if json_to in (None, "-") else Path(str(json_to)), "--html": html, "--md": md}
    for option, path in files.items():
        if path is not None:
            check_writable(path, option)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they stand under the table
        found = measure()
    if world()[0] != 0:
        return
    for path, write in zip(files.values(), (found.to_json, found.to_html, found.to_markdown)):
        if path is not None:
            write(path)
    typer.echo(found.to_json() if printed else found.table())
