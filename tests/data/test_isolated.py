"""Isolated atoms among structures, in files of their own and on the command line."""

from pathlib import Path

import ase
import ase.io
import pytest
from ase.calculators.singlepoint import SinglePointCalculator

from matfound.data.isolated import energies, is_isolated, merged, read
from matfound.data.open import open_dataset
from matfound.errors import InputError
from matfound.structures.atomic_data import AtomicData


def atom(symbol: str, energy: float | None = None, **info: object) -> ase.Atoms:
    atoms = ase.Atoms(symbol)
    atoms.info.update(info)
    if energy is not None:
        atoms.calc = SinglePointCalculator(atoms, energy=energy)
    return atoms


@pytest.fixture
def write(tmp_path: Path):
    def make(*frames: ase.Atoms, name: str = "atoms.extxyz") -> str:
        ase.io.write(tmp_path / name, frames, format="extxyz")
        return str(tmp_path / name)

    return make


def test_what_is_isolated() -> None:
    def kind(atoms: ase.Atoms) -> bool:
        return is_isolated(AtomicData.from_atoms(atoms))

    boxed = ase.Atoms("H", cell=[20, 20, 20], pbc=True)
    assert kind(atom("H")) and not kind(boxed) and not kind(ase.Atoms("H2", [[0, 0, 0], [0, 0, 1]]))
    for name in ("IsolatedAtom", "isolated_atom", "isolated atom", "Isolated-Atom"):
        boxed.info["config_type"] = name
        assert kind(boxed)
    boxed.info["config_type"] = "bulk"
    assert not kind(boxed)
    assert not kind(atom("Na", charge=1.0))


def test_energies_of_frames(write) -> None:
    dataset = open_dataset(write(atom("H", -13.6), atom("C", -1029.0), atom("H", -13.6)))
    assert energies(dataset, [0, 1, 2]) == {"H": -13.6, "C": -1029.0}
    assert energies(dataset, []) == {}


def test_what_frames_must_have(write) -> None:
    dataset = open_dataset(write(atom("H", -13.6), atom("H", -12.0)))
    with pytest.raises(InputError, match=r"frame 1: the isolated H atom has -12\.0+ eV, another one -13\.60+ eV"):
        energies(dataset, [0, 1])
    dataset = open_dataset(write(atom("H", -13.6), atom("C")), allow_missing=True)
    with pytest.raises(InputError, match="frame 1: the isolated C atom has no energy"):
        energies(dataset, [0, 1])


def test_reading(write) -> None:
    assert read("H=-13.6, C = -1029.5,") == {"H": -13.6, "C": -1029.5}
    assert read(write(atom("H", -13.6), atom("O", -2040.0))) == {"H": -13.6, "O": -2040.0}
    assert read(write(atom("H", REF=-0.5)), keys={"energy": {"key": "REF", "unit": "Ha"}})["H"] == pytest.approx(-13.6057, abs=1e-4)


def test_the_acac_file(shared_data: Path) -> None:
    assert set(read(str(shared_data / "data/acac/isolated_atoms.xyz"))) == {"H", "C", "O"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hh=-13.6", "no element 'Hh'"),
        ("X=1", "no element 'X'"),
        ("H=low", "'low' is no energy"),
        ("H=", "'' is no energy"),
        ("nowhere.xyz", "nowhere.xyz"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(text)


def test_molecules_are_no_isolated_atoms(write) -> None:
    molecule = ase.Atoms("H2", [[0, 0, 0], [0, 0, 0.7]])
    molecule.calc = SinglePointCalculator(molecule, energy=-31.0)
    with pytest.raises(InputError, match="frame 1: a structure of 2 atoms"):
        read(write(atom("H", -13.6), molecule))


def test_several_sources() -> None:
    assert merged(("a", {"H": -13.6}), ("b", {}), ("c", {"H": -13.6, "O": 1.0})) == {"H": -13.6, "O": 1.0}
    with pytest.raises(InputError, match=r"isolated H atom has -13\.6\d+ eV by the file, -12\.0\d+ eV by --isolated-atoms"):
        merged(("the file", {"H": -13.6}), ("--isolated-atoms", {"H": -12.0}))


def test_labels_of_the_other_frames(write) -> None:
    frames = [atom("H", -13.6), ase.Atoms("H2", [[0, 0, 0], [0, 0, 0.7]]), ase.Atoms("H2", [[0, 0, 0], [0, 0, 0.8]])]
    for molecule in frames[1:]:
        molecule.calc = SinglePointCalculator(molecule, energy=-31.0, forces=molecule.positions)
    dataset = open_dataset(write(*frames), allow_missing=True)
    dataset.check_labels([1, 2])
    with pytest.raises(InputError, match=r"frame 0: label 'forces' is missing, but 2 of 3 frames of the file have it .*--allow-missing"):
        dataset.check_labels([0, 1, 2])
