import importlib.util
import pickle
import sys

import numpy as np
import pytest
import torch

from matfound import fields
from matfound.data.open import open_dataset
from matfound.data.qm9 import QM9
from matfound.data.tables import open_table
from matfound.errors import InputError
from matfound.units import factor

HEADER = (
    "XYZ_file,Index,SMILES,InChi,N_atoms,Stoichiometry,Elements,XYZ_Ang,Mulliken_pop,Harmonic_Freq_cmi,RotA_GHz,RotB_GHz,RotC_GHz,"
    "Dipole_debye,Polarizability_bohr3,HOMO_au,LUMO_au,HOMO_LUMO_gap_au,R2_bohr2,ZPVE_au,InternalEnergy_0K_au,InternalEnergy_298K_au,"
    "Enthalphy_298K_au,GibbsFreeEnergy_298K_au,Heatcapacity_Cv_cal_mol_K\n"
)
#: Two rows as the package has them (version 1.0.3).
WATER = (
    '"dsgdb9nsd_000003.xyz",3,"O","InChI=1S/H2O/h1H2",3,"[2,0,0,1,0]","[\'O\',\'H\',\'H\']","[[-0.0343604951,0.9775395708,0.0076015923],'
    '[0.0647664923,0.0205721989,0.0015346341],[0.8717903737,1.3007924048,0.0006931336]]","[-0.589706,0.294853,0.294853]",'
    '"[1671.4222,3803.6305,3907.698]",799.58812,437.90386,282.94545,1.8511,6.31,-0.2928,0.0687,0.3615,19.0002,0.021375,-76.404702,'
    "-76.401867,-76.400922,-76.422349,6.002\n"
)
ETHYNE = (
    '"dsgdb9nsd_000004.xyz",4,"C#C","InChI=1S/C2H2/c1-2/h1-2H",4,"[2,2,0,0,0]","[\'C\',\'C\',\'H\',\'H\']","[[0.5995394918,0.,1.],'
    '[-0.5995394918,0.,1.],[-1.6616385861,0.,1.],[1.6616385861,0.,1.]]","[-0.207019,-0.207019,0.207019,0.207019]",'
    '"[549.7648,549.7648,795.2713]",0.,35.6100361,35.6100361,0.,16.28,-0.2845,0.0506,0.3351,59.5248,0.026841,-77.308427,-77.305527,'
    "-77.304583,-77.327429,8.574\n"
)


@pytest.fixture
def npz(shared_data):
    return shared_data / "data" / "molecules" / "qm9_10k_3d_mulliken.npz"


def test_the_values_of_the_file(npz):
    dataset = open_dataset(npz)
    assert isinstance(dataset, QM9)
    assert (len(dataset), dataset.name) == (10000, "qm9")
    with np.load(npz) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    ends = np.cumsum(content["n_atoms"].astype(int))
    for i in (0, 1, 4321, 9999):
        atoms = slice(ends[i] - content["n_atoms"][i], ends[i])
        data = dataset.get(i)
        assert data.numbers.tolist() == content["Z"][atoms].tolist()
        assert data.pos.to(torch.float32).numpy().tobytes() == content["pos"][atoms].tobytes()
        assert data.charges.to(torch.float32).numpy().tobytes() == content["mulliken"][atoms].tobytes()
        assert data.qm9.numpy().tobytes() == content["targets"][i].tobytes()
        assert data.gap.item() == content["targets"][i, 7] * factor("Ha", "eV")
        assert data.dipole_magnitude.item() == content["targets"][i, 3] * factor("D", "e*Å")
        assert "energy" not in data
        assert dataset.frame(i).info == {"gdb_idx": int(content["gdb_idx"][i]), "smiles": str(content["smiles"][i])}
    assert fields.FIELDS["qm9"].columns == tuple(content["target_names"].tolist())
    assert fields.FIELDS["qm9"].column_units[3] == "D"
    assert dataset.sizes().tolist() == content["n_atoms"].tolist()
    assert "zero-point energy" in dataset.note
    assert pickle.loads(pickle.dumps(dataset)).get(9999).id == "qm9_10k_3d_mulliken.npz:9999"


def test_keys_and_slices(npz):
    dataset = QM9(npz, index="100:200:50", keys={"energy": {"key": "u0", "unit": "Ha"}, "gap": None})
    assert len(dataset) == 2
    data = dataset.get(1)
    assert data.energy.item() == data.qm9[0, 10].item() * factor("Ha", "eV")
    assert "gap" not in data
    assert dataset.place(1) == (str(npz), 150)
    assert data.id == "qm9_10k_3d_mulliken.npz:150"
    with pytest.raises(InputError, match="there is no target 'u00' that 'energy' is to be read from"):
        QM9(npz, keys={"energy": {"key": "u00", "unit": "Ha"}})
    with pytest.raises(InputError, match="'charges' is not one number"):
        QM9(npz, keys={"charges": "u0"})


def write(path, **changes):
    arrays = {
        "n_atoms": np.array([2, 1], np.int16), "Z": np.array([8, 1, 2], np.uint8), "pos": np.zeros((3, 3), np.float32),
        "mulliken": np.zeros(3, np.float32), "targets": np.zeros((2, 2)), "target_names": np.array(["mu", "gap"]), "tag": np.arange(2),
    }  # fmt: skip
    arrays["pos"][1, 0] = 1
    np.savez(path, **{name: value for name, value in (arrays | changes).items() if value is not None})
    return path


def test_rows_that_cannot_be_used(tmp_path):
    targets = np.array([[0.5, np.nan], [1.0, 2.0]])
    file = write(tmp_path / "a.npz", targets=targets, mulliken=np.array([0, 0, np.nan], np.float32))
    dataset = QM9(file)
    assert torch.isnan(dataset.get(0).gap).all(), "a missing target is missing"
    with pytest.raises(InputError, match="a.npz: frame 1: 'mulliken' is not finite"):
        dataset.get(1)
    skipping = QM9(file, on_error="skip")
    assert len(skipping) == 1
    assert [(problem.row, problem.reason) for problem in skipping.problems] == [(1, "'mulliken' is not finite")]
    dataset.check_labels()
    with pytest.raises(InputError, match="frame 0: no atoms, or an atomic number outside"):
        QM9(write(tmp_path / "b.npz", Z=np.array([0, 1, 2], np.uint8))).get(0)
    with pytest.raises(InputError, match="frame 0: 'targets' is not finite"):
        QM9(write(tmp_path / "c.npz", targets=np.array([[np.inf, 1], [1, 1]]))).get(0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"pos": None}, "not an .npz of QM9: it has no 'pos'"),
        ({"pos": np.zeros((2, 3), np.float32)}, r"'pos' has shape \(2, 3\), expected 3 rows"),
        ({"pos": np.zeros((3, 2), np.float32)}, "'pos', 'targets' and 'n_atoms' do not fit together"),
        ({"targets": np.zeros((2, 3))}, "do not fit together"),
        ({"n_atoms": np.array([3, 0])}, "do not fit together"),
        ({"Z": np.array([8.0, 1, 2])}, "'Z' has type float64"),
        ({"target_names": np.array(["mu", "gapp"])}, "'gapp' is no target of QM9 .did you mean 'gap'"),
        ({"tag": np.array([{}, {}], object)}, "cannot be read as .npz: Object arrays cannot be loaded"),
    ],
)
def test_damaged_arrays(tmp_path, changes, match):
    with pytest.raises(InputError, match=match):
        QM9(write(tmp_path / "a.npz", **changes))


def test_damaged_files(tmp_path):
    (tmp_path / "a.npz").write_bytes(write(tmp_path / "b.npz").read_bytes()[:-200])
    with pytest.raises(InputError, match="cannot be read as .npz.*fetch the file again"):
        QM9(tmp_path / "a.npz")
    (tmp_path / "c.npz").write_bytes(b"x")
    with pytest.raises(InputError, match="cannot be read as .npz"):
        QM9(tmp_path / "c.npz")
    with pytest.raises(InputError, match="on_error must be"):
        QM9(tmp_path / "b.npz", on_error="ignore")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with the layout of qm9pack, whose code must not run."""
    folder = tmp_path / "site" / "qm9pack"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    for part, row in enumerate([WATER, ETHYNE, WATER], start=1):
        (folder / "data" / f"qm9_part{part}.csv").write_text(HEADER + row)
    monkeypatch.syspath_prepend(folder.parent)
    importlib.invalidate_caches()
    return folder


@pytest.mark.parametrize("name", ["qm9", "qm9pack"])
def test_the_package(package, name):
    dataset = QM9(name, keys={"energy": {"key": "u0", "unit": "Ha"}})
    assert "qm9pack" not in sys.modules
    assert len(dataset) == 3
    data = dataset.get(1)
    assert data.numbers.tolist() == [6, 6, 1, 1]
    assert data.pos.tolist()[0] == [0.5995394918, 0.0, 1.0]
    assert data.charges.tolist() == [-0.207019, -0.207019, 0.207019, 0.207019]
    assert data.gap.item() == 0.3351 * factor("Ha", "eV")
    assert data.energy.item() == -77.308427 * factor("Ha", "eV")
    assert fields.FIELDS["qm9"].columns[:5] == ("A", "B", "C", "mu", "alpha")
    assert data.qm9.tolist()[0][:5] == [0.0, 35.6100361, 35.6100361, 0.0, 16.28]
    info = dataset.frame(0).info
    assert info["SMILES"] == "O"
    assert info["Index"] == 3
    assert "XYZ_Ang" not in info
    assert dataset.place(2) == (str(package / "data" / "qm9_part3.csv"), 0)
    assert dataset.sizes().tolist() == [3, 4, 3]
    assert "no 'energy'" in dataset.note


def test_the_package_is_not_there(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="qm9pack, which is not installed .pip install qm9pack"):
        QM9("qm9pack")


def test_a_table_of_the_package(tmp_path):
    good, elements = tmp_path / "qm9_part1.csv", tmp_path / "elements.csv"
    short = WATER.replace("[0.8717903737,1.3007924048,0.0006931336]", "[1]")
    good.write_text(HEADER + ETHYNE + WATER.replace("1.3007924048", "oops") + short)
    elements.write_text(HEADER + WATER.replace("'O'", "'Ox'"))
    dataset = open_dataset([good])
    assert torch.equal(dataset.get(0).pos, open_table(good).get(0).pos)
    for i, reason in {1: "'XYZ_Ang' is no list of positions", 2: "'XYZ_Ang' has 7 numbers for 3 atoms"}.items():
        with pytest.raises(InputError, match=f"frame {i}: {reason}"):
            dataset.get(i)
    with pytest.raises(InputError, match="'Elements' is .* no list of elements"):
        open_table(elements).get(0)
    problems = QM9([good], on_error="skip").problems
    assert [problem.row for problem in problems] == [1, 2]


def test_a_folder_of_the_package(package):
    """As `matfound data fetch` unpacks it: the table of polarizabilities has no structures."""
    files = [*sorted((package / "data").iterdir()), package / "data" / "qm9_polarizability.csv"]
    files[-1].write_text("XYZ_file,A_xx\nx,1\n")
    assert len(open_table(files)) == len(QM9(files)) == 3
    with pytest.raises(InputError, match="no layout is known with these columns: XYZ_file, A_xx"):
        open_table(files[-1])
