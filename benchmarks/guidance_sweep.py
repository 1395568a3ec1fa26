"""Picture of the committed sweep of the claim guidance.apg: python -m benchmarks.guidance_sweep.

Lines are means over the seeds, shades their range. The measures themselves: diffgen claims guidance.apg.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from diffgen.eval.report import COLORS

RESULT, PICTURE = Path("benchmarks/results/guidance.apg.json"), Path("docs/guidance_sweep.png")
INK, SOFT, GRID = "#1b1b1f", "#5c5c66", "#d5d5dc"
PANELS = {
    "accuracy": ("Verified", "share of images that pass"),
    "saturation": ("Saturation", "mean, 0 to 1"),
    "clipped": ("Clipped values", "per cent of channel values"),
    "fd": ("Fréchet distance", "to true images"),
}
RULES = {"cfg": ("CFG", 0, "o", "-"), "apg": ("APG", 1, "s", "--")}


def draw(result: dict[str, Any], path: Path) -> Path:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = [row["curves"] for row in result["seeds"]]
    style = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID, "axes.axisbelow": True}
    ticks = {"xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT}
    with rc_context(style | ticks | {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        figure = Figure(figsize=(11.5, 3.2), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        for panel, (measure, (title, unit)) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
            for rule, (label, color, marker, dashes) in RULES.items():
                x = [point["scale"] for point in curves[0][rule]]
                y = np.array([[point[measure] for point in curve[rule]] for curve in curves])
                y = 100 * y if measure == "clipped" else y
                own = COLORS[color][0]
                panel.fill_between(x, y.min(0), y.max(0), color=own, alpha=0.18, linewidth=0)
                panel.plot(x, y.mean(0), color=own, marker=marker, linestyle=dashes, label=label)
            panel.set_title(title, fontsize=12, fontweight="bold", loc="left")
            panel.set_xlabel("guidance scale")
            panel.set_ylabel(unit)
            panel.set_xticks(x)
            panel.grid(color=GRID, linewidth=0.6, alpha=0.7)
        figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=2, handlelength=2.2)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULT, help="the result")
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args()
    print(draw(json.loads(options.json.read_text()), options.out))


if __name__ == "__main__":
    main()
