"""Numbers as a reader wants them."""

import io

import numpy as np
import pytest
from rich.console import Console

from matfound.report.tables import columns, format_value, markdown, pad_decimals, superscripts, terminal


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123456, "0.01235"), (123.456, "123.5"), (1234567.0, "1,234,567"), (0.0, "0"), (-0.5, "-0.5000"), (0.99996, "1.000"),
        (1e-7, "1.000e-07"), (2.5e9, "2.500e+09"), (float("inf"), "inf"), (float("nan"), "–"), (None, "–"), ("", "–"), (12345, "12,345"),
        (True, "yes"), (np.False_, "no"), (np.float32(0.5), "0.5000"), (np.int64(3), "3"), ([1, 2.5], "1, 2.500"), ("text", "text"),
        (99999.6, "100,000"), (0.00012346, "0.0001235"),
    ],
)  # fmt: skip
def test_format_value(value, text):
    assert format_value(value) == text


def test_columns_of_rows_that_differ():
    found = columns([{"a": 1, "b": "x"}, {"a": 2.5, "c": None}, {"unit": "eV/Å^3"}])
    assert [c.name for c in found] == ["a", "b", "c", "unit"]
    assert [c.numeric for c in found] == [True, False, False, False]
    assert found[0].cells == ["1", "2.500", "–"]
    assert found[3].cells == ["–", "–", "eV/Å³"]
    assert columns([]) == []


def test_superscripts():
    assert superscripts("eV/Å^3") == "eV/Å³"
    assert superscripts("s^-12") == "s⁻¹²"
    assert superscripts("eV/atom") == "eV/atom"


def test_pad_decimals():
    assert pad_decimals(["1.25", "10", "0.5"], "0", ".") == ["1.25", "10.00", "0.50"]
    assert pad_decimals(["1", "2"]) == ["1", "2"]
    assert pad_decimals([]) == []


def test_markdown():
    text = markdown([{"field": "a|b", "MAE": 0.5}, {"field": "c", "MAE": 12}])
    assert text.splitlines() == ["| field |    MAE |", "| ----- | -----: |", "| a\\|b  | 0.5000 |", "| c     |     12 |"]
    assert markdown([]) == ""


def test_terminal():
    stream = io.StringIO()
    Console(file=stream, width=60).print(terminal([{"field": "[bold]x", "MAE": 0.5}, {"field": "y", "MAE": 12.25}], "Errors [1]"))
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert lines[0] == "Errors [1]"
    assert any(line.split() == ["[bold]x", "0.5000"] for line in lines)
    points = [line.index(".") for line in lines if "." in line]
    assert len(set(points)) == 1, "the decimal points are not in one column"


def test_words_are_not_broken() -> None:
    """In 80 columns a wide table wraps between words, and what no word allows sticks out."""
    rows = [
        {"data": "crystals and slabs", "field": "dipole_magnitude", "MAE": 0.1, "baseline MAE": 0.2, "times better": 2.0, "unit": "eV/atom"}
    ]
    console = Console(width=80, file=io.StringIO())
    console.print(terminal(rows))
    text = console.file.getvalue()
    for word in ("crystals", "slabs", "dipole_magnitude", "baseline MAE", "eV/atom"):
        assert word in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
