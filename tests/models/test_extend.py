"""One new head beside the old ones: what stays, what is copied, what is refused."""

import inspect
from collections.abc import Callable

import ase.build
import pytest
import torch
from torch import Tensor, nn

from matfound.errors import InputError
from matfound.graphs.neighbors import add_graphs
from matfound.models import checkpoint
from matfound.models.base import NodeFeatures, Potential
from matfound.models.extend import extend, parent_index
from matfound.models.nequip import NequIP
from matfound.nn.base import Head
from matfound.nn.heads import EnergyHead
from matfound.structures.atomic_data import AtomicData

Make = Callable[..., Potential]


class OwnHead(Head):
    """A head of one's own, whose dataset axis is the second."""

    outputs = ("magmoms",)

    def bind(self, channels: int, datasets: int) -> None:
        self.matrix = nn.Parameter(torch.randn(channels, datasets))

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Tensor]:
        return {"magmoms": (features.scalars @ self.matrix)[torch.arange(batch.num_nodes), batch.dataset[batch.batch]].double()}


def predictions(potential: Potential, dataset: str) -> dict[str, Tensor]:
    atoms = ase.build.bulk("MgO", "rocksalt", a=4.2)
    atoms.rattle(0.1, seed=0)
    data = add_graphs(AtomicData.from_atoms(atoms), potential.graphs)
    data.dataset = torch.tensor([potential.dataset_index(dataset)])
    with torch.no_grad():
        return potential(data)


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("parent", ["a", "b"])
def test_the_new_head_says_what_its_parent_says(small_potential: Make, parent: str) -> None:
    old = small_potential().double().eval()
    before = {name: predictions(old, name) for name in old.datasets}
    new = extend(old, "mine", parent)
    assert new.datasets == ["a", "b", "mine"] and old.datasets == ["a", "b"]
    for name in old.datasets:
        assert_same(predictions(new, name), before[name])
        assert_same(predictions(old, name), before[name])
    assert_same(predictions(new, "mine"), before[parent])
    assert float((before["a"]["energy"] - before["b"]["energy"]).abs()) > 0.1
    assert new.elements(2) == old.elements(0)


def test_rows_are_copies_of_their_own(small_potential: Make) -> None:
    new = extend(small_potential(), "mine", "b")
    head = new.heads["energy"]
    for tensor in (head.readout.last, head.table.scale, head.table.reference):
        assert tensor.shape[0] == 3
        assert torch.equal(tensor[2].nan_to_num(), tensor[1].nan_to_num())
    head.table.reference[2] += 1.0
    assert not torch.equal(head.table.reference[2].nan_to_num(), head.table.reference[1].nan_to_num())


def test_heads_of_ones_own_grow_too() -> None:
    torch.manual_seed(0)
    heads = {"energy": EnergyHead((4,), forces=False, stress=False), "own": OwnHead()}
    old = Potential(NequIP(cutoff=4.0, num_layers=1, irreps="4x0e+2x1o", lmax=1, radial_hidden=(4,)), heads, ("a", "b")).double().eval()
    heads["energy"].table.reference.fill_(0.0)
    new = extend(old, "mine", "a")
    assert new.heads["own"].matrix.shape[1] == 3
    assert_same(predictions(new, "mine"), predictions(old, "a"))


def test_defaults_and_type(small_potential: Make) -> None:
    new = extend(small_potential(("a",)), "mine", dtype="float64")
    assert new.default_dataset == {"periodic": "mine", "molecular": "mine"}
    assert new.choose_dataset(None, periodic=True) == new.choose_dataset(None, periodic=False) == 1
    assert new.dtype == torch.float64 and not new.training and new.licence == "MIT"
    assert extend(small_potential(("a",)), "mine").dtype == torch.float32


def test_it_is_a_checkpoint_and_grows_again(small_potential: Make, tmp_path) -> None:
    folder = checkpoint.save(extend(small_potential(("a",)), "mine", dtype="float64"), tmp_path / "model")
    again = extend(folder, "more", "mine")
    assert again.datasets == ["a", "mine", "more"]
    assert_same(predictions(again, "more"), predictions(checkpoint.load(folder), "mine"))


def test_what_is_trained(small_potential: Make) -> None:
    everything = extend(small_potential(("a",)), "mine")
    assert all(p.requires_grad for p in everything.parameters())
    heads = extend(small_potential(("a",)), "mine", freeze="backbone")
    assert not any(p.requires_grad for p in heads.backbone.parameters())
    assert all(p.requires_grad for p in heads.heads.parameters())


def test_the_parent(small_potential: Make) -> None:
    assert parent_index(small_potential(("a",)), None) == 0
    assert parent_index(small_potential(), "b") == 1
    assert parent_index(small_potential(default_dataset={"periodic": "b", "molecular": "b"}), None) == 1
    for defaults in (None, {"periodic": "b", "molecular": "a"}):
        with pytest.raises(InputError, match="several levels of theory: a, b"):
            parent_index(small_potential(default_dataset=defaults), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "A", "parent": "b"}, "has a dataset 'A' already"),
        ({"dataset": " ", "parent": "b"}, "no name"),
        ({"dataset": "mine", "parent": "c"}, "no level of theory 'c'"),
        ({"dataset": "mine"}, "several levels of theory"),
        ({"dataset": "mine", "parent": "a", "freeze": "heads"}, "freeze is 'heads'"),
        ({"dataset": "mine", "parent": "a", "dtype": "float16"}, "dtype 'float16'"),
    ],
)
def test_what_is_refused(small_potential: Make, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        inspect.unwrap(extend)(small_potential(), **options)  # without the checks of types that pytest brings


def test_a_model_that_cannot_grow(small_potential: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NequIP, "grown", lambda self, parent: {"radial_hidden": (16,)})
    with pytest.raises(InputError, match="cannot grow: '.*' would go from shape"):
        extend(small_potential(), "mine", "a")
    monkeypatch.setattr(NequIP, "grown", lambda self, parent: {"num_layers": 1})
    with pytest.raises(InputError, match="cannot grow: the tensor '.*' is not in both"):
        extend(small_potential(), "mine", "a")
