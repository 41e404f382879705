"""Rows to aligned text: the same numbers in the terminal, in Markdown and in the HTML report."""

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "–"
#: Up to this length, words are not broken in a terminal's table.
WIDEST_WORD = 32
_NUMBER = re.compile(r"[-+−]?\d[\d,]*(\.\d+)?(e[-+]\d+)?%?")


@dataclass(frozen=True)
class Column:
    """A column of a table: its name, its cells as text, and whether they are numbers (set flush right)."""

    name: str
    cells: list[str]
    numeric: bool


def format_value(value: Any, digits: int = 4) -> str:
    """A cell: floats to `digits` significant digits, integers with thousands separators, nothing as a dash."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return NOTHING
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    if isinstance(value, numbers.Real):
        return _format_float(float(value), digits)
    if isinstance(value, (list, tuple)):
        return ", ".join(format_value(item, digits) for item in value)
    return str(value)


def _format_float(value: float, digits: int) -> str:
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    # The exponent after rounding: 0.99996 is 1.000, not 1.0000.
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    if exponent < -5 or exponent > 7:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def superscripts(unit: str) -> str:
    """A unit as it is printed: eV/Å³ for "eV/Å^3"."""
    return re.sub(r"\^(-?\d+)", lambda match: match[1].translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")), unit)


def columns(rows: Sequence[Mapping[str, Any]], digits: int = 4) -> list[Column]:
    """The columns of a table whose rows need not have the same keys; order of first appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = []
    for name in names:
        values = [superscripts(str(row.get(name) or "")) if name == "unit" else row.get(name) for row in rows]
        cells = [format_value(value, digits) for value in values]
        shown = [cell for cell in cells if cell != NOTHING]
        out.append(Column(str(name), cells, bool(shown) and all(_NUMBER.fullmatch(cell) for cell in shown)))
    return out


def pad_decimals(cells: Sequence[str], fill: str = " ", point: str = " ") -> list[str]:
    """Cells of equal width behind the decimal point, so that flush right they align on it.

    Args:
        cells: numbers as text.
        fill: stands for an absent decimal (a figure space in HTML).
        point: stands for an absent decimal point.
    """
    tails = [cell.partition(".")[2] for cell in cells]
    longest = max((len(tail) for tail in tails), default=0)
    out = []
    for cell, tail in zip(cells, tails, strict=True):
        missing_point = point if longest and not tail else ""
        out.append(cell + missing_point + fill * (longest - len(tail)))
    return out


def markdown(rows: Sequence[Mapping[str, Any]], digits: int = 4) -> str:
    """A Markdown table, padded so that it reads well as plain text; "" for no rows."""
    table = columns(rows, digits)
    if not table:
        return ""
    lines: list[list[str]] = [[] for _ in range(len(rows) + 2)]
    for column in table:
        cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in [column.name, *column.cells]]
        width = max(3, *(len(cell) for cell in cells))
        rule = "-" * (width - 1) + ":" if column.numeric else "-" * width
        padded = [cell.rjust(width) if column.numeric else cell.ljust(width) for cell in cells]
        for line, cell in zip(lines, [padded[0], rule, *padded[1:]], strict=True):
            line.append(cell)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def terminal(rows: Sequence[Mapping[str, Any]], title: str = "", digits: int = 4) -> "Table":
    """A table for `rich.console.Console.print`."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", header_style="bold", pad_edge=False)
    table.collapse_padding = True
    padded = []
    for column in columns(rows, digits):
        # rich strips the blanks that align the decimal points, so numbers are set flush right here.
        cells = pad_decimals(column.cells) if column.numeric else column.cells
        width = max(len(cell) for cell in [column.name, *cells]) if column.numeric else 0
        padded.append([cell.rjust(width) for cell in cells])
        # Words are not broken: a name that is cut in two cannot be copied.
        words = [word for cell in [column.name, *cells] for word in cell.split()]
        longest = 0 if column.numeric else min(WIDEST_WORD, max(map(len, words), default=0))
        table.add_column(escape(column.name.rjust(width)), no_wrap=column.numeric, min_width=longest, overflow="fold")
    for i in range(len(rows)):
        table.add_row(*(escape(cells[i]) for cells in padded))
    return table
