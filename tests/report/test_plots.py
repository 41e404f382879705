"""What is drawn: axes, units, points; and that matplotlib is left as it was."""

import io

import ase
import matplotlib as mpl
import numpy as np
import pytest
from ase.build import bulk, molecule

from matfound.errors import InputError
from matfound.report import plots
from matfound.report.errors import ErrorTable


def drawn(figure):
    """Its panels, after it has been rendered without complaint."""
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    return [ax for ax in figure.axes if ax.axison]


@pytest.fixture(autouse=True)
def untouched():
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before


HISTORY = [
    {"epoch": 0, "step": 10, "train/loss": 2.0, "lr": 1e-3},
    {"epoch": 0, "step": 10, "val/loss": 3.0, "val/energy_mae": 0.5, "note": "text"},
    {"epoch": 1, "step": 20, "train/loss": 1.0, "lr": 5e-4, "val/loss": None},
    {"epoch": 1, "step": 20, "val/loss": 1.5, "val/energy_mae": float("nan")},
    {"epoch": 2, "step": 30, "train/loss": 0.01, "val/loss": 0.015, "val/energy_mae": 0.01, "lr": ""},
]


def test_curves():
    loss, rate, energy = drawn(plots.curves(HISTORY))
    assert (loss.get_title("left"), rate.get_title("left"), energy.get_title("left")) == ("loss", "learning rate", "energy MAE")
    assert loss.get_yscale() == rate.get_yscale() == energy.get_yscale() == "log"
    assert loss.get_xlabel() == "epoch"
    assert [line.get_label() for line in loss.get_lines()] == ["train", "val"]
    np.testing.assert_array_equal(loss.get_lines()[1].get_xydata(), [[0, 3.0], [1, 1.5], [2, 0.015]])
    np.testing.assert_array_equal(energy.get_lines()[0].get_xydata(), [[0, 0.5], [2, 0.01]])
    assert all("e" not in label.get_text() for label in loss.get_yticklabels())


def test_curves_with_other_names():
    figure = plots.curves([{"step": 5, "train_loss": 1.0, "valid_loss": 2.0, "lr-Adam": 1e-3}, {"step": 6, "train_loss": -1.0}])
    loss, rate = drawn(figure)
    assert loss.get_xlabel() == "step"
    assert [line.get_label() for line in loss.get_lines()] == ["train", "val"]
    assert loss.get_yscale() == "linear", "there is no logarithm of a negative loss"
    assert rate.get_title("left") == "lr-Adam"
    only = drawn(plots.curves([{"train_loss": 1.0}, {"train_loss": 1.1}]))[0]
    np.testing.assert_array_equal(only.get_lines()[0].get_xdata(), [0, 1])
    with pytest.raises(InputError, match="no numbers"):
        plots.curves([{"epoch": 1, "step": 2, "note": "x", "flag": True}])


def table(frames=20, groups=2, natoms=5):
    rng = np.random.default_rng(0)
    found = ErrorTable()
    for i in range(frames):
        forces = rng.normal(size=(natoms, 3))
        found.add("forces", forces, forces + 0.1, natoms=natoms, dataset=f"set {i % groups}")
        found.add("stress", np.eye(3) * 0.01, np.eye(3) * 0.012, natoms=natoms, dataset=f"set {i % groups}")
    return found


def test_parity():
    forces, stress = drawn(plots.parity(table().panels()))
    assert forces.get_xlabel() == "label (eV/Å)"
    assert stress.get_ylabel() == "prediction (eV/Å³)"
    assert forces.get_xlim() == forces.get_ylim()
    assert "MAE 0.100\nRMSE 0.100\n300 values" in [text.get_text() for text in forces.texts]
    assert [text.get_text() for text in forces.get_legend().get_texts()] == ["set 0", "set 1"]
    line = forces.get_lines()[0].get_xydata()
    np.testing.assert_array_equal(line[:, 0], line[:, 1])
    assert sum(len(points.get_offsets()) for points in forces.collections) == 300
    with pytest.raises(InputError, match="nothing to compare"):
        plots.parity([])


def test_parity_of_many_points_is_a_density():
    panels = table(frames=400, groups=1).panels()
    forces = drawn(plots.parity(panels))[0]
    assert forces.collections[0].get_array().sum() > 0
    assert len(forces.collections[0].get_offsets()) < 6000 < len(panels[0].reference) + 1
    assert forces.get_legend() is None


def test_parity_of_many_groups():
    forces = drawn(plots.parity(table(frames=24, groups=12).panels()))[0]
    labels = [text.get_text() for text in forces.get_legend().get_texts()]
    assert len(labels) == 8
    assert labels[-1] == "5 others"


def test_parity_of_one_point_and_of_equal_points():
    found = ErrorTable()
    found.add("gap", 0.0, 0.0, natoms=1)
    low, high = drawn(plots.parity(found.panels()))[0].get_xlim()
    assert low < 0 < high
    found = ErrorTable(max_points=10)
    for _ in range(30):
        found.add("gap", 2.0, 2.5, natoms=1)
    ax = drawn(plots.parity(found.panels()))[0]
    assert "10 of 30 values" in ax.texts[0].get_text()


def circles(ax):
    return [patch for patch in ax.patches if patch.get_edgecolor()[3] > 0]


def test_pictures():
    water, salt = drawn_all(plots.structure([molecule("H2O"), bulk("NaCl", "rocksalt", a=5.6, cubic=True)], ["water", "salt"]))
    assert (water.get_title(), salt.get_title()) == ("water", "salt")
    assert len(circles(water)) == 3
    assert len(water.get_lines()) == 2 * 2 * 2, "two bonds, in halves, with an outline"
    assert len(circles(salt)) == 8 + 6 + 12 + 1, "corners, faces, edges, centre"
    assert len(salt.get_lines()) == 12 * 12, "edges of the cell in pieces, no sticks between ions"
    assert water.get_xlim() == salt.get_xlim(), "one scale"


def drawn_all(figure):
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    return figure.axes


@pytest.mark.parametrize(
    "atoms", [ase.Atoms(), ase.Atoms("H"), molecule("H2"), bulk("Cu") * (5, 5, 20)], ids=["none", "one", "two", "many"]
)
def test_pictures_of_anything(atoms):
    (ax,) = drawn_all(plots.structure(atoms))
    assert len(circles(ax)) >= len(atoms)


def test_picture_of_a_slab_stands_upright():
    slab = bulk("Al", cubic=True)
    slab.center(vacuum=8, axis=2)
    slab.pbc = [True, True, False]
    (ax,) = drawn_all(plots.structure(slab))
    heights = [circle.center[1] for circle in circles(ax)]
    widths = [circle.center[0] for circle in circles(ax)]
    assert len(circles(ax)) == 5 + 4, "periodic in the plane only"
    assert max(heights) - min(heights) < 6
    assert max(widths) - min(widths) > 3
    assert len(ax.get_lines()) == 8 * 12, "no edges across the vacuum"


def test_the_same_molecule_is_seen_from_the_same_side():
    atoms = molecule("CH3CH2OH")
    moved = atoms.copy()
    moved.rattle(0.01, seed=0)
    one, two = drawn_all(plots.structure([atoms, moved]))
    for a, b in zip(circles(one), circles(two), strict=True):
        np.testing.assert_allclose(a.center, b.center, atol=0.1)


def test_relaxation():
    trace = [{"step": i, "energy": -10 + 0.5**i, "fmax": 2 * 0.5**i} for i in range(9)]
    energy, force = drawn(plots.relaxation(trace, 0.05, natoms=2))
    assert energy.get_ylabel() == "eV/atom"
    assert energy.get_lines()[0].get_ydata()[0] == pytest.approx((1 - 0.5**8) / 2)
    assert force.get_yscale() == "log"
    assert force.texts[0].get_text() == "threshold 0.05"
    assert force.get_lines()[1].get_ydata()[0] == 0.05
    energy, force = drawn(plots.relaxation([{"step": 0, "energy": -1.0, "fmax": 0.0}]))
    assert energy.get_ylabel() == "eV"
    assert force.get_yscale() == "linear"
    with pytest.raises(InputError, match="empty"):
        plots.relaxation([])
