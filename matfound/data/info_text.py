"""What `matfound.data.info` found, for a terminal."""

from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from matfound.data.info import Description, Label, LabelGroup

#: Groups with more columns than this are summed up.
_LISTED = 30


def render(description: Description) -> Group:
    """The description for a terminal, as something `rich` prints."""
    parts: list[Any] = [Text(f" {description.name} ", style="bold reverse"), Text()]
    parts += [_facts(description), Text()]
    if description.fields:
        parts.append(_field_table(description))
    for group in description.groups:
        parts += _group_parts(group)
    if not description.fields and not any(group.label for group in description.groups):
        parts.append(Text("No labels: nothing here can be trained on as it is.", style="yellow"))
    if description.config_types:
        parts.append(_count_table("config_type", description.config_types))
    if description.keys:
        parts.append(_key_table(description))
    if description.unusable:
        rows = "1 row cannot" if description.unusable == 1 else f"{description.unusable:,} rows cannot"
        parts.append(Text(f"! {rows} be used:", style="yellow"))
        parts += [Text(f"    {problem}", style="yellow") for problem in description.problems]
        if description.unusable > len(description.problems):
            parts.append(Text(f"    and {description.unusable - len(description.problems):,} more", style="yellow"))
    parts += [Text(f"! {warning}", style="yellow") for warning in description.warnings]
    if description.duplicates and description.first_duplicate:
        first, second = description.first_duplicate
        file, frame = second.rsplit(": ", 1)
        if first.startswith(f"{file}: "):
            first = first.removeprefix(f"{file}: ")
        frames = "1 duplicate" if description.duplicates == 1 else f"{description.duplicates:,} duplicates"
        parts.append(Text(f"! {frames} of earlier structures; the first: {file}: {frame}, the same as {first}", style="yellow"))
    if not description.warnings and not description.duplicates and not description.unusable:
        sure = "no duplicates, no overlapping atoms, " if description.compared else ""
        parts.append(Text(f"✓ {sure}no suspicious values", style="green"))
    return Group(*parts)


def _facts(description: Description) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    low, median, high = description.atoms_per_frame
    sizes = f"{low}" if low == high else f"{low} to {high}, median {median:g}"
    grid.add_row("frames", f"{description.frames:,}" + _partly(description))
    grid.add_row("atoms", f"{description.atoms:,} ({sizes} a frame)")
    elements = Text()
    for symbol, count in description.elements.items():
        elements.append(symbol, style="cyan").append(f"\u00a0{count['atoms']:,}   ")
    grid.add_row("elements", elements)
    if not description.pbc:
        grid.add_row("positions", "none: compositions")
    kinds = {"TTT": "in three directions", "FFF": "not at all"}
    for name, text in description.facts:
        grid.add_row(name, Text(text))
    if description.pbc:
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


def _partly(description: Description) -> str:
    if description.looked_at == description.frames:
        return ""
    labels = ""
    if description.labelled == description.frames:
        labels = ", labels of every one"
    elif description.labelled != description.looked_at:
        labels = f", labels of the first {description.labelled:,}"
    return f" (structures of {description.looked_at:,} were looked at{labels}; --all looks at every one)"


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


def _group_parts(group: LabelGroup) -> list[Any]:
    """A table of the group's columns, or, of many, a summary with the fullest and the emptiest."""
    kind = "labels" if group.label else "inputs"
    of = f"{group.rows:,} {'atoms' if group.level == 'atom' else 'rows'}"
    filled = sum(label.present for label in group.labels) / max(group.rows * len(group.labels), 1)
    missing = "none missing" if filled == 1 else f"{100 * (1 - filled):.3g} % missing"
    title = f"{group.field}: {len(group.labels):,} {kind} of {of}, {missing}"
    classes = any(label.classes for label in group.labels)
    shown = list(group.labels)
    if len(shown) > _LISTED:
        order = sorted(range(len(shown)), key=lambda k: -shown[k].present)
        present = sorted(label.present for label in shown)
        title += f"; a column has {present[0]:,} to {present[-1]:,}, median {present[len(present) // 2]:,}"
        title += _balance(shown) + "; the fullest and the emptiest:"
        shown = [shown[k] for k in (*order[:5], *order[-5:])]
    numbers = [("classes", False)] if classes else [("unit", False), ("min", True), ("mean", True), ("max", True)]
    table = _table(("input" if not group.label else "label", False), ("known", True), ("missing", True), *numbers)
    for label in shown:
        share = Text(f"{100 * label.missing / max(group.rows, 1):.1f} %", style="yellow") if label.missing else Text("–", style="dim")
        cells = [Text(_classes(label))] if classes else [Text(label.unit.replace("^3", "³").replace("^2", "²")), *_numbers(label)]
        table.add_row(Text(label.name), f"{label.present:,}", share, *cells)
    return [Text(title, style="bold"), table]


def _numbers(label: Label) -> list[Text]:
    return [Text("" if value is None else _number(value)) for value in (label.minimum, label.mean, label.maximum)]


def _classes(label: Label) -> str:
    total = max(sum(label.classes.values()), 1)
    return "   ".join(f"{name}: {count:,} ({100 * count / total:.3g} %)" for name, count in label.classes.items())


def _balance(labels: list[Label]) -> str:
    """The share of each class over all columns."""
    totals: dict[str, int] = {}
    for label in labels:
        for name, count in label.classes.items():
            totals[name] = totals.get(name, 0) + count
    known = max(sum(totals.values()), 1)
    return "".join(f"; class {name} {100 * count / known:.3g} %" for name, count in totals.items())
