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
    "kid": ("1000 KID", 1, "s", "--"),
    "precision": ("precision", 4, "^", "-"),
    "recall": ("recall", 3, "v", "--"),
    "vendi": ("Vendi, share of true images'", 2, "D", ":"),
}


def draw(result: dict[str, Any], path: Path) -> Path:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seeds = result["seeds"]

    def values(curve: str, measure: str) -> np.ndarray:
        """[seeds, points]; Vendi as a share of what it is for true images."""
        found = np.array([[point[measure] for point in row["curves"][curve]] for row in seeds])
        if measure == "vendi":
            found = found / np.array([[row["curves"]["noise"][0]["vendi"]] for row in seeds])
        return found

    style = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID, "axes.axisbelow": True}
    ticks = {"xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT}
    with rc_context(style | ticks | {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        figure = Figure(figsize=(11.5, 5.6), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, len(PANELS))
        for (curve, (title, label)), (distance, share) in zip(PANELS.items(), axes.T):
            names = [str(point["x"]) for point in seeds[0]["curves"][curve]]
            x = np.arange(len(names))
            ends = [
                values(curve, f"floor {end}").mean(0)
                if curve == "sizes"
                else np.full(len(x), np.mean([row["floor"][f"floor {end}"] for row in seeds]))
                for end in ("low", "high")
            ]
            distance.fill_between(x, *ends, color="#9a9aa5", alpha=0.4, linewidth=0, label="FD's noise floor")
            for measure, (text, color, marker, dashes) in LINES.items():
                panel, y, own = (
                    distance if measure in ("fd", "kid") else share,
                    values(curve, measure),
                    COLORS[color][0],
                )
                panel.fill_between(x, y.min(0), y.max(0), color=own, alpha=0.18, linewidth=0)
                panel.plot(x, y.mean(0), color=own, marker=marker, linestyle=dashes, label=text)
            if curve == "sizes":
                infinity = np.mean([row["curves"]["sizes"][-1]["fd infinity"] for row in seeds])
                distance.plot(
                    x[-1],
                    infinity,
                    "*",
                    color=INK,
                    markerfacecolor="white",
                    markersize=14,
                    label="FD∞, from 100 to 400 images",
                )
            distance.set_title(title, fontsize=12, fontweight="bold", loc="left")
            share.set_xlabel(label)
            share.set_ylim(-0.03, 1.07)
            for panel in (distance, share):
                panel.set_xticks(x, names)
                panel.grid(color=GRID, linewidth=0.6, alpha=0.7)
        axes[0, 0].set_ylabel("distance (scales differ)")
        axes[1, 0].set_ylabel("quality and diversity")
        known = {t: h for panel in axes.flat for h, t in zip(*panel.get_legend_handles_labels())}
        figure.legend(
            known.values(), known.keys(), loc="outside lower center", ncols=7, handlelength=2.2, columnspacing=1.2
        )
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
