"""Figures: learning curves, parity plots, structures, relaxations. No pyplot, so no global state and no display."""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from matfound.errors import InputError
from matfound.report.errors import ParityPanel
from matfound.report.tables import format_value, superscripts

if TYPE_CHECKING:
    import ase

Floats = NDArray[np.float64]

#: Okabe and Ito's palette, distinguishable with every common colour vision (Wong, Nat. Methods 8, 441 (2011)).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A6A00", "#000000")
GREY = "#8a9199"
#: More points than this in a panel become hexagons.
MANY_POINTS = 5_000
#: Larger structures are drawn flat and without bonds.
MANY_ATOMS = 400
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "axes.titlesize": 9.5, "axes.labelsize": 9,
    "axes.linewidth": 0.8, "axes.edgecolor": "#3c4248", "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "axes.grid": True, "grid.color": "#e6e9ec", "grid.linewidth": 0.7, "axes.titlelocation": "left",
    "axes.titleweight": "bold", "axes.formatter.useoffset": False, "axes.formatter.limits": (-4, 5), "xtick.labelsize": 8,
    "ytick.labelsize": 8, "xtick.color": "#3c4248", "ytick.color": "#3c4248", "legend.fontsize": 8, "legend.frameon": False,
    "lines.linewidth": 1.6, "figure.facecolor": "white", "savefig.facecolor": "white",
}  # fmt: skip


def style() -> AbstractContextManager[None]:
    """The look of all figures, as a context; matplotlib's own settings come back afterwards."""
    return mpl.rc_context(cast("Any", _STYLE))


# ------------------------------------------------------------------------------------------------------------------- curves

_STAGES = ("train", "val", "test")
_STAGE = re.compile(r"^(train|val|valid|validation|test)[/_](.+)$")


def curves(history: Sequence[Mapping[str, Any]], x: str | None = None) -> Figure:
    """Learning curves from the rows of a metrics log.

    The loss comes first, then the learning rate, then every other metric; "train/loss" and "val/loss" (or "train_loss", …) share
    a panel. Values that a row lacks are skipped. Losses, errors and learning rates have logarithmic axes.

    Args:
        history: a mapping a row, with "epoch" and/or "step".
        x: the horizontal axis; default "epoch" where it takes at least two values, else "step".

    Raises:
        InputError: nothing to draw.
    """
    series = _series(history, x or _horizontal(history))
    if not series:
        raise InputError("the history has no numbers to draw")
    names = sorted(series, key=lambda name: (not _is_loss(name), not _is_rate(name)))  # stable: then in order of appearance
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    with style():
        figure = Figure(figsize=(3.3 * columns + 0.3, 2.5 * rows + 0.2), layout="constrained")
        axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
        for ax, name in zip(axes, names, strict=False):
            for stage, (steps, values) in sorted(series[name].items()):
                colour = COLOURS[_STAGES.index(stage)] if stage else COLOURS[0]
                marker = "o" if len(values) < 15 else ""
                ax.plot(steps, values, color=colour, label=stage or None, marker=marker, markersize=3)
            ax.set_title(_readable(name))
            ax.set_xlabel(x or _horizontal(history))
            every = np.concatenate([values for _, values in series[name].values()])
            if (every > 0).all() and (_is_loss(name) or _is_rate(name) or every.max() > 5 * every.min()):
                _log_axis(ax, every)
            if any(series[name]):
                ax.legend()
        for ax in axes[len(names) :]:
            ax.set_axis_off()
    return figure


def _log_axis(ax: Axes, values: Floats) -> None:
    """A logarithmic vertical axis with plain numbers; 1, 2, 5 are labelled where the range is short."""
    decades = float(np.log10(values.max() / values.min()))
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    if decades < 0.4:  # not even two of 1, 2, 5
        ax.yaxis.set_major_locator(MaxNLocator(4))


def _readable(name: str) -> str:
    """Metrics as they are written: "energy MAE" for "energy_mae"."""
    words = {"mae": "MAE", "rmse": "RMSE", "lr": "learning rate", "r2": "R²"}
    return " ".join(words.get(word, word) for word in re.split(r"[_/]", name))


def _is_loss(name: str) -> bool:
    return name == "loss" or name.startswith("loss")


def _is_rate(name: str) -> bool:
    return name in ("lr", "learning_rate") or name.startswith("lr-")


def _horizontal(history: Sequence[Mapping[str, Any]]) -> str:
    epochs = {row["epoch"] for row in history if _finite(row.get("epoch"))}
    has_steps = any(_finite(row.get("step")) for row in history)
    return "epoch" if len(epochs) > 1 or not has_steps else "step"


def _series(history: Sequence[Mapping[str, Any]], x: str) -> dict[str, dict[str, tuple[Floats, Floats]]]:
    """Metric name to stage to (x, values)."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for i, row in enumerate(history):
        for key, value in row.items():
            if key in ("epoch", "step", x) or not _finite(value):
                continue
            match = _STAGE.match(key)
            stage, name = (match[1], match[2]) if match else ("", key)
            stage = "val" if stage.startswith("val") else stage
            where = float(row[x]) if _finite(row.get(x)) else float(i)
            found.setdefault(name, {}).setdefault(stage, []).append((where, float(value)))
    return {n: {s: (np.array(p)[:, 0], np.array(p)[:, 1]) for s, p in stages.items()} for n, stages in found.items()}


def _finite(value: Any) -> bool:
    if value is None or value == "" or isinstance(value, bool):
        return False
    try:
        return bool(np.isfinite(float(value)))
    except (TypeError, ValueError):
        return False


# ------------------------------------------------------------------------------------------------------------------- parity


def parity(panels: Sequence[ParityPanel]) -> Figure:
    """Predictions against labels, a panel a field, with the identity line and the errors in the corner.

    Panels of more than `MANY_POINTS` points in one group show their density. `ErrorTable.panels` makes the panels.

    Raises:
        InputError: no panels.
    """
    if not panels:
        raise InputError("there is nothing to compare in a parity plot")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with style():
        figure = Figure(figsize=(3.35 * columns + 0.2, 3.35 * rows + 0.2), layout="constrained")
        axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
        for ax, panel in zip(axes, panels, strict=False):
            _parity_panel(ax, panel)
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
    return figure


def _parity_panel(ax: Axes, panel: ParityPanel) -> None:
    low = float(min(panel.reference.min(), panel.prediction.min()))
    high = float(max(panel.reference.max(), panel.prediction.max()))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1e-3
    low, high = low - margin, high + margin
    counts = np.bincount(panel.group, minlength=len(panel.groups))
    shown = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    if len(shown) == 1 and len(panel.reference) > MANY_POINTS:
        ax.hexbin(panel.reference, panel.prediction, gridsize=70, extent=(low, high, low, high), bins="log", mincnt=1,
                  cmap="viridis_r", linewidths=0.1)  # fmt: skip
    else:
        _scatter(ax, panel, shown)
    ax.plot([low, high], [low, high], color="#3c4248", linewidth=0.8, linestyle=(0, (4, 3)), zorder=5)
    ax.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    ax.set_box_aspect(1)
    ax.set_title(panel.title.replace("_", " "))
    unit = f" ({superscripts(panel.unit)})" if panel.unit else ""
    ax.set_xlabel(f"label{unit}")
    ax.set_ylabel(f"prediction{unit}")
    drawn = f"{len(panel.reference):,} of {panel.total:,}" if panel.total > len(panel.reference) else f"{panel.total:,}"
    note = f"MAE {format_value(panel.mae, 3)}\nRMSE {format_value(panel.rmse, 3)}\n{drawn} values"
    ax.text(0.97, 0.03, note, transform=ax.transAxes, ha="right", va="bottom", fontsize=7.5, linespacing=1.4, zorder=6,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2})  # fmt: skip


def _scatter(ax: Axes, panel: ParityPanel, shown: list[int]) -> None:
    """Points by group; beyond the palette, the smaller groups share grey."""
    named = shown if len(shown) <= len(COLOURS) else shown[: len(COLOURS) - 1]
    rest = shown[len(named) :]
    alpha = float(np.clip(30 / np.sqrt(len(panel.reference)), 0.15, 0.8))
    parts = [([group], COLOURS[i], panel.groups[group]) for i, group in enumerate(named)]
    if rest:
        parts.append((rest, GREY, f"{len(rest)} others"))
    for groups, colour, label in parts:
        mask = np.isin(panel.group, groups)
        ax.scatter(panel.reference[mask], panel.prediction[mask], s=7, color=colour, alpha=alpha, linewidths=0, zorder=3,
                   label=label if len(shown) > 1 else None)  # fmt: skip
    if len(shown) > 1:
        legend = ax.legend(loc="upper left", handletextpad=0.1, borderaxespad=0.2, markerscale=2, fontsize=7)
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1)


# --------------------------------------------------------------------------------------------------------------- structures


def structure(atoms: "ase.Atoms | Sequence[ase.Atoms]", titles: Sequence[str] = (), rotation: tuple[float, float] = (12.0, 17.0)) -> Figure:
    """Pictures of structures side by side, on one scale: jmol's colours, covalent radii, bonds and the edges of the cell.

    Atoms on the border of a periodic cell are drawn on every side of it. Periodic structures stand on their xy plane;
    molecules show their widest side.

    Args:
        atoms: a structure or several.
        titles: one for each.
        rotation: degrees about the horizontal axis and about the vertical axis of the picture.
    """
    images: list[ase.Atoms] = [atoms] if hasattr(atoms, "positions") else list(atoms)  # type: ignore[list-item]
    # The same atoms, before and after, are seen from the same side.
    alike = [image if not np.array_equal(image.numbers, images[0].numbers) else images[0] for image in images]
    scenes = [_scene(image, _view(like, rotation)) for image, like in zip(images, alike, strict=True)]
    # Centres of the scenes are at the origin: one window fits all.
    half = 0.3 + max(_extent(*scene) for scene in scenes)
    with style():
        figure = Figure(figsize=(3.2 * len(images), 3.3), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(images), squeeze=False)).ravel()
        for i, (ax, scene) in enumerate(zip(axes, scenes, strict=True)):
            _draw(ax, *scene)
            ax.set(xlim=(-half, half), ylim=(-half, half), aspect="equal")
            ax.set_axis_off()
            if i < len(titles):
                ax.set_title(titles[i], loc="center", fontweight="normal")
    return figure


def _extent(positions: Floats, numbers: NDArray[np.int64], edges: Floats) -> float:
    atoms = (np.abs(positions[:, :2]) + _radii(numbers)[:, None]).max(initial=1.0)
    return float(max(atoms, np.abs(edges[:, :, :2]).max(initial=0.0)))


def _radii(numbers: NDArray[np.int64]) -> Floats:
    from ase.data import covalent_radii

    return np.asarray(0.5 * covalent_radii[numbers])


def _view(atoms: "ase.Atoms", rotation: tuple[float, float]) -> Floats:
    """Rotation from Cartesian rows to rows of the picture (right, up, towards the viewer)."""
    base = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    if not atoms.pbc.any() and len(atoms) > 2:
        base = np.linalg.svd(atoms.positions - atoms.positions.mean(0))[2]
        base[:2] *= np.where(base[:2].sum(1) < 0, -1, 1)[:, None]
        base[2] = np.cross(base[0], base[1])
    a, b = np.radians(rotation)
    about_vertical = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_horizontal = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    return (about_horizontal @ about_vertical @ base).T


def _scene(atoms: "ase.Atoms", turn: Floats) -> tuple[Floats, NDArray[np.int64], Floats]:
    """Turned and centred: positions with the images on the border, their numbers, and the cell's edges (edges, 2, 3)."""
    positions, numbers = atoms.positions, atoms.numbers
    edges = np.zeros((0, 2, 3))
    cell = atoms.cell.complete().array if atoms.pbc.any() else None
    if cell is not None:
        scaled = np.linalg.solve(cell.T, positions.T).T
        scaled[:, atoms.pbc] -= np.floor(scaled[:, atoms.pbc] + 1e-3)
        copies, species = [scaled], [numbers]
        for shift in product(*[(0, 1) if periodic else (0,) for periodic in atoms.pbc]):
            # An atom near a face, edge or corner has images on the opposite ones.
            inside = (np.abs(scaled[:, np.array(shift, bool)]) < 0.02).all(1)
            if any(shift):
                copies.append(scaled[inside] + shift)
                species.append(numbers[inside])
        positions, numbers = np.vstack(copies) @ cell, np.concatenate(species)
        corners = np.array(list(product((0, 1), repeat=3)))
        steps = np.eye(3, dtype=int)[atoms.pbc]
        pairs = [(corner, corner + step) for corner in corners for step in steps if (corner + step).max() == 1]
        edges = np.array(pairs, dtype=float) @ cell
    around = edges.reshape(-1, 3) if len(edges) else positions
    centre = (around.max(0) + around.min(0)) / 2 if len(around) else np.zeros(3)
    return (positions - centre) @ turn, numbers, (edges - centre) @ turn


def _draw(ax: Axes, positions: Floats, numbers: NDArray[np.int64], edges: Floats) -> None:
    """Painter's algorithm, far to near."""
    from ase.data.colors import jmol_colors
    from matplotlib.patches import Circle

    radii, depth = _radii(numbers), positions[:, 2]
    for start, end in edges:
        points = start + np.linspace(0, 1, 13)[:, None] * (end - start)
        for a, b in pairwise(points):  # in pieces, so that atoms cover what is behind them
            ax.plot([a[0], b[0]], [a[1], b[1]], color="#9aa1a8", linewidth=0.9, zorder=float(a[2] + b[2]) / 2)
    for i, j in _bonds(positions, numbers):
        middle = (positions[i] + positions[j]) / 2
        for end in (i, j):
            half = np.array([middle, positions[end]])
            order = float(min(depth[i], depth[j])) - 1e-3
            ax.plot(*half[:, :2].T, color="#3c4248", linewidth=4.2, solid_capstyle="round", zorder=order - 1e-3)
            ax.plot(*half[:, :2].T, color=jmol_colors[numbers[end]] * 0.92, linewidth=3.0, solid_capstyle="butt", zorder=order)
    for i in np.argsort(depth):
        colour, order = jmol_colors[numbers[i]], float(depth[i])
        centre = positions[i, 0], positions[i, 1]
        ax.add_patch(Circle(centre, radii[i], facecolor=colour * 0.88, edgecolor=colour * 0.35, linewidth=0.7, zorder=order))
        if len(positions) > MANY_ATOMS:
            continue
        # Three brighter discs towards the light make a ball.
        for k, (size, offset) in enumerate(((0.78, 0.13), (0.5, 0.24), (0.24, 0.34))):
            light = colour + (1 - colour) * (0.18, 0.4, 0.75)[k]
            spot = centre[0] - 0.8 * radii[i] * offset, centre[1] + 0.9 * radii[i] * offset
            above = order + 1e-4 * (k + 1)
            ax.add_patch(Circle(spot, radii[i] * size, facecolor=light, edgecolor="none", alpha=0.5, zorder=above))


#: Elements that form ions or metals rather than bonds: drawn without sticks.
_IONIC = frozenset((3, 4, 11, 12, 19, 20, 37, 38, 55, 56, 87, 88))
_NONMETALS = frozenset((1, 5, 6, 7, 8, 9, 14, 15, 16, 17, 32, 33, 34, 35, 51, 52, 53))


def _bonds(positions: Floats, numbers: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Pairs closer than 1.25 times the sum of their covalent radii, one a non-metal and none an alkali or alkaline earth metal.

    None in large structures, where sticks only confuse.
    """
    from ase.data import covalent_radii

    if len(positions) > MANY_ATOMS:
        return []
    radii = covalent_radii[numbers]
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=2)
    close = (distance < 1.25 * (radii[:, None] + radii[None])) & (distance > 0.1)
    pairs = [(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(close)), strict=True)]
    kinds = [(int(numbers[i]), int(numbers[j])) for i, j in pairs]
    return [pair for pair, kind in zip(pairs, kinds, strict=True) if _NONMETALS & set(kind) and not _IONIC & set(kind)]


# -------------------------------------------------------------------------------------------------------------- relaxations


def relaxation(trace: Sequence[Mapping[str, float | int]], fmax: float | None = None, natoms: int | None = None) -> Figure:
    """Energy above the last step, and the largest force with its threshold, against the step.

    Args:
        trace: `Relaxation.trace`.
        fmax: the threshold, eV/Å.
        natoms: with it, energies are per atom.

    Raises:
        InputError: an empty trace.
    """
    if not trace:
        raise InputError("the trace of the relaxation is empty")
    steps = np.array([row["step"] for row in trace])
    energy = np.array([row["energy"] for row in trace])
    energy = (energy - energy[-1]) / (natoms or 1)
    force = np.array([row["fmax"] for row in trace])
    marker = "o" if len(steps) < 40 else ""
    with style():
        figure = Figure(figsize=(6.8, 2.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(steps, energy, color=COLOURS[0], marker=marker, markersize=3)
        left.set(xlabel="step", title="energy above the last step", ylabel="eV/atom" if natoms else "eV")
        right.plot(steps, force, color=COLOURS[1], marker=marker, markersize=3)
        right.set(xlabel="step", title="largest force", ylabel="eV/Å")
        if (force > 0).all():
            _log_axis(right, np.append(force, fmax or force[-1]))
        if fmax is not None:
            right.axhline(fmax, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
            right.annotate(f"threshold {fmax:g}", (0, fmax), xycoords=("axes fraction", "data"), xytext=(4, 3),
                           textcoords="offset points", ha="left", va="bottom", fontsize=7.5, color="#5c6570")  # fmt: skip
        for ax in (left, right):
            ax.xaxis.get_major_locator().set_params(integer=True)
    return figure
