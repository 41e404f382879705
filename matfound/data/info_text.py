"""What `matfound.data.info` found, for a terminal."""

from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from matfound.data.info import Description


def render(description: Description) -> Group:
    """The description for a terminal, as something `rich` prints."""
    parts: list[Any] = [Text(f" {description.name} ", style="bold reverse"), Text()]
    parts += [_facts(description), Text()]
    if description.fields:
        parts.append(_field_table(description))
    else:
        parts.append(Text("No labels: nothing here can be trained on as it is.", style="yellow"))
    if description.config_types:
        parts.append(_count_table("config_type", description.config_types))
    if description.keys:
        parts.append(_key_table(description))
    parts += [Text(f"! {warning}", style="yellow") for warning in description.warnings]
    if description.duplicates and description.first_duplicate:
        first, second = description.first_duplicate
        file, frame = second.rsplit(": ", 1)
        if first.startswith(f"{file}: "):
            first = first.removeprefix(f"{file}: ")
        frames = "1 duplicate" if description.duplicates == 1 else f"{description.duplicates:,} duplicates"
        parts.append(Text(f"! {frames} of earlier structures; the first: {file}: {frame}, the same as {first}", style="yellow"))
    if not description.warnings and not description.duplicates:
        parts.append(Text("✓ no duplicates, no overlapping atoms, no suspicious values", style="green"))
    return Group(*parts)


def _facts(description: Description) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    low, median, high = description.atoms_per_frame
    sizes = f"{low}" if low == high else f"{low} to {high}, median {median:g}"
    grid.add_row("frames", f"{description.frames:,}")
    grid.add_row("atoms", f"{description.atoms:,} ({sizes} a frame)")
    elements = Text()
    for symbol, count in description.elements.items():
        elements.append(symbol, style="cyan").append(f"\u00a0{count['atoms']:,}   ")
    grid.add_row("elements", elements)
    kinds = {"TTT": "in three directions", "FFF": "not at all"}
    grid.add_row("periodic", Text(", ".join(f"{kinds.get(pbc, f'along {pbc}')}: {count:,}" for pbc, count in description.pbc.items())))
    if description.volume_per_atom:
        low_volume, mean, high_volume = description.volume_per_atom
        same = f"{low_volume:.4g}" == f"{high_volume:.4g}"
        spread = f"{mean:.4g} Å³ an atom" if same else f"{low_volume:.4g} to {high_volume:.4g} Å³ an atom, mean {mean:.4g}"
        grid.add_row("volume", spread)
    files = list(description.files.items())
    for i, (file, frames) in enumerate(files[:8]):
        grid.add_row("files" if i == 0 else "", Text(file if len(files) == 1 else f"{file}: {frames:,}"))
    if len(files) > 8:
        grid.add_row("", f"and {len(files) - 8:,} more")
    if description.note:
        grid.add_row("note", Text(description.note))
    return grid


def _table(*columns: tuple[str, bool], title: str = "") -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False)
    for name, numeric in columns:
        table.add_column(name, justify="right" if numeric else "left", overflow="fold", no_wrap=numeric)
    return table


def _field_table(description: Description) -> Table:
    table = _table(("field", False), ("unit", False), ("frames", True), ("missing", True), ("min", True), ("mean", True), ("max", True))
    for row in description.fields:
        unit = row.unit.replace("^3", "³").replace("*", "·")
        missing = Text(f"{row.missing:,}", style="yellow") if row.missing else Text("–", style="dim")
        numbers = [_number(value) for value in (row.minimum, row.mean, row.maximum)]
        table.add_row(row.quantity, unit, f"{row.frames:,}", missing, *numbers)
    return table


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.3e}" if abs(value) < 1e-3 or abs(value) >= 1e7 else f"{value:,.4f}"


def _count_table(name: str, counts: dict[str, int]) -> Table:
    table = _table((name, False), ("frames", True))
    shown = list(counts.items())
    for value, count in shown[:20]:
        table.add_row(Text(value or "(none)"), f"{count:,}")
    if len(shown) > 20:
        table.add_row(Text(f"and {len(shown) - 20:,} more", style="dim"), f"{sum(count for _, count in shown[20:]):,}")
    return table


def _key_table(description: Description) -> Table:
    hints = any(key.hint for key in description.keys)
    columns = [("other keys", False), ("frames", True), ("content", False), *([("read it with", False)] if hints else [])]
    table = _table(*columns)
    for key in description.keys:
        cells: list[Text] = [Text(key.name), Text(f"{key.frames:,}"), Text(key.content)]
        cells += [Text(key.hint, style="yellow")] if hints else []
        table.add_row(*cells)
    return table
