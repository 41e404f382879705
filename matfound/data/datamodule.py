"""Datasets, a split and a batch budget, as Lightning takes them."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from matfound import catalog
from matfound.data.dataset import Dataset
from matfound.data.samplers import BudgetBatchSampler
from matfound.data.splits import Split, load_split, random_split, select, split_by_key, stratified_split
from matfound.errors import InputError, nearest
from matfound.graphs.neighbors import add_graphs
from matfound.graphs.spec import GraphSpec
from matfound.structures.atomic_data import AtomicData, collate


@dataclasses.dataclass
class SplitConfig:
    """How frames are divided.

    Args:
        file: a stored split (see `matfound.data.splits.load_split`); the other arguments are then unused.
        fractions: share of each part.
        by: a key (formula, trajectory, …) whose frames must stay together.
        stratify: a key of whose frames each part gets the same share.
        seed: of the draw.
    """

    file: str | None = None
    fractions: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"train": 0.8, "val": 0.1, "test": 0.1})
    by: str | None = None
    stratify: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by and self.stratify:
            raise InputError(f"a split is either by a key or stratified, received by='{self.by}' and stratify='{self.stratify}'")

    def of(self, dataset: Dataset) -> Split:
        """The frames of each part of a dataset."""
        if self.file is not None:
            path = catalog.resolve(self.file)
            return select(load_split(path), dataset, file=path)
        if self.by:
            return split_by_key(dataset.keys(self.by), self.fractions, self.seed)
        if self.stratify:
            return stratified_split(dataset.keys(self.stratify), self.fractions, self.seed)
        return random_split(len(dataset), self.fractions, self.seed)


class Frames(TorchDataset[AtomicData]):
    """Chosen frames of several datasets, with graphs; what the workers run.

    Args:
        datasets: readers.
        frames: (reader, frame in it) of each sample.
        indices: entry of the model's vocabulary of each reader.
        graphs: what the model wants.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        frames: Sequence[tuple[int, int]],
        indices: Sequence[int],
        graphs: Mapping[str, GraphSpec],
    ) -> None:
        self.datasets, self.frames, self.indices, self.graphs = datasets, frames, indices, graphs

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, sample: int) -> AtomicData:
        reader, frame = self.frames[sample]
        dataset = self.datasets[reader]
        # A reader may keep its frames; the graph must not stay with them.
        data = copy.copy(dataset.get(frame))
        data.dataset = torch.tensor([self.indices[reader]])
        try:
            return add_graphs(data, self.graphs)
        except InputError as error:
            raise error.at(*dataset.place(frame)) from None


class ResumableLoader(DataLoader[AtomicData]):
    """Tells Lightning that resuming in mid-epoch is taken care of: the datamodule hands out a loader that skips what was consumed."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see `AtomicDataModule.state_dict`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class AtomicDataModule(LightningDataModule):
    """Trains on any number of datasets together.

    Args:
        datasets: readers by the names that the model's vocabulary has for them.
        split: how each dataset is divided into train, val and test.
        train: parts of the split to train on.
        batch_size: at most so many structures in a batch.
        max_atoms: at most so many atoms in a batch.
        max_edges: at most so many edges in a batch.
        eval_batch_size: structures in a validation batch; default: `batch_size`.
        num_workers: processes that read and build graphs; 0 does it in the training process.
        seed: of the order of the batches.
        statistics_frames: references and scales are fitted to at most so many training frames.
    """

    def __init__(
        self,
        datasets: dict[str, Dataset],
        split: SplitConfig | None = None,
        train: Sequence[str] = ("train",),
        batch_size: int | None = None,
        max_atoms: int | None = None,
        max_edges: int | None = None,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        statistics_frames: int = 50_000,
    ) -> None:
        super().__init__()
        if not datasets:
            raise InputError("data.datasets is empty", remedy="name at least one dataset")
        self.readers = dict(datasets)
        for name, reader in self.readers.items():
            reader.name = name
        self.split_config = split or SplitConfig()
        self.train_parts = tuple(train)
        self.budget = {"batch_size": batch_size, "max_atoms": max_atoms, "max_edges": max_edges}
        self.eval_batch_size = eval_batch_size
        self.num_workers, self.seed, self.statistics_frames = num_workers, seed, statistics_frames
        self._splits: dict[str, Split] = {}
        self._sizes: dict[str, tuple[list[int], list[int] | None]] = {}
        self._resume: dict[str, int] = {}

    def splits(self) -> dict[str, Split]:
        """The frames of each part of each dataset."""
        if not self._splits:
            self._splits = {name: self.split_config.of(reader) for name, reader in self.readers.items()}
        return self._splits

    def frames(self, part: str) -> Frames:
        """The samples of a part, with graphs for the model that the trainer trains.

        Raises:
            InputError: the model's vocabulary lacks a dataset, or no dataset has such a part.
        """
        potential: Any = self.trainer.lightning_module.potential  # type: ignore[union-attr]
        indices = []
        for name in self.readers:
            if name not in potential.datasets:
                raise InputError(
                    f"the data has a dataset '{name}' that the model's vocabulary lacks",
                    remedy=f"add it to model.potential.datasets, or rename it: {nearest(name, potential.datasets)}",
                )
            indices.append(potential.dataset_index(name))
        parts = self.train_parts if part == "train" else (part,)
        chosen = []
        for reader, split in enumerate(self.splits().values()):
            for wanted in parts:
                chosen += [(reader, frame) for frame in split.get(wanted, [])]
        if not chosen and part == "train":
            known = {known for split in self.splits().values() for known in split}
            raise InputError(f"no frames in {' + '.join(parts)}", remedy=nearest(parts[0], known))
        return Frames(list(self.readers.values()), chosen, indices, potential.graphs)

    def samples(self, part: str) -> Iterator[AtomicData]:
        """Training statistics are taken from these: all frames of a part, or an even selection of `statistics_frames`."""
        frames = self.frames(part)
        step = max(1, -(-len(frames) // self.statistics_frames))
        return (frames[i] for i in range(0, len(frames), step))

    def _sampler(self, part: str, frames: Frames, *, shuffle: bool, epoch: int = 0, skip: int = 0) -> BudgetBatchSampler:
        if part not in self._sizes:
            with_edges = self.budget["max_edges"] is not None
            self._sizes[part] = _sizes(frames, with_edges=with_edges, with_atoms=self.budget["max_atoms"] is not None)
        natoms, nedges = self._sizes[part]
        budget = dict(self.budget)
        if part != "train" and self.eval_batch_size is not None:
            budget["batch_size"] = self.eval_batch_size
        return BudgetBatchSampler(natoms, nedges, **budget, shuffle=shuffle, seed=self.seed, epoch=epoch, skip=skip)

    def batches_per_epoch(self) -> int:
        """Training batches in the first epoch."""
        return len(self._sampler("train", self.frames("train"), shuffle=True))

    def _loader(self, frames: Frames, sampler: BudgetBatchSampler) -> ResumableLoader:
        return ResumableLoader(
            frames, batch_sampler=sampler, collate_fn=collate, num_workers=self.num_workers, pin_memory=torch.cuda.is_available()
        )

    def train_dataloader(self) -> ResumableLoader:
        """This epoch's batches, from the first that has not been consumed.

        Raises:
            InputError: Lightning would reuse the loader, and with it the order, for every epoch.
        """
        trainer = self.trainer
        assert trainer is not None
        every: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if every != 1:
            raise InputError(
                f"the trainer reloads data every {every} epochs; batches are made anew each epoch",
                remedy="set Trainer(reload_dataloaders_every_n_epochs=1)",
            )
        epoch = trainer.current_epoch
        skip = self._resume.get("consumed", 0) if self._resume.get("epoch") == epoch else 0
        frames = self.frames("train")
        return self._loader(frames, self._sampler("train", frames, shuffle=True, epoch=epoch, skip=skip))

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """The validation set in order; nothing if the split has none."""
        return self._eval_loader("val")

    def test_dataloader(self) -> ResumableLoader | list[Any]:
        """The test set in order."""
        return self._eval_loader("test")

    def _eval_loader(self, part: str) -> ResumableLoader | list[Any]:
        frames = self.frames(part)
        return self._loader(frames, self._sampler(part, frames, shuffle=False)) if len(frames) else []

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches training has consumed (not: how many were prefetched)."""
        trainer = self.trainer
        assert trainer is not None
        consumed: int = trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        return {"epoch": trainer.current_epoch, "consumed": consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Where to go on."""
        self._resume = dict(state)


def _sizes(frames: Frames, *, with_edges: bool, with_atoms: bool) -> tuple[list[int], list[int] | None]:
    """Atoms and edges of every sample, as far as a budget needs them."""
    if with_edges:
        samples = (frames[i] for i in range(len(frames)))
        pairs = [(s.num_nodes, max(s[k].shape[1] for k in s.keys() if k.partition("@")[0] == "edge_index")) for s in samples]
        return [n for n, _ in pairs], [e for _, e in pairs]
    if with_atoms:
        return [frames.datasets[reader].natoms(frame) for reader, frame in frames.frames], None
    return [1] * len(frames), None
