"""`evaluate errors` and `predict` of models with groups of labels."""

import csv
import json

import ase.io
import numpy as np
import pytest
import torch
from ase.build import molecule

from matfound import fields
from matfound.cli.main import main
from matfound.data.dataset import Dataset
from matfound.evaluation.errors import evaluate, write
from matfound.models import checkpoint
from matfound.models.base import Potential
from matfound.models.nequip import NequIP
from matfound.nn.heads import BinaryHead, ClassHead, GraphHead, NodeHead
from matfound.structures.atomic_data import AtomicData

NAMES = ("props", "assays", "kinds", "local")


@pytest.fixture
def potential():
    torch.manual_seed(0)
    heads = {
        "props": GraphHead("props", (4,), columns=3),
        "assays": BinaryHead("assays", (4,), columns=30),
        "kinds": ClassHead("kinds", 3, (4,), columns=2),
        "local": NodeHead("local", (4,), columns=2),
    }
    backbone = NequIP(cutoff=3.0, num_layers=1, irreps="4x0e+2x1o", lmax=1, radial_hidden=(4,))
    return Potential(backbone, heads).double().eval()


class Molecules(Dataset):
    """Twelve waters, each a little different, with labels of every group."""

    name = "waters"

    def __len__(self):
        return 12

    def get(self, i):
        rng = np.random.default_rng(i)
        atoms = molecule("H2O")
        atoms.rattle(0.05, seed=i)
        data = AtomicData.from_atoms(atoms)
        data.id = f"water-{i}"
        numbers = rng.normal(size=(1, 3))
        numbers[0, i % 3] = np.nan
        data.props = torch.tensor(numbers)
        data.assays = torch.tensor(rng.integers(-1, 2, (1, 30)))
        data.kinds = torch.tensor(rng.integers(-1, 3, (1, 2)))
        data.local = torch.tensor(rng.normal(size=(3, 2)))
        return data

    def keys(self, name):
        return [name] * 12

    def place(self, i):
        return "waters.csv", i


def test_tables_and_files(potential, tmp_path):
    fields.group("assays", [f"assay-{k}" for k in range(30)], dtype="int64")
    fields.group("props", ["mu", "alpha", "gap"], units=["D", "bohr^3", "Ha"])
    result = evaluate(potential, [Molecules()])
    assert sorted(result.compared) == sorted(NAMES)
    sections = dict(result.sections())
    assert list(sections) == [
        "Overall",
        "Columns of props",
        "Columns of assays, the worst 20 of 30",
        "Columns of kinds",
        "Columns of local",
    ]
    rows = {row["field"]: row for row in sections["Overall"]}
    assert rows["props"]["columns"] == 3 and rows["assays"]["columns"] == 30 and rows["local"]["n"] == 36
    found = [data for i in range(12) if (data := Molecules().get(i)) is not None]
    labels = torch.cat([data.assays for data in found])
    assert rows["assays"]["labels"] == int((labels >= 0).sum())
    paths = write(result, tmp_path, {"model": "m"})
    assert [path.name for path in paths] == ["errors.json", "errors.md", "errors.html", *(f"errors_{name}.csv" for name in NAMES)]
    content = json.loads((tmp_path / "errors.json").read_text())
    assert len(content["columns"]["assays"]) == 30 and "AUROC" in content["conventions"]
    with open(tmp_path / "errors_assays.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 30 and lines[0]["column"] == content["columns"]["assays"][0]["column"]
    assert int(lines[0]["n"]) == int((labels[:, int(lines[0]["column"].partition("-")[2])] >= 0).sum())
    page = (tmp_path / "errors.html").read_text()
    assert "the worst 20 of 30" in page and "props" in page
    assert page.count("data:image/png;base64,") == 1


def test_classes_alone_have_no_parity_plots(potential, tmp_path):
    class Assays(Molecules):
        def get(self, i):
            data = super().get(i)
            for name in ("props", "local", "kinds"):
                del data[name]
            return data

    write(evaluate(potential, [Assays()]), tmp_path, {})
    page = (tmp_path / "errors.html").read_text()
    assert "Parity plots" not in page and "Largest errors" not in page


def test_predict_writes_vectors(potential, tmp_path):
    model = checkpoint.save(potential, tmp_path / "model")
    atoms = molecule("H2O")
    atoms.info["props"] = np.array([1.0, 2.0, 3.0])
    ase.io.write(tmp_path / "in.extxyz", [atoms, molecule("CH4")])
    assert main(["predict", str(tmp_path / "in.extxyz"), str(tmp_path / "out.extxyz"), "--model", str(model)]) == 0
    first, second = ase.io.read(tmp_path / "out.extxyz", ":")
    batch = potential.forward(_sample(potential, atoms))
    np.testing.assert_allclose(first.info["props"], batch["props"][0].numpy(), atol=1e-7)
    np.testing.assert_array_equal(first.info["REF_props"], [1, 2, 3])
    np.testing.assert_allclose(first.info["assays"], torch.sigmoid(batch["assays"][0]).numpy(), atol=1e-7)
    chances = torch.softmax(batch["kinds"][0], -1)
    np.testing.assert_array_equal(first.info["kinds"], chances.argmax(-1).numpy())
    np.testing.assert_allclose(first.info["kinds_probability"], chances.max(-1).values.numpy(), atol=1e-7)
    np.testing.assert_allclose(first.arrays["local"], batch["local"].numpy(), atol=1e-7)
    assert second.arrays["local"].shape == (5, 2) and second.info["assays"].shape == (30,)


def _sample(potential, atoms):
    from matfound.graphs.neighbors import add_graphs
    from matfound.structures.atomic_data import collate

    data = AtomicData.from_atoms(atoms, labels=False)
    data.dataset = torch.tensor([0])
    return collate([add_graphs(data, potential.graphs)])


def test_classes_of_atoms(tmp_path):
    """A group of classes of each atom is two columns of integers and two of probabilities."""
    torch.manual_seed(0)
    backbone = NequIP(cutoff=3.0, num_layers=1, irreps="4x0e", lmax=0, radial_hidden=(4,))
    model = checkpoint.save(Potential(backbone, {"k": ClassHead("kinds", 3, columns=2, level="atom")}), tmp_path / "model")
    ase.io.write(tmp_path / "in.extxyz", molecule("H2O"))
    assert main(["predict", str(tmp_path / "in.extxyz"), str(tmp_path / "out.extxyz"), "--model", str(model)]) == 0
    atoms = ase.io.read(tmp_path / "out.extxyz")
    assert atoms.arrays["kinds"].shape == (3, 2) and atoms.arrays["kinds"].dtype.kind == "i"
    assert ((atoms.arrays["kinds_probability"] > 1 / 3) & (atoms.arrays["kinds_probability"] <= 1)).all()


def test_a_molecule_without_positions(potential):
    class Flat(Molecules):
        def get(self, i):
            data = super().get(i)
            if i == 4:
                del data["pos"]
            return data

    with pytest.raises(
        ValueError, match=r"waters.csv: frame 4: structure 'water-4': the structure has no positions.*--conformers SEED, or conformers:"
    ):
        evaluate(potential, [Flat()])
