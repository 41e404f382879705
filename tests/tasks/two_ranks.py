"""One of two processes that train together on the CPU; `run_one` is also what a single process does with the joined batch.

python two_ranks.py RANK FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import ase
import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from matfound.errors import InputError
from matfound.graphs.neighbors import add_graphs
from matfound.graphs.spec import GraphSpec
from matfound.models.base import Potential
from matfound.models.nequip import NequIP
from matfound.nn.heads import BinaryHead, ClassHead, EnergyHead, GraphHead, NodeHead
from matfound.structures.atomic_data import AtomicData, collate, empty_batch
from matfound.tasks.multitask import MultiTask
from matfound.tasks.target import Target

#: Which structures each rank has: unlike in number, in size and in their labels.
SHARES = ([0, 1, 2, 3], [4, 5])


def module() -> MultiTask:
    """A model of everything, seeded; one of its heads learns nothing."""
    torch.manual_seed(0)
    heads = {
        "energy": EnergyHead((4,)),
        "gap": GraphHead("gap", (4,)),
        "idle": GraphHead("hull_distance", (4,)),
        "numbers": GraphHead("ranks_numbers", (4,), columns=3),
        "assays": BinaryHead("ranks_assays", (4,), columns=5),
        "kinds": ClassHead("ranks_kinds", 3, (4,), columns=2),
        "nodes": NodeHead("ranks_nodes", (4,), columns=2),
    }
    backbone = NequIP(cutoff=3.0, num_layers=1, irreps="4x0e+2x1o", lmax=1, radial_hidden=(4,))
    potential = Potential(backbone, heads, ("molecules", "crystals")).double()
    potential.heads["energy"].table.reference[:, [1, 8]] = torch.tensor([-13.0, -2000.0], dtype=torch.float64)
    targets = [
        Target("energy", loss="huber", weight=2.0), Target("forces", loss="l2norm"), Target("stress", loss="mse"),
        Target("gap", loss="mae"),
        Target("ranks_numbers", loss="mse", metrics=("mae", "rmse")), Target("ranks_assays", loss="bce"),
        Target("ranks_kinds", loss="cross_entropy"), Target("ranks_nodes", loss="mae"),
    ]  # fmt: skip
    return MultiTask(potential, targets)


def samples() -> list[AtomicData]:
    """Six structures; labels are where `SHARES` makes them differ: gaps on rank 0 alone, node labels nowhere."""
    module()  # declares the groups
    rng = np.random.default_rng(1)
    found = []
    for i in range(6):
        crystal = i % 2 == 1
        symbols = "OH2" if not crystal else "OH"
        cell, count = ([3.0, 3.1, 3.2] if crystal else None), len(ase.Atoms(symbols))
        positions = np.array([[0, 0, 0.12], [0, 0.76, -0.48], [0, -0.76, -0.48]])[:count] + 0.02 * rng.normal(size=(count, 3))
        data = AtomicData.from_atoms(ase.Atoms(symbols, positions, cell=cell, pbc=crystal))
        data.dataset, data.id = torch.tensor([int(crystal)]), f"frame-{i}"
        data.energy = torch.tensor([-2010.0 - i], dtype=torch.float64)
        if i != 1:
            data.forces = torch.tensor(rng.normal(size=(count, 3)))
        if crystal:
            data.stress = torch.tensor(rng.normal(size=(1, 3, 3)))
        if i in (0, 3):
            data.gap = torch.tensor([float(i)], dtype=torch.float64)
        numbers = rng.normal(size=(1, 3))
        numbers[0, : i % 3] = np.nan
        data.ranks_numbers = torch.tensor(numbers)
        data.ranks_assays = torch.tensor(rng.integers(-1, 2, (1, 5)))
        data.ranks_kinds = torch.tensor(rng.integers(-1, 3, (1, 2)))
        found.append(add_graphs(data, {"main": GraphSpec(3.0)}))
    return found


def prepared() -> MultiTask:
    """`module`, with what it logs in `logged`, for a call as DDP makes it."""
    made = module()
    made.logged: dict[str, float] = {}
    made.log = lambda name, value, **_: made.logged.__setitem__(name, float(value))
    return made.train()


def step(made: MultiTask, batch: AtomicData, world: int) -> dict[str, np.ndarray]:
    """The gradients of a training step, and what was logged."""
    made.forward = lambda data: made.training_step(data, 0)
    parallel = DistributedDataParallel(made) if world > 1 else made
    parallel(batch).backward()
    grads = {name: p.grad.numpy() for name, p in made.named_parameters() if p.grad is not None}
    return grads | {"logged": np.array(made.logged["train/loss"])}


def validation(made: MultiTask, batches: list[AtomicData]) -> dict[str, float]:
    """What is logged after these validation batches."""
    made.eval()
    with torch.inference_mode():
        for i, batch in enumerate(batches):
            made.validation_step(batch, i)
        made.on_validation_epoch_end()
    return made.logged


def spoilt(batch: AtomicData, how: str) -> AtomicData:
    """A batch with a label that is not finite, or of a class that there is not."""
    copy = batch.clone()
    if how == "infinite":
        copy.energy[-1] = torch.inf
    else:
        copy.ranks_kinds[-1, 0] = 7
    return copy


def main(rank: int, folder: Path) -> None:
    """Everything that the tests ask of a process."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    data = samples()
    mine = collate([data[i] for i in SHARES[rank]])
    np.savez(folder / f"joined-{rank}.npz", **step(prepared(), mine, 2))
    alone = collate(data) if rank == 0 else empty_batch()
    np.savez(folder / f"empty-{rank}.npz", **step(prepared(), alone, 2))
    results: dict[str, Any] = {}
    shares = [[collate([data[0], data[2]]), collate([data[1]])], [collate([data[i] for i in (3, 4, 5)]), empty_batch()]]
    results["validation"] = validation(prepared(), shares[rank])
    results["validation of one"] = validation(prepared(), [[collate(data)], [empty_batch()]][rank])
    for how in ("infinite", "class"):
        for stage in ("training", "validation"):
            made = prepared()
            try:
                getattr(made, f"{stage}_step")(spoilt(mine, how) if rank else mine, 0)
            except InputError as error:
                results[f"{how} {stage}"] = str(error)
    (folder / f"results-{rank}.json").write_text(json.dumps(results))
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
