"""Picture of the committed result of the claim evaluation.sanity: python -m benchmarks.metric_sanity.

Lines are means over the seeds, shades their range. The measures themselves: diffgen claims evaluation.sanity.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from diffgen.eval.report import COLORS

RESULT, PICTURE = Path("benchmarks/results/evaluation.sanity.json"), Path("docs/metric_sanity.png")
INK, SOFT, GRID = "#1b1b1f", "#5c5c66", "#d5d5dc"
PANELS = {  # curve: (title, what is on the x axis)
    "noise": ("Pixel noise", "± noise level, of 255"),
    "kinds": ("Missing modes", "kinds of shape left, of 4"),
    "different": ("Copies", "different images among 400"),
    "sizes": ("Small samples", "images on both sides"),
}
LINES = {  # measure: (label, colour, marker, dashes)
    "fd": ("FD", 0, "o", "-"),
    "kid": ("KID", 1, "s", "--"),
    "precision": ("precision", 4, "^", "-"),
    "recall": ("recall", 3, "v", "--"),
    "vendi": ("Vendi (share of the true images')", 2, "D", ":"),
}


def draw(result: dict[str, Any], path: Path) -> Path:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seeds = result["seeds"]

    def values(curve: str, measure: str) -> np.ndarray:
        """[seeds, points]; distances in units of what one kind of shape alone gives, Vendi of what true images give."""
        found = np.array([[point[measure] for point in row["curves"][curve]] for row in seeds])
        unit = {"vendi": ("noise", 0), "fd": ("kinds", -1), "kid": ("kinds", -1)}.get(measure.split()[0])
        if measure.startswith("floor"):
            unit, measure = ("kinds", -1), "fd"
        if unit is None:
            return found
        return found / np.array([[row["curves"][unit[0]][unit[1]][measure.split()[0]]] for row in seeds])

    style = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID, "axes.axisbelow": True}
    ticks = {"xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT}
    with rc_context(style | ticks | {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        figure = Figure(figsize=(11.5, 5.6), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 4, sharey="row")
        for column, (curve, (title, label)) in enumerate(PANELS.items()):
            points = seeds[0]["curves"][curve]
            names, x = [str(p.get("x", p.get("images"))) for p in points], np.arange(len(points))
            for measure, (text, color, marker, dashes) in LINES.items():
                panel, y = axes[int(measure not in ("fd", "kid"))][column], values(curve, measure)
                own = COLORS[color][0]
                panel.fill_between(x, y.min(0), y.max(0), color=own, alpha=0.18, linewidth=0)
                panel.plot(x, y.mean(0), color=own, marker=marker, linestyle=dashes, label=text if column == 0 else None)
            if curve == "sizes":
                low, high = (values(curve, f"floor {end}").mean(0) for end in ("low", "high"))
            else:
                scale = [row["curves"]["kinds"][-1]["fd"] for row in seeds]
                low, high = (
                    np.mean([row["floor"][k] / s for row, s in zip(seeds, scale)]).repeat(len(x)) for k in ("low", "high")
                )
            band = "FD's noise floor" if column == 0 else None
            axes[0][column].fill_between(x, low, high, color="#9a9aa5", alpha=0.35, linewidth=0, label=band)
            if curve == "sizes":
                ends = [row["curves"]["sizes"][-1]["fd infinity"] / row["curves"]["kinds"][-1]["fd"] for row in seeds]
                axes[0][column].plot(
                    x[-1], np.mean(ends), "*", color=COLORS[0][0], markersize=13, label="FD∞", linestyle="none"
                )
            axes[0][column].set_title(title, fontsize=12, fontweight="bold", loc="left")
            axes[1][column].set_xlabel(label)
            for panel in axes[:, column]:
                panel.set_xticks(x, names)
                panel.grid(color=GRID, linewidth=0.6, alpha=0.7)
        axes[0][0].set_ylabel("distance\n(1: one kind of shape left)")
        axes[1][0].set_ylabel("quality and diversity")
        axes[1][0].set_ylim(bottom=0)
        figure.legend(loc="outside lower center", ncols=7, handlelength=2.4)
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
