import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rdkit import Chem

from matfound import fields
from matfound.data import graphium
from matfound.data.datamodule import AtomicDataModule
from matfound.data.dataset import Frame
from matfound.data.merge import merge
from matfound.data.tables import open_table
from matfound.errors import InputError
from matfound.structures.atomic_data import collate
from matfound.units import factor


@pytest.fixture
def molecules(shared_data):
    return shared_data / "data" / "molecules"


def test_qm9(molecules):
    file = molecules / "micro_qm9.csv"
    expected = pd.read_csv(file)
    dataset = open_table(file, keys={"gap": {"key": "gap", "unit": "Ha"}, "dipole_magnitude": {"key": "mu", "unit": "D"}})
    assert fields.FIELDS["qm9"].columns == tuple(graphium.QM9)
    assert fields.FIELDS["qm9"].column_units[3:8] == ("D", "bohr^3", "Ha", "Ha", "Ha")
    values = np.concatenate([found.data.qm9.numpy() for _, found in dataset.scan(0, len(dataset))])
    assert values.tobytes() == expected[list(graphium.QM9)].to_numpy().tobytes()
    frame = dataset.frame(7)
    assert frame.info == expected.loc[7, ["mol_id", "smiles"]].to_dict()
    assert frame.data.gap.item() == expected.gap[7] * factor("Ha", "eV")
    assert frame.data.dipole_magnitude.item() == expected.mu[7] * factor("D", "e*Å")
    assert "1 is active" not in dataset.note
    assert "keys {gap: {key: gap, unit: Ha}}" in dataset.note


def test_the_units_of_atomisation_energies():
    """Of methane's u0_atom in the file: total energy less those of the free atoms, in kcal/mol (QM9's atomic references, Ha)."""
    atoms = -37.846772 + 4 * -0.500273
    assert (-40.47893 - atoms) * factor("Ha", "kcal/mol") == pytest.approx(-395.999594594, abs=0.01)
    assert graphium.QM9["u0_atom"] == "kcal/mol"


def test_tox21(molecules):
    file = molecules / "tox21_7831_chembench.csv.gz"
    expected = pd.read_csv(file)
    dataset = open_table(file)
    assert len(dataset) == 7831
    assert fields.FIELDS["tox21"].columns == graphium.TOX21
    assert fields.FIELDS["tox21"].dtype == "int64"
    want = expected[list(graphium.TOX21)].fillna(-1).to_numpy().astype(np.int64)
    bad = []
    for i, found in dataset.scan(0, 2500):
        if isinstance(found, InputError):
            bad.append(found.frame)
        else:
            assert found.data.tox21.dtype == torch.int64
            assert found.data.tox21.numpy().tobytes() == want[i].tobytes()
    assert bad == [1322, 2290, 2297], "the first three of eight"


def test_zinc(molecules):
    file = molecules / "micro_ZINC.csv"
    expected = pd.read_csv(file)
    dataset = open_table(file)
    values = np.concatenate([dataset.get(i).zinc.numpy() for i in range(0, 1000, 10)])
    assert values.tobytes() == expected[["SA", "logp", "score"]].iloc[:1000:10].to_numpy().tobytes()
    assert np.allclose(values[:, 2], values[:, 1] - values[:, 0], rtol=0, atol=1e-13)
    assert dataset.frame(0).info == {"SMILES": expected.SMILES[0]}


def test_graph_and_node_labels(molecules):
    """Node labels of heavy atoms follow the maps, which do not follow the string."""
    file = molecules / "graphium_fake_multilevel.parquet"
    table = pq.read_table(file)
    dataset = open_table(file)
    assert len(dataset) == 1004
    assert fields.FIELDS["pcqm4m_g25"].columns == ("graph_label",)
    assert fields.FIELDS["pcqm4m_n4"].columns == ("node_label_list", "node_label_np")
    assert fields.FIELDS["pcqm4m_n4"].level == "atom"
    options = Chem.SmilesParserParams()
    options.removeHs = False
    permuted = 0
    for i, found in dataset.scan(0, 1004):
        assert isinstance(found, Frame)
        text = table["ordered_smiles"][i].as_py()
        labels = json.loads(table["node_label_list"][i].as_py())
        maps = [int(part.rpartition(":")[2]) for part in _atoms(text)]
        data = found.data
        assert data.pcqm4m_g25.tolist() == [[table["graph_label"][i].as_py()]]
        expected = [labels[number] if number < len(labels) else None for number in maps]
        assert [None if np.isnan(value) else value for value in data.pcqm4m_n4[:, 0].tolist()] == expected
        assert torch.equal(torch.isnan(data.pcqm4m_n4[:, 0]), data.numbers == 1)
        assert data.numbers.tolist() == [atom.GetAtomicNum() for atom in Chem.MolFromSmiles(text, options).GetAtoms()]
        assert found.info["edge_label_list"] == table["edge_label_list"][i].as_py()
        permuted += maps != sorted(maps)
    assert permuted > 900
    heavy = open_table(file, hydrogens=False)
    for i in range(20):
        assert torch.equal(heavy.get(i).pcqm4m_n4, dataset.get(i).pcqm4m_n4[dataset.get(i).numbers > 1])
    batch = collate([dataset.get(0), open_table(molecules / "micro_ZINC.csv").get(0)])
    assert torch.isnan(batch.pcqm4m_n4[5:]).all()


def _atoms(text):
    return [part.partition("]")[0] for part in text.split("[")[1:]]


@pytest.mark.parametrize("kind", ["list", "large_list", "float32", "json"])
def test_real_lists_in_parquet(tmp_path, kind):
    cells = [[0.1, -0.25], [1.0], None, [], [0.5, 0.5, 0.5], [float("nan"), 2.0]]
    types = {"list": pa.list_(pa.float64()), "large_list": pa.large_list(pa.float64()), "float32": pa.list_(pa.float32())}
    column = pa.array([None if c is None else json.dumps(c) for c in cells]) if kind == "json" else pa.array(cells, types[kind])
    smiles = ["[CH3:1][OH:0]", "C", "CO", "CO", "[C:0]([H:1])([H:2])[H:3]", "CO"]
    pq.write_table(pa.table({"ordered_smiles": smiles, "graph_a": [1.0] * 6, "node_q": column}), tmp_path / "t.parquet")
    dataset = open_table(tmp_path / "t.parquet")
    exact = np.float32(0.1).item() if kind == "float32" else 0.1
    assert dataset.get(0).pcqm4m_n4[:2].tolist() == [[-0.25], [exact]]
    assert dataset.get(1).pcqm4m_n4[:, 0].tolist()[0] == 1.0
    assert torch.isnan(dataset.get(2).pcqm4m_n4).all(), "an empty cell is missing"
    with pytest.raises(InputError, match="frame 3: wrong label length: 0 labels, 2 heavy atoms, 2 atoms"):
        dataset.get(3)
    with pytest.raises(InputError, match="frame 4: wrong label length: 3 labels, 1 heavy atoms, 4 atoms"):
        dataset.get(4)
    assert torch.isnan(dataset.get(5).pcqm4m_n4[0]).all()
    assert dataset.get(5).pcqm4m_n4[1].tolist() == [2.0]


@pytest.mark.parametrize(
    ("cell", "values"),
    [
        ("[1.0, 2.0]", [1.0, 2.0]),
        (" [1,2e-1] ", [1.0, 0.2]),
        ("[1., .5]", [1.0, 0.5]),
        ("[nan, -2]", [None, -2.0]),
        ("[None, 1]", [None, 1]),
    ],
)
def test_lists_as_text(tmp_path, cell, values):
    (tmp_path / "t.csv").write_text(f'ordered_smiles,graph_a,node_q\nCO,1,"{cell}"\n')
    found = open_table(tmp_path / "t.csv").get(0).pcqm4m_n4[:2, 0].tolist()
    assert [None if np.isnan(value) else value for value in found] == values


@pytest.mark.parametrize(
    "cell",
    [
        "[1.0, ..., 2.0]",
        "[1. 2",
        "[1.0 2.0]",
        "[1.0, 2.0",
        "1.0, 2.0",
        "[1.0,, 2.0]",
        "[1.0, x]",
        "[[1.0], [2.0]]",
        "[1_0, 2]",
        "array([1.0, 2.0])",
    ],
)
def test_text_that_is_no_list_is_never_missing_in_silence(tmp_path, cell):
    (tmp_path / "t.csv").write_text(f'ordered_smiles,graph_a,node_q\nCO,1,"{cell}"\nCO,1,"[1.0, 2.0]"\n')
    dataset = open_table(tmp_path / "t.csv")
    with pytest.raises(InputError, match="t.csv: frame 0: 'node_q' is text that is no list of numbers: .* .save lists in Parquet"):
        dataset.get(0)
    assert dataset.get(1).pcqm4m_n4[:2, 0].tolist() == [1.0, 2.0]


def test_other_cells_that_are_no_labels(tmp_path):
    rows = {"ordered_smiles": ["CO", "C"], "graph_a": [1.0, 1.0]}
    pq.write_table(pa.table({**rows, "node_q": [0.5, 1.5]}), tmp_path / "number.parquet")
    with pytest.raises(InputError, match="'node_q' is 0.5, expected a list of numbers"):
        open_table(tmp_path / "number.parquet").get(0)
    pq.write_table(pa.table({**rows, "node_q": [["a", "b"], ["c"]]}), tmp_path / "words.parquet")
    with pytest.raises(InputError, match="expected a list of numbers"):
        open_table(tmp_path / "words.parquet").get(0)
    pq.write_table(pa.table({**rows, "node_q": [[float("inf"), 1.0], [1.0]]}), tmp_path / "infinite.parquet")
    with pytest.raises(InputError, match="'node_q' has an infinite label"):
        open_table(tmp_path / "infinite.parquet").get(0)


def test_classes_of_atoms(tmp_path):
    (tmp_path / "t.csv").write_text('smiles,k\nCO,"[0, 2]"\nCO,"[0, nan]"\nCO,"[0, 3]"\nCO,"[0.5, 1]"\n')
    dataset = open_table(tmp_path / "t.csv", labels={"kind": {"columns": ["k"], "level": "atom", "classes": 3}})
    assert dataset.get(0).kind[:, 0].tolist() == [0, 2, -1, -1, -1, -1]
    assert dataset.get(1).kind[:2, 0].tolist() == [0, -1]
    with pytest.raises(InputError, match="atom 1: 'k' is 3, expected a class, 0 to 2"):
        dataset.get(2)
    with pytest.raises(InputError, match="atom 0: 'k' is 0.5"):
        dataset.get(3)


def test_pcba(tmp_path):
    table = {"SMILES": ["C", "CC", "CCC"], "assayID-1": pa.array([1, None, 0], pa.int8()), "assayID-20": [1.0, 0.0, 2.0]}
    pq.write_table(pa.table(table), tmp_path / "PCBA.parquet")
    dataset = open_table(tmp_path / "PCBA.parquet")
    assert fields.FIELDS["pcba_1328"].columns == ("assayID-1", "assayID-20")
    assert [dataset.get(i).pcba_1328.tolist() for i in range(2)] == [[[1, 1]], [[-1, 0]]]
    with pytest.raises(InputError, match="'assayID-20' is 2, expected a class, 0 or 1"):
        dataset.get(2)


@pytest.mark.parametrize(("file", "name"), [("LINCS_L1000_VCAP_0-2_th2.csv", "l1000_vcap"), ("mcf7.csv", "l1000_mcf7"), ("x.csv", "l1000")])
def test_l1000(tmp_path, file, name):
    (tmp_path / file).write_text("SMILES,geneID-780,geneID-7849\nC,0,2\nCC,,1.0\nCCC,3,1\n")
    dataset = open_table(tmp_path / file)
    assert [dataset.get(i)[name].tolist() for i in range(2)] == [[[0, 2]], [[-1, 1]]]
    with pytest.raises(InputError, match="'geneID-780' is 3, expected a class, 0 to 2"):
        dataset.get(2)


def test_a_joined_table_has_all_groups(tmp_path):
    names = [*graphium.ZINC, *graphium.TOX21]
    (tmp_path / "t.csv").write_text(f"smiles,{','.join(names)}\nC,{','.join(['1'] * len(names))}\n")
    data = open_table(tmp_path / "t.csv").get(0)
    assert data.zinc.shape == (1, 3)
    assert data.tox21.shape == (1, 12)


def test_two_tables_with_other_columns_of_one_group(tmp_path):
    for number in (1, 2):
        columns = ",".join(f"assayID-{number}{k}" for k in range(number))
        (tmp_path / f"{number}.csv").write_text(f"SMILES,{columns}\nC{',1' * number}\nCC{',0' * number}\n")
    one, two = (open_table(tmp_path / f"{number}.csv", name=f"set{number}") for number in (1, 2))
    assert [reader.get(0).pcba_1328.tolist() for reader in (one, two, one)] == [[[1]], [[1, 1]], [[1]]]
    assert one.batch([0, 1]).pcba_1328.shape == (2, 1) and two.batch([0, 1]).pcba_1328.shape == (2, 2)
    problem = r"the group 'pcba_1328' has 1 columns in the dataset 'one', and other ones \(2\) in 'two' \(give one of them another name"
    with pytest.raises(InputError, match=problem):
        AtomicDataModule({"one": one, "two": two}, batch_size=1)
    with pytest.raises(InputError, match="the group 'pcba_1328' has 1 columns in the dataset 'one "):
        merge([one, two])
    assert AtomicDataModule({"two": two}, batch_size=1).readers == {"two": two}
    other = open_table(tmp_path / "2.csv", labels={"assays": {"columns": ["assayID-*"], "classes": 2}})
    assert other.get(0).assays.tolist() == [[1, 1]]
    assert AtomicDataModule({"two": two, "other": other}, batch_size=1).readers["other"] is other
