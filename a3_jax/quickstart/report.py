"""What a quickstart leaves to look at: infillings in the terminal, the loss curves, one HTML page."""

import base64
import importlib.resources
import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from a3_jax.paths import as_path, read_json_lines, write_text
from a3_jax.quickstart.questions import Infilling
from a3_jax.training.config import RunConfig

CURVES, PAGE, TEMPLATE = "curves.png", "report.html", "report.html.j2"
# names of eval.jsonl, as the curves call them
HELD_OUT = {
    "random": "any order, groups of 4",
    "contiguous": "contiguous groups of 4",
    "l2r": "left to right, query stream",
    "ar": "left to right, AR stream",
}


def write(workdir, result: Mapping[str, Any], infillings: Sequence[Infilling], run: RunConfig) -> None:
    """Writes the curves and the page into `workdir`; without matplotlib, the page alone."""
    workdir = as_path(workdir)
    files = ("ar/metrics.jsonl", "a3/metrics.jsonl", "a3/eval.jsonl")
    picture = curves(*(read_json_lines(workdir / file) for file in files))
    if picture is None:
        print("matplotlib is not installed, so there is no picture of the losses", file=sys.stderr)
    else:
        (workdir / CURVES).write_bytes(picture)
    write_text(workdir / PAGE, page(result, infillings, run, picture))


def show(infillings: Sequence[Infilling]) -> str:
    """Returns the infillings as lines of plain text."""
    lines = []
    for infilling in infillings:
        names = {"blanks": infilling.text, "A3": infilling.a3, "AR": infilling.ar, "truth": infilling.truth}
        lines += [f"{name:>7}  {' '.join(text.split())}" for name, text in names.items()] + [""]
    return "\n".join(lines)


def page(result, infillings: Sequence[Infilling], run: RunConfig, picture: bytes | None) -> str:
    """Returns the report as one HTML text that needs nothing beside it."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = importlib.resources.files("a3_jax.quickstart").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(template).render(
        result=result,
        infillings=infillings,
        run=run,
        picture=None if picture is None else base64.b64encode(picture).decode("ascii"),
    )


def curves(ar_steps, a3_steps, held_out) -> bytes | None:
    """Returns the losses of both runs as a PNG; None without matplotlib.

    Args:
      ar_steps, a3_steps: rows of `metrics.jsonl`.
      held_out: rows of the adaptation's `eval.jsonl`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 3))
    _draw_training(left, ar_steps)
    left.set_title("source model, left to right")
    left.set_ylabel("nats a predicted token")
    _draw_training(right, a3_steps)
    _draw_stages(right, a3_steps)
    for name, label in HELD_OUT.items():
        points = [(row["step"], row[name]) for row in held_out if row.get(name) is not None]
        right.plot(*zip(*points), marker="o", markersize=4, label=label) if points else None
    right.set_title("adaptation to any order, with held-out losses")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.set_ylim(0, 1.2 * axes.get_ylim()[1])  # room for the names of the stages
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _draw_training(axes, rows) -> None:
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    axes.plot(steps, losses, color="0.6", linewidth=1, label="training")
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_stages(axes, rows) -> None:
    """A line where each stage begins, with its name."""
    begins = {}
    for row in rows:
        begins.setdefault(row["stage"], row["step"] - 1)
    top = axes.get_xaxis_transform()
    for name, step in begins.items():
        axes.axvline(step, color="0.85", linewidth=1, zorder=0)
        axes.text(step, 1.0, name, transform=top, fontsize=8, color="0.4", rotation=90, va="top")
