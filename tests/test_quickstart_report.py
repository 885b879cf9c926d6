"""The report is one page that needs nothing beside it and takes no text for markup."""

import pytest

from a3_jax.quickstart.config import tiny_run
from a3_jax.quickstart.questions import Infilling
from a3_jax.quickstart.report import curves, page, show
from a3_jax.training.config import RunConfig

FIGURES = {
    "loss": {"any_order_before": 7.5, "any_order_after": 1.25, "ar_before": 0.5, "ar_after": None},
    "exact_match": {"left": {"a3": 1.0, "ar": 0.995}, "right": {"a3": 0.96, "ar": 0.08}},
    "blanks": 504,
    "seconds": 99.6,
}
RUN = RunConfig.from_config(tiny_run())
INFILLING = Infilling(text="a [[1]] <b>", truth="a b <b>", a3="a b <b>", ar="a & <b>")


def test_page_escapes_text_and_loads_nothing():
    html = page(FIGURES, [INFILLING], RUN, b"PNG")
    assert "<b>" not in html
    assert "a &amp; &lt;b&gt;" in html
    assert "data:image/png;base64,UE5H" in html
    assert "http" not in html
    for shown in ("96.0 %", "7.50", "252 blanks of each kind", "100 seconds", "<td>-</td>"):
        assert shown in html


def test_page_without_picture_and_without_exact_match():
    html = page(FIGURES | {"exact_match": None}, [], RUN, None)
    assert "<img" not in html
    assert "exact match" not in html


def test_lines_for_the_terminal():
    lines = show([INFILLING]).splitlines()
    assert lines[:4] == [" blanks  a [[1]] <b>", "     A3  a b <b>", "     AR  a & <b>", "  truth  a b <b>"]


def test_curves_are_a_picture():
    pytest.importorskip("matplotlib")
    steps = [
        {"step": step, "stage": "l2r" if step < 3 else "random4", "loss": 5.0 - step} for step in range(1, 5)
    ]
    held_out = [
        {"step": 0, "stage": "l2r", "random": 7.0, "l2r": 6.0, "ar": None},
        {"step": 4, "random": 2.0},
    ]
    assert curves(steps, steps, held_out).startswith(b"\x89PNG")
    assert curves(steps, steps, []).startswith(b"\x89PNG")
