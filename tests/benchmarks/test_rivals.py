"""Benchmarks with rivals: rows, ratios, verdicts and exit codes, with small models in place of the rivals' code, or without it."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from matfound.models.base import Potential
from matfound.models.nequip import NequIP
from matfound.nn.heads import EnergyHead


@pytest.fixture
def family(repo: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/nequip_family.py, with a tiny model for every code but one that is not installed."""
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    module = importlib.import_module("nequip_family")
    codes = importlib.import_module("rivals.codes")
    torch.manual_seed(0)
    backbone = NequIP(3.0, 1, "2x0e", lmax=1, num_basis=2, radial_hidden=(), elements=range(1, 90), self_connection="none")
    potential = Potential(backbone, {"energy": EnergyHead(())})
    potential.heads["energy"].table.reference.zero_()

    def missing() -> None:
        raise ImportError("No module named 'rival'")

    def code() -> object:
        return codes.Ours(potential, torch.device("cpu"), stress=True)

    def exact(*_: object) -> object:
        reference = codes.Ours(potential.double(), torch.device("cpu"), stress=True)
        potential.float()
        return lambda structures: module.on_host(reference.infer(reference.batch(structures))())

    monkeypatch.setattr(module, "makers", lambda *_: {"matfound": code, "e3nn": code, "oeq": missing})
    monkeypatch.setattr(module, "exact", exact)
    return module


def options(out: Path) -> list[str]:
    return ["--device", "cpu", "--models", "sevennet-0", "--sizes", "8", "--batch-atoms", "4", "--seconds", "0", "--out", str(out)]


def test_every_task_is_a_row_with_a_ratio_and_a_verdict(family: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert family.main(options(tmp_path / "out.json")) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    ours = {row["task"]: row for row in rows if row["code"] == "matfound"}
    assert set(ours) == set(family.TASKS)
    assert all(row["ratio"] > 0 and row["agrees"] for row in ours.values())
    assert set(ours["batch"]["differences"]) == {"energy", "forces", "stress"} and ours["train"]["loss"] > 0
    assert [row["skipped"] for row in rows if row["code"] == "oeq"] == ["not installed: No module named 'rival'"]
    assert "sevennet-0, ase: 8 atoms" in capsys.readouterr().out


def test_missing_rivals_can_be_an_error(family: ModuleType, tmp_path: Path) -> None:
    only = ["--tasks", "model", "--only", "matfound", "oeq"]
    assert family.main([*options(tmp_path / "out.json"), *only]) == 0
    assert family.main([*options(tmp_path / "out.json"), *only, "--require-rivals"]) == 1


def test_other_numbers_are_noticed(family: ModuleType) -> None:
    cell = {"task": "model", "atoms": 8, "structures": 1, "host": 1.0}
    rows = [
        cell | {"code": "matfound", "ms": 2.0, "differences": {"energy": [1e-3, 1.0]}},
        cell | {"code": "e3nn", "ms": 4.0, "differences": {"energy": [1e-7, 1.0]}},
        cell | {"code": "oeq", "ms": 3.0, "differences": {"energy": [1e-3, 1.0]}},
    ]
    assert family.judge(rows) == 1
    assert rows[0]["agrees"] is False and rows[0]["ratio"] == 1.5 and "agrees" not in rows[2]


def test_tensor_products_beside_e3nn(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    module = importlib.import_module("tensor_product")
    monkeypatch.setattr(module.timing, "bandwidth", lambda _: 1e10)
    monkeypatch.setitem(module.SPECS, "i", ("2x0e+2x1o", "0e+1o", "0e+1o"))
    only = ["matfound", "matfound, table", "e3nn", "oeq, sorted"]
    out = tmp_path / "out.json"
    assert module.main(["--device", "cpu", "--sizes", "5x20", "--specs", "i", "--only", *only, "--seconds", "0", "--out", str(out)]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert [cell["operation"] for cell in cells] == ["weights", "lengths"]
    for cell in cells:
        rows = {row["implementation"]: row for row in cell["rows"]}
        ours = [row for name, row in rows.items() if name.startswith("matfound")]
        tasks = module.TASKS if cell["operation"] == "weights" else module.TASKS[:2]
        assert len(ours) == (1 if cell["operation"] == "weights" else 2) and all(row["agreement"] < 1e-5 for row in ours)
        assert all(set(module.TASKS) & row.keys() == set(tasks) and row[tasks[0]]["ms"] > 0 for row in ours)
        assert "skipped" in rows["oeq, sorted"]


@pytest.fixture
def gemnet(repo: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/gemnet_oc.py."""
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    return importlib.import_module("gemnet_oc")


def test_gemnet_oc_alone(gemnet: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    options = ["--device", "cpu", "--models", "tiny", "--seconds", "0", "--out", str(out)]
    assert gemnet.main([*options, "--only", "matfound"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["task"] for row in rows] == ["outputs", *gemnet.TASKS]
    assert rows[0]["counts"]["edges"] > 0 and all(error < 1e-5 * size for error, size in rows[0]["off"].values())
    assert all(row["ms"] > 0 for row in rows[1:]) and rows[3]["ops"] > 100 and rows[3]["GFLOP"] > 0
    assert "whole" in capsys.readouterr().out


def test_gemnet_oc_must_be_right_and_fast(gemnet: ModuleType) -> None:
    cell = {"model": "base", "batch": 1}
    off = {"energy": [1e-5, 1.0], "forces": [1e-5, 1.0]}
    theirs = [
        cell | {"code": "fairchem", "task": "outputs", "off": off},
        *(cell | {"code": "fairchem", "task": task, "ms": 4.0, "GiB": 2.0} for task in ("indices", "infer", "train")),
    ]
    good = cell | {"code": "matfound", "task": "outputs", "off": {"energy": [3e-5, 1.0], "forces": [1e-6, 1.0]}}
    ours = [good, *(cell | {"code": "matfound", "task": task, "ms": 2.0, "GiB": 1.0} for task in ("indices", "infer", "train"))]
    assert gemnet.judge([*theirs, *ours]) == 1
    assert [row["good"] for row in ours] == [True, False, True, True]
    ours[3]["GiB"], ours[1]["ms"] = 3.0, 1.0
    good["off"]["forces"] = [1e-4, 1.0]
    assert gemnet.judge([*theirs, *ours]) == 2
    assert [row["good"] for row in ours] == [False, True, True, False]


def test_stand_ins(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    scatter = importlib.import_module("rivals.scatter")
    values, index = torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([0, 2, 2])
    assert scatter.scatter(values, index, dim=0, reduce="mean").tolist() == [[1.0], [0.0], [3.5]]
    assert scatter.segment_coo(values[:, 0], index, dim_size=4).tolist() == [1.0, 0.0, 7.0, 0.0]
    assert scatter.segment_csr(values[:, 0], torch.tensor([0, 1, 1, 3])).tolist() == [1.0, 0.0, 7.0]
    matrix = scatter.SparseTensor(torch.tensor([2, 0, 2]), torch.tensor([1, 3, 0]), torch.tensor([7, 8, 9]), (3, 4))
    rows = matrix[torch.tensor([2, 1, 0, 2])]
    assert [part.tolist() for part in rows.coo()] == [[0, 0, 2, 3, 3], [0, 1, 3, 0, 1], [9, 7, 8, 9, 7]]
    assert rows.sparse_sizes() == (4, 4)
