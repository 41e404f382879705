"""Potentials: the vocabulary of datasets, and building from a configuration."""

from collections.abc import Callable

import pytest
import torch

from matfound.errors import InputError
from matfound.models.base import Backbone, Head, NodeFeatures, Potential, build
from matfound.models.nequip import NequIP
from matfound.nn.heads import EnergyHead, GraphHead
from matfound.structures.atomic_data import collate
from matfound.testing import prepare, random_crystal


def test_configuration_builds_the_same_model(small_potential: Callable[..., Potential]) -> None:
    potential = small_potential(default_dataset={"periodic": "b", "molecular": "a"})
    copy = build(potential.config)
    assert copy.config == potential.config and copy.datasets == ["a", "b"] and copy.graphs == potential.graphs
    assert copy.state_dict().keys() == potential.state_dict().keys()


def test_positional_arguments_are_remembered() -> None:
    assert GraphHead("gap", (4,)).config["init_args"] == {"field": "gap", "hidden": [4]}


def test_datasets_are_chosen_by_name_or_periodicity(small_potential: Callable[..., Potential]) -> None:
    potential = small_potential(default_dataset={"periodic": "b"})
    assert potential.choose_dataset("a", periodic=True) == 0
    assert potential.choose_dataset(None, periodic=True) == 1
    with pytest.raises(InputError, match="no default for molecular.*a, b"):
        potential.choose_dataset(None, periodic=False)
    with pytest.raises(InputError, match="no level of theory 'c'"):
        potential.choose_dataset("c", periodic=True)
    assert small_potential(("only",)).choose_dataset(None, periodic=False) == 0


def test_each_dataset_has_its_own_references_and_readout(small_potential: Callable[..., Potential]) -> None:
    potential = small_potential().double().eval()
    sample = prepare(potential, random_crystal(0, 4, (8, 12, 22)))
    other = sample.clone()
    other.dataset = torch.ones(1, dtype=torch.int64)
    out = potential(collate([sample, other]))
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.zero_()
    bare = potential(collate([sample, other]))
    assert float(bare["energy"][1] - bare["energy"][0]) == pytest.approx(4.0)
    assert not torch.allclose(out["forces"][:4], out["forces"][4:])


def test_elements_are_those_with_references(small_potential: Callable[..., Potential]) -> None:
    potential = small_potential(elements=(1, 8, 12, 22, 40))
    assert potential.elements(0) == {1, 8, 12, 22}


def test_two_heads_for_one_field_are_refused() -> None:
    with pytest.raises(InputError, match="both predict 'gap'"):
        Potential(NequIP(num_layers=1, irreps="4x0e"), {"one": GraphHead("gap"), "two": GraphHead("gap")})


def test_default_dataset_keys_are_checked() -> None:
    with pytest.raises(InputError, match="default_dataset has the key 'crystal'"):
        Potential(NequIP(num_layers=1, irreps="4x0e"), {"e": EnergyHead()}, ["a"], {"crystal": "a"})


def test_a_checkpoint_does_not_choose_what_code_runs() -> None:
    with pytest.raises(InputError, match="not part of matfound"):
        build({"class_path": "antigravity.Model", "init_args": {}})
    with pytest.raises(InputError, match="not a matfound model class"):
        build({"class_path": "os.system", "init_args": {"command": "true"}})
    with pytest.raises(InputError, match="no class"):
        build({"class_path": "matfound.models.nequip.Nequip", "init_args": {}})
    with pytest.raises(InputError, match="did you mean 'cutoff'"):
        build({"class_path": "matfound.models.nequip.NequIP", "init_args": {"cutof": 4.0}})


def test_inference_mode_still_gives_forces(small_potential: Callable[..., Potential]) -> None:
    potential = small_potential().double().eval()
    with torch.inference_mode():
        inside = potential(collate([prepare(potential, random_crystal(0, 3, (8, 12, 22)))]))
    outside = potential(collate([prepare(potential, random_crystal(0, 3, (8, 12, 22)))]))
    assert torch.equal(inside["forces"], outside["forces"])


def test_a_single_structure_needs_no_collate(small_potential: Callable[..., Potential]) -> None:
    potential = small_potential().double().eval()
    sample = prepare(potential, random_crystal(0, 3, (8, 12, 22)))
    assert torch.equal(potential(sample)["forces"], potential(collate([sample]))["forces"])


class Plain(Backbone):
    """A third party's backbone in a few lines."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.graphs = {}
        self.channels = width
        self.embedding = torch.nn.Parameter(torch.randn(119, width))

    def forward(self, batch):
        return NodeFeatures(scalars=self.embedding[batch.numbers])


def test_third_party_backbones_fit_in() -> None:
    potential = Potential(Plain(width=6), {"gap": GraphHead("gap")})
    assert potential.config["init_args"]["backbone"]["class_path"].endswith(".Plain")
    assert not potential.conservative and isinstance(potential.heads["gap"], Head)
    assert potential(collate([prepare(potential, random_crystal(0, 3))]))["gap"].shape == (1,)
