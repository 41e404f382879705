"""Compiled potentials: the same numbers, forces and gradients of a loss on forces included.

What is really compiled runs in a process of its own: the checks of arguments that tests add to every function are in torch.compile's way.
"""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from matfound.errors import InputError
from matfound.inference.calculator import Calculator
from matfound.models import compiled
from matfound.models.base import Potential
from matfound.models.nequip import NequIP
from matfound.nn.heads import EnergyHead
from matfound.structures.atomic_data import AtomicData, collate
from matfound.tasks.multitask import MultiTask
from matfound.tasks.target import Target
from matfound.testing import prepare, random_crystal


def potential() -> Potential:
    torch.manual_seed(0)
    made = Potential(NequIP(3.5, 1, "4x0e", lmax=1, num_basis=2, radial_hidden=(), elements=(8, 12, 22)), {"energy": EnergyHead()})
    made.heads["energy"].table.reference.zero_()
    return made.double()


def batch_of(model: Potential, *natoms: int) -> AtomicData:
    return collate([prepare(model, random_crystal(n, n)) for n in natoms])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what the "compiled" function was called with; it is not compiled."""
    found: list[str] = []

    def as_it_is(function, **options):
        assert options["fullgraph"] and options["dynamic"]

        def run(model, tensors):
            assert torch._dynamo.config.trace_autograd_ops
            found.append(",".join(sorted(tensors)))
            return function(model, tensors)

        return run

    monkeypatch.setattr(torch, "compile", as_it_is)
    return found


def test_what_goes_through_the_compiled_function(calls: list[str]) -> None:
    model = potential().train()
    eager = copy.deepcopy(model)
    assert model.compile()
    batch = batch_of(model, 5, 7)
    batch.energy = torch.zeros(2, dtype=torch.float64)
    model(batch)
    assert not calls, "the first batch gives operations their constants"
    predictions, expected = model(batch), eager(batch)
    assert len(calls) == 1 and "edge_vectors" in calls[0] and "energy" not in calls[0], "labels are no inputs"
    for name, value in expected.items():
        assert torch.equal(predictions[name], value)
    predictions["forces"].square().sum().backward()
    expected["forces"].square().sum().backward()
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad))
    model.eval()
    with torch.no_grad():
        assert not any(value.requires_grad for value in model(batch).values())
    assert len(calls) == 2


def test_sizes_that_are_not_worth_it(calls: list[str]) -> None:
    model = potential().eval()
    model.compile()
    model(batch_of(model, 5))
    for natoms in (0, 1):
        few = batch_of(model, natoms)
        assert model(few)["forces"].shape == (natoms, 3)
    assert not calls
    model.float()
    model(batch_of(model, 5))
    assert not calls, "the first batch of another type"


def test_copies_compile_for_themselves() -> None:
    model = potential()
    model.compile("eager")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin._forward.backend == "eager" and twin._forward.function is not model._forward.function
        assert twin.state_dict().keys() == model.state_dict().keys() == potential().state_dict().keys()
        assert twin.config == potential().config


def test_old_versions_of_torch_run_eagerly_and_say_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compiled, "is_possible", lambda: False)
    model = potential()
    assert not model.compile() and model._forward is None
    assert "cannot compile derivatives" in caplog.text


def test_models_that_cannot_be_compiled_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_):
        raise torch._dynamo.exc.Unsupported("call of something strange\nand more")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    model = potential()
    model.compile()
    batch = batch_of(model, 5)
    model(batch)
    with pytest.raises(InputError, match=r"cannot be compiled: call of something strange \(use it without compile\)"):
        model(batch)


def test_switches() -> None:
    assert Calculator(potential(), compile=True).potential._forward is not None
    assert Calculator(potential()).potential._forward is None
    task = MultiTask(potential(), [Target("energy")], compile=True)
    assert task.potential._forward is not None and not any("_compiled" in name for name in task.state_dict())


def run(repo: Path, folder: Path, *options: str) -> dict[str, float]:
    """The benchmark's row."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}  # coverage would double the time
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(repo / "benchmarks/compiled_training.py"), *options, "--out", str(folder / "out.json")]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "out.json").read_text())["models"][0]


@pytest.mark.slow
def test_gradients_and_fifty_steps_are_those_of_the_model_as_it_is(repo: Path, tmp_path: Path) -> None:
    options = ("--device", "cpu", "--models", "nequip-tiny", "--backend", "aot_eager", "--dtypes", "float64", "--repeats", "0")
    row = run(repo, tmp_path, *options)
    assert row["gradient_difference_float64"] < 1e-10 and row["weight_difference_float64"] < 1e-9 and row["steps"] == 50
    assert row["forces_difference_float64"] < 1e-10


@pytest.mark.slow
def test_inductor(repo: Path, tmp_path: Path) -> None:
    options = ("--device", "cpu", "--models", "nequip-least", "--dtypes", "float32", "--repeats", "3", "--atoms", "4")
    row = run(repo, tmp_path, *options)
    assert row["gradient_difference_float32"] < 1e-5 and row["speed_up"] > 0


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["nequip-tiny", "mace-tiny"])
def test_on_a_gpu(repo: Path, tmp_path: Path, name: str) -> None:
    row = run(repo, tmp_path, "--device", "cuda", "--models", name, "--repeats", "3", "--atoms", "16")
    assert row["gradient_difference_float64"] < 1e-10 and row["weight_difference_float64"] < 1e-9
    assert row["gradient_difference_float32"] < 1e-5 and row["forces_difference_float64"] < 1e-10
