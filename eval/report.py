"""One report writer: sections of text, tables and pictures -> a single HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Figure:
    """png as base64; kind "pixels" (enlarged without smoothing) or "plot"."""

    png: str
    caption: str
    kind: str = "pixels"


@dataclass
class Section:
    """table: rows of cells, the first one is the header. commands: shown as code."""

    heading: str
    text: str = ""
    table: list[list[str]] | None = None
    figures: list[Figure] = field(default_factory=list)
    commands: str = ""
    note: str = ""


def picture(image: Any, caption: str) -> Figure:
    """A PIL image as a figure."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Figure(base64.b64encode(buffer.getvalue()).decode(), caption)


def plot(draw, caption: str, size: tuple[float, float] = (6.4, 3.6)) -> Figure:
    """draw(axes) on a matplotlib figure of that size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=size, layout="constrained")
    FigureCanvasAgg(canvas)
    draw(canvas.add_subplot())
    buffer = io.BytesIO()
    canvas.savefig(buffer, dpi=110)
    return Figure(base64.b64encode(buffer.getvalue()).decode(), caption, "plot")


def write_report(path: Path | str, title: str, sections: list[Section], lead: str = "") -> Path:
    """Writes the HTML under a temporary name and renames it. Everything in it is escaped."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string((Path(__file__).parent / "report.html").read_text())
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(template.render(title=title, lead=lead, sections=sections), encoding="utf-8")
    os.replace(temporary, path)
    return path
