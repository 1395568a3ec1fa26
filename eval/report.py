"""One report writer: sections of text, tables and pictures -> a single HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffgen.files import write_text

# One colour a series, for light and for dark pages: Okabe and Ito's palette, told apart also by colour-blind readers.
COLORS = (
    ("#0072b2", "#5ab4f0"),
    ("#d55e00", "#ff8f52"),
    ("#00805f", "#2cc79a"),
    ("#a8467f", "#e394c5"),
    ("#a87400", "#f0c040"),
    ("#4d4d55", "#c6c6ce"),
    ("#3f8fc9", "#b3dcff"),
    ("#6f4a1f", "#cfa271"),
)
MARKERS = "osD^vPX*"
# text, lesser text, lines and paper of plots, as report.html has them
_INK = (("#1b1b1f", "#5c5c66", "#d5d5dc", "#ffffff"), ("#ececf1", "#a2a2ae", "#44444e", "#17171b"))


@dataclass(frozen=True)
class Figure:
    """png as base64, and another one for dark pages; kind "pixels" (enlarged without smoothing) or "plot".

    width: in CSS pixels, for pictures that are finer than the screen.
    """

    png: str
    caption: str
    kind: str = "pixels"
    dark: str = ""
    width: int | None = None


@dataclass
class Cell:
    """One cell of a Matrix: a mosaic, lines under it, and details [(name, value)] shown by hovering or focusing it.

    error: what stands in the place of pictures. best: the cell that the page wants to point at.
    """

    figures: list[Figure] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    details: list[tuple[str, str]] = field(default_factory=list)
    error: str = ""
    best: bool = False

    @property
    def columns(self) -> int:
        """Of the mosaic: as square as can be, and without an empty place unless that would be a strip (primes)."""
        n = len(self.figures)
        able = [c for c in range(1, n + 1) if c * c >= n and n % c == 0 and c * c <= 3.2 * n]
        return min(able, default=math.ceil(math.sqrt(n)))


@dataclass
class Matrix:
    """rows: (label, one cell a column). Row i has the colour COLORS[i]. Labels break after +, : and commas."""

    columns: list[str]
    rows: list[tuple[str, list[Cell]]]

    @property
    def label_width(self) -> float:
        """In rem: what the longest unbreakable part of a label takes."""
        parts = [part for label, _ in self.rows for part in re.split(r"(?<=[+:,])", label)]
        return min(max(8.5, 0.62 * max(map(len, parts), default=0)), 15)


@dataclass
class Section:
    """table: rows of cells, the first one is the header. matrix: pictures in rows and columns. commands: shown as code."""

    heading: str
    text: str = ""
    table: list[list[str]] | None = None
    figures: list[Figure] = field(default_factory=list)
    commands: str = ""
    note: str = ""
    matrix: Matrix | None = None


def picture(image: Any, caption: str) -> Figure:
    """A PIL image as a figure."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return Figure(base64.b64encode(buffer.getvalue()).decode(), caption)


def plot(draw, caption: str, size: tuple[float, float] = (6.4, 3.6)) -> Figure:
    """draw(axes) on a matplotlib figure of that size in inches, once for light and once for dark pages."""
    light, dark = (_draw(draw, size, theme) for theme in (0, 1))
    return Figure(light, caption, "plot", dark, width=round(110 * size[0]))


def _draw(draw, size: tuple[float, float], theme: int) -> str:
    import matplotlib
    from cycler import cycler
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    ink, soft, line, paper = _INK[theme]
    style: Any = {
        "figure.facecolor": paper,
        "axes.facecolor": paper,
        "axes.edgecolor": line,
        "axes.labelcolor": ink,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=[pair[theme] for pair in COLORS]),
        "grid.color": line,
        "grid.linewidth": 0.6,
        "grid.alpha": 0.6,
        "text.color": ink,
        "xtick.color": line,
        "ytick.color": line,
        "xtick.labelcolor": soft,
        "ytick.labelcolor": soft,
        "font.size": 10,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=size, dpi=220, layout="constrained")
        FigureCanvasAgg(canvas)
        draw(canvas.add_subplot())
        buffer = io.BytesIO()
        canvas.savefig(buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def legend_below(axes) -> None:
    """A legend under the axes, in as many columns as the figure has room for."""
    figure = axes.figure
    for columns in range(len(axes.get_legend_handles_labels()[1]), 0, -1):
        legend = figure.legend(loc="outside lower center", ncols=columns, columnspacing=1.4, handlelength=1.8)
        if columns == 1 or legend.get_window_extent(figure.canvas.get_renderer()).width < 0.98 * figure.bbox.width:
            return
        legend.remove()


def label_points(axes, points: list[tuple[float, float]], texts: list[str], colors: list) -> None:
    """A text beside each point (data coordinates), at whichever of 64 places covers the least of points, texts and lines."""
    from matplotlib.patheffects import withStroke

    axes.figure.draw_without_rendering()  # settles the layout, so that positions on the canvas are known
    renderer, to_canvas = axes.figure.canvas.get_renderer(), axes.transData.transform
    unit = axes.figure.dpi / 72
    at = [tuple(to_canvas(point)) for point in points]
    taken = [
        ((x - 7 * unit, y - 7 * unit, x + 7 * unit, y + 7 * unit), 8.0) for x, y in at
    ]  # (box, what covering it costs)
    for line in axes.lines:  # small boxes along every line
        path = line.get_transform().transform(line.get_xydata())
        for (x0, y0), (x1, y1) in itertools.pairwise(path):
            steps = max(1, int(math.hypot(x1 - x0, y1 - y0) / (4 * unit)))
            middles = [(x0 + (x1 - x0) * k / steps, y0 + (y1 - y0) * k / steps) for k in range(steps)]
            taken += [((x - unit, y - unit, x + unit, y + unit), 1.0) for x, y in middles]
    frame = axes.get_window_extent(renderer).padded(4 * unit)
    sides = [(math.cos(k * math.pi / 8), math.sin(k * math.pi / 8)) for k in range(16)]
    for (x, y), text, color in zip(at, texts, colors):
        label = axes.text(0, 0, text, color=color, fontsize=9, fontweight="bold", ha="center", va="center")
        label.set_path_effects([withStroke(linewidth=2.5, foreground=axes.get_facecolor())])
        w, h = label.get_window_extent(renderer).size
        choices = []
        for radius, (dx, dy) in itertools.product((1.0, 1.5, 2.2, 3.0), sides):
            far = radius / max(abs(dx), abs(dy))  # on a box around the point, so that its marker stays free
            cx, cy = x + dx * far * (w / 2 + 9 * unit), y + dy * far * (h / 2 + 8 * unit)
            place = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
            inside = place[0] > frame.x0 and place[1] > frame.y0 and place[2] < frame.x1 and place[3] < frame.y1
            covered = sum(cost * _overlap(place, other) for other, cost in taken) / unit**2
            choices.append((covered + 1e6 * (not inside) + 8 * math.hypot(dx * far, dy * far), place))
        _, place = min(choices)
        label.set_position(axes.transData.inverted().transform(((place[0] + place[2]) / 2, (place[1] + place[3]) / 2)))
        taken.append(((place[0] - 3 * unit, place[1] - unit, place[2] + 3 * unit, place[3] + unit), 8.0))


def _overlap(a: tuple, b: tuple) -> float:
    """Area that two boxes (x0, y0, x1, y1) share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def write_report(path: Path | str, title: str, sections: list[Section], lead: str = "") -> Path:
    """Writes the HTML under a temporary name and renames it. Everything in it is escaped."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((Path(__file__).parent / "report.html").read_text())
    return write_text(path, template.render(title=title, lead=lead, sections=sections, colors=COLORS))
