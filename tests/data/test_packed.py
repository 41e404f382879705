import pickle

import ase.build
import pytest
import torch

from matfound.data.packed import ALIGNMENT, Packed
from matfound.graphs.neighbors import add_graphs
from matfound.graphs.spec import GraphSpec
from matfound.structures.ase import from_atoms
from matfound.structures.atomic_data import AtomicData, collate, empty_batch
from matfound.testing import random_crystal


def graphs() -> AtomicData:
    samples = [from_atoms(atoms) for atoms in (random_crystal(0), ase.build.molecule("CH3OH"), random_crystal(2))]
    for number, sample in enumerate(samples):
        sample.id = f"sample {number}"
    samples[0].energy = torch.tensor([-1.5], dtype=torch.float64)
    return add_graphs(collate(samples), {"main": GraphSpec(cutoff=4.0)})


def alone(sample: AtomicData) -> AtomicData:
    batch = collate([sample])
    batch.origin = "train", [7]
    return batch


@pytest.mark.parametrize("batch", [graphs(), alone(from_atoms(ase.build.molecule("H2O"))), empty_batch()], ids=["three", "one", "none"])
def test_a_batch_comes_out_as_it_went_in(batch: AtomicData) -> None:
    packed = Packed.of(batch)
    for block in (packed, pickle.loads(pickle.dumps(packed)), packed.to(torch.device("cpu"))):
        found = block.unpacked()
        assert found.keys() == batch.keys()
        for name, value in batch:
            if isinstance(value, torch.Tensor):
                assert found[name].dtype == value.dtype
                assert torch.equal(torch.nan_to_num(found[name], nan=-7), torch.nan_to_num(value, nan=-7))
                assert found[name].untyped_storage().data_ptr() == block.block.untyped_storage().data_ptr()
                assert found[name].storage_offset() * value.element_size() % ALIGNMENT == 0
            else:
                assert found[name] == value


def test_it_is_a_copy() -> None:
    batch = graphs()
    packed = Packed.of(batch)
    batch.pos.zero_()
    assert packed.unpacked().pos.abs().sum() > 0
