"""Replayed calculations and relaxations equal the ordinary ones: on a CPU by the same code without a graph, on a GPU with it."""

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.constraints import FixAtoms
from ase.io import read

from matfound import Calculator, relax
from matfound.errors import InputError
from matfound.inference import fire, replay
from matfound.inference import relax as relaxing
from matfound.models.base import Potential, Statistics
from matfound.models.mace import MACE, MACEEnergyHead
from matfound.models.nequip import NequIP
from matfound.nn.heads import EnergyHead, GraphHead
from matfound.ops import backends

ELEMENTS = (1, 6, 8, 14)
# fmt: off
MODELS: dict[str, Any] = {
    "nequip": lambda: NequIP(cutoff=3.5, num_layers=2, irreps="8x0e+4x1o", lmax=1, radial_hidden=(8,), elements=ELEMENTS),
    "sevennet": lambda: NequIP(
        cutoff=3.5, num_layers=2, irreps="4x0e+4x1e", lmax=1, radial_hidden=(8,), symmetry="SE3", envelope="xplor", modalities=[0, 1],
        elements=ELEMENTS, self_connection="elements",
    ),
    "mace": lambda: MACE(cutoff=3.5, irreps="4x0e+4x1o", lmax=1, degree=2, num_basis=4, radial_hidden=(8,), elements=ELEMENTS),
    "mace, dense": lambda: MACE(
        cutoff=3.5, irreps="4x0e", lmax=1, degree=2, num_basis=4, radial_hidden=(8,), elements=ELEMENTS, density=True, transform="agnesi",
        pair_repulsion=True,
    ),
}
# fmt: on


def potential(name: str = "nequip", dtype: torch.dtype = torch.float64) -> Potential:
    """Untrained, two levels of theory, with scales that make forces of about 1 eV/Å."""
    torch.manual_seed(0)
    energy = MACEEnergyHead(2, (8,)) if name.startswith("mace") else EnergyHead((8,))
    model = Potential(MODELS[name](), {"energy": energy, "gap": GraphHead("gap", (8,))}, ("a", "b"), {"periodic": "a", "molecular": "b"})
    references = torch.full((2, 119), torch.nan, dtype=torch.float64)
    references[:, list(ELEMENTS)] = torch.tensor([-3.0, -5.0, -4.0, -5.4], dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    model.fit_scales(Statistics(["a", "b"], references, {"energy": ones, "forces": 3 * ones, "gap": ones}, {"gap": ones}, {"main": 15.0}))
    return model.to(dtype).eval()


def silicon(repeat: int = 1, seed: int = 0) -> ase.Atoms:
    atoms = bulk("Si", cubic=True) * (repeat, 1, 1)
    atoms.rattle(0.1, seed=seed)
    return atoms


def same(mine: Calculator, other: Calculator, atoms: ase.Atoms, tolerance: float) -> None:
    """Both give the same for a structure."""
    results = []
    for calculator in (mine, other):
        atoms.calc = calculator
        atoms.get_potential_energy()
        results.append(dict(calculator.results))
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        scale = max(1e-3, float(np.abs(expected).max(initial=0.0)))
        np.testing.assert_allclose(results[0][name], expected, rtol=0, atol=tolerance * scale, err_msg=name)


def walk(atoms: ase.Atoms, steps: int, seed: int = 0) -> Iterator[ase.Atoms]:
    """A structure that moves, so that its pairs have to be searched several times, and that is strained, wrapped and squeezed."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        atoms.positions += rng.normal(0, 0.04, atoms.positions.shape)
        if atoms.cell.volume > 0 and step % 4 == 3:
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + rng.normal(0, 0.004, (3, 3))), scale_atoms=bool(step % 8 == 3))
        if atoms.pbc.any() and step == 6:
            atoms.wrap()
        if step == steps // 2:
            atoms.set_cell(atoms.cell.array * 0.8, scale_atoms=True)
            if not atoms.cell.volume:
                atoms.positions *= 0.8
        yield atoms


# ------------------------------------------------------------------------------------------------------------ calculations


@pytest.mark.parametrize("name", MODELS)
def test_a_trajectory(name: str) -> None:
    model = potential(name)
    mine, other = Calculator(model, replay=True, skin=0.4), Calculator(model, replay=False)
    for atoms in walk(silicon(), 16):
        same(mine, other, atoms, 1e-12)
    assert mine.replay is not None and other.replay is None
    assert mine.replay.recorded == 2, "one program, and another when the crystal had been squeezed"
    assert 3 <= mine.replay.searches < 8


def slab() -> ase.Atoms:
    atoms = bulk("Si", cubic=True)
    atoms.center(vacuum=5.0, axis=2)
    atoms.pbc = [True, True, False]
    return atoms


@pytest.mark.parametrize(
    "atoms",
    [
        molecule("CH3OH"),
        ase.Atoms("O", [[1.0, 2.0, 3.0]]),
        ase.Atoms("Si", cell=np.full((3, 3), 2.7) - 2.7 * np.eye(3), pbc=True),
        ase.Atoms("OC", [[0, 0, 0], [30.0, 0, 0]]),
        slab(),
        ase.Atoms("CO", [[0, 0, 0], [1.4, 0.3, 0]], cell=[2.9, 0, 0], pbc=[True, False, False]),
    ],
    ids=["molecule", "one atom", "one atom of a crystal", "no edges", "slab", "chain"],
)
def test_other_structures(atoms: ase.Atoms) -> None:
    model = potential("mace, dense")
    mine, other = Calculator(model, replay=True), Calculator(model, replay=False)
    for moved in walk(atoms.copy(), 10):
        same(mine, other, moved, 1e-12)
    assert mine.replay.searches >= 1
    if not atoms.pbc.any():
        with pytest.raises(PropertyNotImplementedError, match="stress needs a lattice"):
            mine.get_property("stress", atoms)


def test_other_atoms_take_the_program_over() -> None:
    """With as many atoms and no more pairs; levels of theory and elements are read, not recorded."""
    model = potential("sevennet")
    mine, other = Calculator(model, replay=True), Calculator(model, replay=False)
    first, second = silicon(), silicon(seed=5)
    second.numbers[:4] = 8
    third = silicon()
    third.info["head"] = "b"
    second.set_cell(second.cell.array * 1.05, scale_atoms=True)
    for atoms in (first, second, third, first, silicon(2), first):
        same(mine, other, atoms, 1e-12)
    assert mine.replay.recorded == 3, "8 atoms, 16, and 8 again: one is kept"
    assert mine.replay.program.atoms == 8


def test_a_calculator_is_patient() -> None:
    """Single points are left as they are; what is the same atoms for the third time is recorded."""
    calculator = Calculator(potential())
    assert calculator.replay is None, "not on a CPU"
    calculator.replay = replay.Replay(calculator.potential)
    rng = np.random.default_rng(0)
    for step, (size, recorded) in enumerate([(1, 0), (2, 0), (1, 0), (1, 0), (1, 1), (1, 1), (2, 1), (1, 1)]):
        atoms = silicon(size)
        atoms.positions += rng.normal(0, 0.01, atoms.positions.shape)
        atoms.calc = calculator
        atoms.get_forces()
        assert calculator.replay.recorded == recorded, step
    calculator.replay = replay.Replay(calculator.potential, max_edges=10)
    for _ in range(4):
        atoms.positions += 0.01
        atoms.get_forces()
    assert calculator.replay.recorded == 0 and calculator.replay.searches == 1


def test_models_that_cannot(morse: Any) -> None:
    assert not replay.is_possible(morse.potential()), "its pairs go on beyond the cutoff"
    with pytest.raises(InputError, match="cannot be replayed"):
        Calculator(morse.potential(), replay=True)
    assert replay.is_possible(potential())
    limited = potential()
    limited.backbone.graphs = {"main": type(limited.graphs["main"])(3.5, max_neighbors=5)}
    assert not replay.is_possible(limited)


def test_errors_stay_what_they_are() -> None:
    calculator = Calculator(potential(), replay=True)
    for atoms in (silicon(), silicon()):
        atoms.calc = calculator
        atoms.get_potential_energy()
    atoms.positions[3] = atoms.positions[2] + [1e-5, 0, 0]
    with pytest.raises(InputError, match="atoms 2 and 3 are in the same place"):
        atoms.get_forces()
    atoms.positions[3] = np.nan
    with pytest.raises(InputError, match="not finite"):
        atoms.get_forces()
    atoms.positions[3] = atoms.positions[2] + [0, 0, 2.2]
    atoms.numbers[0] = 79
    with pytest.raises(InputError, match="has not seen the element Au"):
        atoms.get_forces()
    atoms.positions[0] += 0.01
    with pytest.raises(InputError, match="has not seen the element Au"):
        atoms.get_forces()
    other = silicon(seed=3)
    other.positions[0] = np.nan
    other.pbc = [True, True, False]
    other.calc = calculator
    with pytest.raises(InputError, match="not finite"):
        other.get_forces()
    other.positions[:] = silicon().positions
    same(calculator, Calculator(calculator.potential, replay=False), other, 1e-12)
    atoms.numbers[0] = 14
    same(calculator, Calculator(calculator.potential, replay=False), atoms, 1e-12)


def test_a_failing_record_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(replay, "recorded", fail)
    calculator = Calculator(potential(), replay=True)
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            same(calculator, Calculator(calculator.potential, replay=False), silicon(seed=seed), 0.0)
    assert [record.message for record in caplog.records] == [
        "matfound: this model cannot be replayed on the GPU (operation not permitted when stream is capturing); it runs without"
    ]


def test_copies_record_for_themselves() -> None:
    calculator = Calculator(potential(), replay=True)
    atoms = silicon()
    atoms.calc = calculator
    energy = atoms.get_potential_energy()
    for other in (copy.deepcopy(calculator), pickle.loads(pickle.dumps(calculator))):
        assert other.replay.program is None
        atoms.calc = other
        atoms.positions[0] += 1e-9
        assert atoms.get_potential_energy() == pytest.approx(energy)
        assert other.replay.potential is other.potential


@pytest.mark.parametrize("name", MODELS)
def test_nothing_waits_for_the_gpu(name: str, watch: Any) -> None:
    calculator = Calculator(potential(name), replay=True)
    backends.choose(calculator.potential, "reference")
    relaxation = None
    for cell in (False, True):
        assert calculator.take(silicon())
        relaxation = fire.ReplayedFIRE(calculator.replay, torch.arange(8) < 3, cell=cell, fmax=0.01, max_steps=3)
        list(relaxation)
        program = calculator.replay.program
        with torch.no_grad(), watch:
            program.compute()
            relaxation._follow(program)
        assert watch.found == []


def test_what_is_recorded_may_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is really compiled is in `test_the_benchmark`, since checks of arguments are in its way."""
    seen: list[set[str]] = []

    def as_it_is(function: Any, **_: Any) -> Any:
        return lambda model, tensors: seen.append(set(tensors)) or function(model, tensors)

    monkeypatch.setattr(torch, "compile", as_it_is)
    model = potential()
    mine, other = Calculator(model, replay=True, compile=True), Calculator(model, replay=False)
    for atoms in walk(silicon(), 4):
        same(mine, other, atoms, 1e-12)
    assert len(seen) >= 3 and all({"edge_vectors", "edge_rows", "edge_perm"} <= names for names in seen)


@pytest.mark.parametrize(
    "options",
    [
        ("--device", "cpu", "--model", "nequip-tiny", "--modes", "ordinary", "replay", "--repeats", "3", "--relax-steps", "2"),
        pytest.param(("--device", "cuda", "--model", "nequip-tiny"), marks=[pytest.mark.gpu, pytest.mark.slow]),
    ],
    ids=["cpu", "gpu"],
)
def test_the_benchmark(repo: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    file = tmp_path / "replay.json"
    command = [sys.executable, str(repo / "benchmarks" / "replay.py"), "--sizes", "8", *options, "--out", str(file)]
    paths = os.pathsep.join(filter(None, [str(repo), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == (2 if "cpu" in options else 4)
    assert all(row["median_ms"] > 0 and row["relax_ms"] > 0 and row["force_difference"] < 1e-3 for row in rows)


# ------------------------------------------------------------------------------------------------------------- relaxations


@pytest.mark.parametrize(("cell", "fixed"), [(False, True), (True, False), (True, True)], ids=["fixed", "cell", "cell, fixed"])
def test_steps_are_those_of_ase(cell: bool, fixed: bool, tmp_path: Path) -> None:
    model = potential()
    atoms = silicon()
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + np.random.default_rng(1).normal(0, 0.02, (3, 3))), scale_atoms=True)
    if fixed:
        atoms.set_constraint([FixAtoms([1, 5]), FixAtoms([6])])
    options: dict[str, Any] = {"cell": cell, "fmax": 1e-3, "max_steps": 50}
    calculator = Calculator(model, replay=True)
    ours = relax(atoms, calculator, **options, trajectory=tmp_path / "ours.traj")
    ase_s = relax(atoms, Calculator(model, replay=False), **options, trajectory=tmp_path / "ase.traj")
    assert ours.steps == ase_s.steps and ours.converged == ase_s.converged and ours.num_fixed == ase_s.num_fixed
    assert len({step["fmax"] > 0.1 for step in ours.trace}) == 2, "it got somewhere"
    for mine, theirs in zip(ours.trace, ase_s.trace, strict=True):
        assert mine.keys() == theirs.keys()
        assert [mine[key] for key in mine] == pytest.approx([theirs[key] for key in mine], abs=1e-9)
    frames = [read(tmp_path / f"{name}.traj", ":") for name in ("ours", "ase")]
    for mine, theirs in zip(*frames, strict=True):
        np.testing.assert_allclose(mine.positions, theirs.positions, atol=1e-9)
        np.testing.assert_allclose(mine.cell.array, theirs.cell.array, atol=1e-9)
        np.testing.assert_allclose(mine.get_forces(), theirs.get_forces(), atol=1e-9)
    assert {key: value for key, value in ours.after.items() if key != "space_group"} == pytest.approx(
        {key: value for key, value in ase_s.after.items() if key != "space_group"}, abs=1e-9
    )
    np.testing.assert_allclose(ours.atoms.get_stress(), ase_s.atoms.get_stress(), atol=1e-9)
    assert calculator.replay.searches < 10, "one calculation a step"


def test_a_relaxation_in_between() -> None:
    """Of other atoms, as many: what was calculated before goes on as it was."""
    calculator = Calculator(potential(), replay=True)
    atoms, other = silicon(), silicon(seed=4)
    other.numbers[:2] = 8
    same(calculator, Calculator(calculator.potential, replay=False), atoms, 1e-12)
    relax(other, calculator, max_steps=2)
    atoms.positions[0, 0] += 0.1
    same(calculator, Calculator(calculator.potential, replay=False), atoms, 1e-12)
    assert calculator.take(other)
    atoms.positions[0, 0] += 0.1
    same(calculator, Calculator(calculator.potential, replay=False), atoms, 1e-12)


def test_a_relaxation_that_outgrows_its_program() -> None:
    """The lattice shrinks: more pairs, new programs, and the optimiser goes on as if nothing had happened."""
    model = potential()
    atoms = silicon()
    atoms.set_cell(atoms.cell.array * 1.25, scale_atoms=True)
    calculator = Calculator(model, replay=True, skin=0.2)
    options: dict[str, Any] = {"cell": True, "fmax": 0.01, "max_steps": 40}
    ours, ase_s = (relax(atoms, one, **options) for one in (calculator, Calculator(model, replay=False)))
    assert [step["energy"] for step in ours.trace] == pytest.approx([step["energy"] for step in ase_s.trace], abs=1e-9)
    assert calculator.replay.searches > 1


def test_what_ase_does_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    monkeypatch.setattr(fire.ReplayedFIRE, "__iter__", lambda _: used.append(1) or iter(()))
    calculator = Calculator(potential(), replay=True)
    atoms = silicon()
    relax(atoms, calculator, optimizer="LBFGS", max_steps=2)
    relax(atoms, calculator, max_steps=0)
    relax(atoms, calculator, fmax=1e3)
    relax(atoms, Calculator(calculator.potential), max_steps=2)
    assert not used


def test_a_relaxation_that_runs_away() -> None:
    calculator = Calculator(potential(), replay=True)
    calculator.potential.heads["energy"].table.scale *= 1e6
    with pytest.raises(InputError, match="ran away at step 0: the largest force"):
        relax(silicon(), calculator)
    calculator.potential.heads["energy"].table.scale *= torch.nan
    with pytest.raises(InputError, match="not finite"):
        relax(silicon(), calculator)


def test_matrix_exponential() -> None:
    torch.manual_seed(0)
    log, g = 0.4 * torch.randn(3, 3, dtype=torch.float64), 100 * torch.randn(3, 3, dtype=torch.float64)
    torch.testing.assert_close(fire.exponential(log), torch.linalg.matrix_exp(log), rtol=1e-13, atol=1e-14)
    leaf = log.clone().requires_grad_()
    (expected,) = torch.autograd.grad((torch.linalg.matrix_exp(leaf) * g).sum(), leaf)
    torch.testing.assert_close(fire.exponential_adjoint(log, g), expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------------- on a GPU


def trajectory(model: Potential, **options: Any) -> tuple[Calculator, list[dict[str, Any]]]:
    """Results along a walk."""
    calculator = Calculator(model, device="cuda", **options)
    found = []
    for atoms in walk(silicon(2), 24):
        atoms.calc = calculator
        atoms.get_potential_energy()
        found.append(dict(calculator.results))
    return calculator, found


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["float64", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_graphs_on_a_gpu(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = potential(name, dtype)
    _, expected = trajectory(model, replay=False)
    calculator, first = trajectory(model, replay=True)
    _, second = trajectory(model, replay=True)
    _, by_itself = trajectory(model)
    assert not calculator.replay.failed and calculator.replay.recorded == 2
    for results in (first, by_itself):
        for mine, theirs in zip(results, expected, strict=True):
            for key, value in theirs.items():
                # The dense model has forces of 20 eV/Å, which cancel.
                scale = max(1.0, float(np.abs(value).max())) * (10 if name == "mace, dense" else 1)
                np.testing.assert_allclose(mine[key], value, rtol=0, atol=tolerance * scale, err_msg=key)
    for one, other in zip(first, second, strict=True):
        for key, value in one.items():
            np.testing.assert_array_equal(value, other[key], err_msg=f"{key} differs between two runs")


@pytest.mark.gpu
def test_a_graph_is_used_by_itself_and_given_back() -> None:
    model = potential()
    calculator, _ = trajectory(model)
    assert calculator.replay.recorded >= 1 and not calculator.replay.failed
    torch.cuda.synchronize()
    del calculator
    before = torch.cuda.memory_allocated()
    calculator, _ = trajectory(model)
    used = torch.cuda.memory_allocated() - before
    for repeat in (3, 1, 2, 4, 1):
        atoms = silicon(repeat)
        atoms.calc = calculator
        for _ in range(4):
            atoms.positions += np.random.default_rng(0).normal(0, 0.01, atoms.positions.shape)
            atoms.get_forces()
    assert calculator.replay.recorded >= 5
    assert torch.cuda.memory_allocated() - before < 3 * used + 2**22, "programs of other structures are kept"


@pytest.mark.gpu
@pytest.mark.parametrize("cell", [False, True], ids=["atoms", "cell"])
def test_relaxation_on_a_gpu(cell: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaxing, "MAX_ATOMS_SYMMETRY", 0)  # which needs all of pymatgen
    model = potential("mace, dense")
    atoms = silicon()
    atoms.set_constraint(FixAtoms([2]))
    calculator = Calculator(model, device="cuda")
    options: dict[str, Any] = {"cell": cell, "fmax": 0.005, "max_steps": 50}
    ours = relax(atoms, calculator, **options)
    theirs = relax(atoms, Calculator(model, replay=False), **options)
    assert calculator.replay.recorded >= 1 and not calculator.replay.failed
    assert ours.steps == theirs.steps
    np.testing.assert_allclose(ours.atoms.positions, theirs.atoms.positions, atol=1e-7)
    np.testing.assert_allclose(ours.atoms.cell.array, theirs.atoms.cell.array, atol=1e-7)
