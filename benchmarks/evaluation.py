"""Fréchet distance, Vendi and pairwise diversity against what others do: python -m benchmarks.evaluation.

Every cell runs in a process of its own, on the same features (seeded, float32). Seconds are the metric's CPU time, so a
busy machine doesn't count, without imports and data; memory is the peak above what the process held before, so the
features themselves are not in it. x: ratio to ours.

    diffgen          functional.fd on the features
    diffgen, stream  metrics.FrechetDistance, batches of 100: the features are never held
    torchmetrics     FrechetInceptionDistance with features, the same batches
    torch-fidelity   its statistics and eigenvalues of sigma1 sigma2
    sqrtm            mean, covariance and scipy.linalg.sqrtm, as clean-fid and dgm-eval do
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FD = ("diffgen", "diffgen, stream", "torchmetrics", "torch-fidelity", "sqrtm")
DIVERSITY = ("vendi", "vendi, stream", "vendi, n x n", "pairwise", "pairwise, n x n")
BATCH = 100
WIDTH = 256  # of the features of the diversity table
DENSE_LIMIT = 5000  # rows beyond which an n x n matrix is not tried


def features(n: int, d: int, seed: int) -> Any:
    """n rows of a Gaussian with a decaying spectrum, in coordinates that mix it: float32 [n,d]."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator) * torch.arange(1, d + 1).float().pow(-0.5)
    sign = torch.randint(0, 2, (d,), generator=torch.Generator().manual_seed(1)).float() * 2 - 1
    return (rows + rows.roll(1, 1) * sign) + 0.5


# ------------------------------------------------------------------------------------------- what is measured, by name


def prepare(method: str, X: Any, Y: Any) -> Callable[[], float]:
    """Imports what a method needs and gives the function to time."""
    import torch

    from diffgen.eval import functional

    def batches() -> Iterator[tuple[Any, bool]]:
        for rows, real in ((X, False), (Y, True)):
            for batch in rows.split(BATCH):
                yield batch, real

    def stream(metric: Any) -> float:
        for batch, real in batches():
            metric.update(batch, real=real)
        return float(metric.compute())

    def unit() -> Any:
        rows = X.double()
        return rows / rows.norm(dim=1, keepdim=True)

    if method == "diffgen":
        return lambda: functional.fd(X, Y)
    if method == "diffgen, stream":
        from diffgen.eval.metrics import FrechetDistance

        return lambda: stream(FrechetDistance())
    if method == "torchmetrics":
        from torchmetrics.image.fid import FrechetInceptionDistance

        rows = torch.nn.Identity()
        rows.num_features = X.shape[1]  # type: ignore[assignment]
        return lambda: stream(FrechetInceptionDistance(feature=rows))
    if method == "torch-fidelity":
        from torch_fidelity import metric_fid

        def fidelity() -> float:
            statistics = [metric_fid.fid_features_to_statistics(rows) for rows in (X, Y)]
            return float(next(iter(metric_fid.fid_statistics_to_metric(*statistics, verbose=False).values())))

        return fidelity
    if method == "sqrtm":
        return lambda: _sqrtm(X.numpy(), Y.numpy())
    if method == "vendi":
        return lambda: functional.vendi(X)
    if method == "vendi, stream":
        from diffgen.eval.metrics import Vendi

        return lambda: stream(Vendi())
    if method == "vendi, n x n":
        return lambda: _dense_vendi(unit())
    if method == "pairwise":
        return lambda: functional.mean_pairwise(X)

    def dense_pairwise() -> float:
        distances = 1 - unit() @ unit().T
        return float(distances.fill_diagonal_(0).sum() / (len(X) * (len(X) - 1)))

    return dense_pairwise


def _sqrtm(X: Any, Y: Any) -> float:
    import numpy as np
    from scipy import linalg

    X, Y = X.astype(np.float64), Y.astype(np.float64)
    delta, sigma1, sigma2 = X.mean(0) - Y.mean(0), np.cov(X, rowvar=False), np.cov(Y, rowvar=False)
    root = linalg.sqrtm(sigma1 @ sigma2)
    return float(delta @ delta + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(np.real(root)))


def _dense_vendi(f: Any) -> float:
    import torch

    lam = torch.linalg.eigvalsh(f @ f.T / len(f))
    lam = lam[lam > 1e-12]
    return float(torch.exp(-(lam * lam.log()).sum()))


# ------------------------------------------------------------------------------------------------- a process of its own


def measure(method: str, n: int, d: int) -> dict[str, float]:
    """{seconds, megabytes, value} of one call, in this process."""
    X, Y = features(n, d, 0), features(n if method in FD else 2, d, 100)
    call = prepare(method, X, Y)
    before = _reset_peak()
    started = time.process_time()
    value = call()
    seconds = time.process_time() - started
    return {"seconds": seconds, "megabytes": max(0.0, _status("VmHWM") - before), "value": value}


def _reset_peak() -> float:
    """Resident megabytes now, from which the peak counts (Linux; else the peak counts from the start)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def in_process(method: str, n: int, d: int, limit: float) -> dict[str, Any]:
    """`measure` in a fresh process; {"skipped": why} where it takes longer than limit seconds or fails."""
    command = [sys.executable, "-m", "benchmarks.evaluation", "--one", method, str(n), str(d)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"skipped": f"> {limit:.0f} s"}
    if done.returncode:
        return {"skipped": (done.stderr.strip().splitlines() or ["failed"])[-1][:60]}
    return json.loads(done.stdout.splitlines()[-1])


# -------------------------------------------------------------------------------------------------------------- report


def cost(method: str, n: int, d: int) -> float:
    """A rough number of operations, so that the cheap cells come first and the budget cuts the dear ones."""
    root = {"sqrtm": 60.0, "torch-fidelity": 20.0, "torchmetrics": 20.0}.get(method, 8.0)
    return (
        root * min(n, d) ** (1 if "diffgen" in method else 0) * d ** (2 if "diffgen" in method else 3) + 4.0 * n * d**2
    )


def run(cells: list[tuple[str, int, int]], limit: float, budget: float) -> dict[tuple[str, int, int], dict[str, Any]]:
    from tqdm import tqdm

    started, results = time.perf_counter(), {}
    for cell in tqdm(sorted(cells, key=lambda c: cost(*c)), desc="cells", leave=False):
        left = budget - (time.perf_counter() - started)
        if cell[0].endswith("n x n") and cell[1] > DENSE_LIMIT:
            results[cell] = {"skipped": f"n > {DENSE_LIMIT}"}
        elif left < 10:
            results[cell] = {"skipped": "no time left"}
        else:
            results[cell] = in_process(*cell, limit=min(limit, left))
    return results


def table(title: str, results: dict[tuple[str, int, int], dict[str, Any]], baseline: dict[str, str]) -> Any:
    """Rows of (method, n, d) with ratios to the baseline method of the same n and d."""
    from rich import box
    from rich.table import Table

    rows = Table("d", "n", "method", title=title, box=box.SIMPLE, title_justify="left")
    for column in ("seconds", "x", "MB", "x ", "value"):
        rows.add_column(column, justify="right", no_wrap=True)
    previous = None
    for (method, n, d), cell in results.items():
        head = ("", "") if previous == (n, d) else (str(d), str(n))
        previous = (n, d)
        if "skipped" in cell:
            rows.add_row(*head, method, cell["skipped"], "", "", "", "")
            continue
        base = results.get((baseline[method], n, d), {})
        ratios = [_ratio(cell[key], base.get(key)) for key in ("seconds", "megabytes")]
        value = f"{cell['value']:.7g}"
        rows.add_row(*head, method, f"{cell['seconds']:.3g}", ratios[0], f"{cell['megabytes']:.0f}", ratios[1], value)
    return rows


def _ratio(value: float, base: float | None) -> str:
    return "" if not base or math.isclose(value, base) else f"{value / base:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--counts", type=int, nargs="+", default=[200, 2000, 20000])
    parser.add_argument("--methods", nargs="+", default=list(FD), choices=FD)
    parser.add_argument("--diversity-counts", type=int, nargs="*", default=[1000, 4000, 16000])
    parser.add_argument(
        "--limit", type=float, default=90, help="seconds a cell may take, start of its process included"
    )
    parser.add_argument("--budget", type=float, default=540, help="seconds for all; what is left then is not run")
    parser.add_argument("--out", type=Path, help="write all numbers as JSON")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        print(json.dumps(measure(args.one[0], int(args.one[1]), int(args.one[2]))))
        return

    from rich.console import Console

    fd_cells = [(m, n, d) for d in args.dims for n in args.counts for m in args.methods]
    diversity_cells = [(m, n, WIDTH) for n in args.diversity_counts for m in DIVERSITY]
    found = run(fd_cells + diversity_cells, args.limit, args.budget)
    console = Console(width=110)
    if fd_cells:
        console.print(
            table(
                "Fréchet distance of two sets of n (x: ratio to diffgen)",
                {c: found[c] for c in fd_cells},
                dict.fromkeys(FD, "diffgen"),
            )
        )
    if diversity_cells:
        baseline = {method: method.split(",")[0] for method in DIVERSITY}
        console.print(table(f"Diversity of n rows, d = {WIDTH}", {c: found[c] for c in diversity_cells}, baseline))
    if args.out:
        rows = [{"method": m, "n": n, "d": d, **found[m, n, d]} for m, n, d in found]
        args.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
