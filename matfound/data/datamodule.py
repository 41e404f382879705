"""Datasets, a split and a batch budget, as Lightning takes them."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from matfound import catalog
from matfound.data.dataset import Dataset
from matfound.data.samplers import BudgetBatchSampler, check_budget
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
        key: what `file` calls frames by: "id", or "file_frame" where ids are not unique.
    """

    file: str | None = None
    fractions: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"train": 0.8, "val": 0.1, "test": 0.1})
    by: str | None = None
    stratify: str | None = None
    seed: int = 0
    key: str = "id"

    def __post_init__(self) -> None:
        if self.by and self.stratify:
            raise InputError(f"a split is either by a key or stratified, received by='{self.by}' and stratify='{self.stratify}'")

    def of(self, dataset: Dataset) -> Split:
        """The frames of each part of a dataset."""
        if self.file is not None:
            path = catalog.resolve(self.file)
            return select(load_split(path), dataset, file=path, key=self.key)
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
        keep: finished samples stay in memory, up to `KEPT_BYTES`. They are shared: what is handed out must not be changed in place.
    """

    #: Of tensors that are kept at most; further samples are made anew each time.
    KEPT_BYTES = 2**30

    def __init__(
        self,
        datasets: Sequence[Dataset],
        frames: Sequence[tuple[int, int]],
        indices: Sequence[int],
        graphs: Mapping[str, GraphSpec],
        keep: bool = False,
    ) -> None:
        self.datasets, self.frames, self.indices, self.graphs, self.keep = datasets, frames, indices, graphs, keep
        self._kept: dict[int, AtomicData] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.frames)

    def place(self, sample: int) -> tuple[str, int]:
        """File of a sample, and its frame in that file."""
        reader, frame = self.frames[sample]
        return self.datasets[reader].place(frame)

    def __getitem__(self, sample: int) -> AtomicData:
        if sample in self._kept:
            return copy.copy(self._kept[sample])
        reader, frame = self.frames[sample]
        # A reader may keep its frames; what is added here must not stay with them.
        data = copy.copy(self.datasets[reader].get(frame))
        data.dataset = torch.tensor([self.indices[reader]])
        try:
            add_graphs(data, self.graphs)
        except InputError as error:
            raise error.at(*self.place(sample)) from None
        if self.keep and self._bytes < self.KEPT_BYTES:
            self._kept[sample] = copy.copy(data)
            self._bytes += sum(value.nbytes for _, value in data if isinstance(value, Tensor))
        return data

    def prepare(self) -> None:
        """Make all samples that will be kept: before workers are forked, so that all of them have them."""
        for sample in range(len(self)):
            if not self.keep or self._bytes >= self.KEPT_BYTES:
                break
            if sample not in self._kept:
                self[sample]


class _Caught(TorchDataset[AtomicData | InputError]):
    """Hands an error over as a sample: raised in a worker, it would arrive as a traceback in place of one line."""

    def __init__(self, frames: Frames) -> None:
        self.frames = frames

    def __getitem__(self, sample: int) -> AtomicData | InputError:
        try:
            return self.frames[sample]
        except InputError as error:
            return error


def _join(samples: list[AtomicData | InputError]) -> AtomicData | InputError:
    """`collate`, or the first error."""
    try:
        return collate([_raised(sample) for sample in samples])
    except InputError as error:
        return error


def _raised(sample: AtomicData | InputError) -> AtomicData:
    if isinstance(sample, InputError):
        raise sample
    return sample


class ResumableLoader(DataLoader[AtomicData | InputError]):
    """Batches of frames, with the errors of workers as they were raised.

    Tells Lightning that resuming in mid-epoch is taken care of: the datamodule hands out a loader that skips what was consumed.
    """

    def __iter__(self) -> Iterator[AtomicData]:  # type: ignore[override]
        return (_raised(batch) for batch in super().__iter__())

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
        cache_frames: a part of at most so many frames stays in memory with its graphs, which are then built once; 0 keeps none.

    Raises:
        InputError: no datasets, no budget, or a number that makes no sense.
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
        cache_frames: int = 5_000,
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
        check_budget(**self.budget)
        check_budget(batch_size=1 if eval_batch_size is None else eval_batch_size, statistics_frames=statistics_frames)
        for key, value in (("num_workers", num_workers), ("seed", seed), ("cache_frames", cache_frames)):
            if value < 0:
                raise InputError(f"data.{key} must not be negative, received {value}")
        self.eval_batch_size = eval_batch_size
        self.num_workers, self.seed, self.statistics_frames, self.cache_frames = num_workers, seed, statistics_frames, cache_frames
        self._splits: dict[str, Split] = {}
        self._frames: dict[str, Frames] = {}
        self._sizes: dict[str, tuple[list[int], list[int] | None]] = {}
        self._resume: dict[str, int] = {}

    def setup(self, stage: str) -> None:
        """Refuse what would fail only later.

        Raises:
            InputError: several processes, nothing to validate or test on where that was asked for, or a validation frame that is
                larger than a batch may be.
        """
        trainer = self.trainer
        assert trainer is not None
        if trainer.world_size > 1:
            raise InputError(
                f"batches are made for one process, received {trainer.world_size}", remedy="set trainer.devices and trainer.num_nodes to 1"
            )
        part = "test" if stage == "test" else "val"
        frames = self.frames(part)
        if len(frames):
            self._sampler(part, frames, shuffle=False)
        elif stage != "fit":
            known = {known for split in self.splits().values() for known, chosen in split.items() if chosen}
            raise InputError(f"there are no frames in {part}", remedy=f"the split has {', '.join(sorted(known))}")

    def splits(self) -> dict[str, Split]:
        """The frames of each part of each dataset."""
        if not self._splits:
            self._splits = {name: self.split_config.of(reader) for name, reader in self.readers.items()}
        return self._splits

    def frames(self, part: str) -> Frames:
        """The samples of a part, with graphs for the model that the trainer trains; the same object every time.

        Raises:
            InputError: the model's vocabulary lacks a dataset, or there are no frames to train on.
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
        known = self._frames.get(part)
        if known is None or (known.graphs, known.indices) != (potential.graphs, indices):
            chosen = self._chosen(part)
            keep = len(chosen) <= self.cache_frames
            self._frames[part] = Frames(list(self.readers.values()), chosen, indices, dict(potential.graphs), keep)
            self._sizes.pop(part, None)
        return self._frames[part]

    def _chosen(self, part: str) -> list[tuple[int, int]]:
        """(reader, frame) of each sample of a part."""
        parts = self.train_parts if part == "train" else (part,)
        chosen = [
            (reader, frame)
            for reader, split in enumerate(self.splits().values())
            for wanted in parts
            for frame in split.get(wanted, [])
        ]  # fmt: skip
        if not chosen and part == "train":
            known = {known for split in self.splits().values() for known in split}
            raise InputError(f"there are no frames in {' + '.join(parts) or 'no part'}", remedy=nearest(parts[0] if parts else "", known))
        return chosen

    def samples(self, part: str) -> Iterator[AtomicData]:
        """Training statistics are taken from these: all frames of a part, or an even selection of `statistics_frames`."""
        frames = self.frames(part)
        return (frames[i] for i in range(0, len(frames), max(1, -(-len(frames) // self.statistics_frames))))

    def _sampler(self, part: str, frames: Frames, *, shuffle: bool, epoch: int = 0, skip: int = 0) -> BudgetBatchSampler:
        if part not in self._sizes:
            with_edges = self.budget["max_edges"] is not None
            self._sizes[part] = _sizes(frames, with_edges=with_edges, with_atoms=self.budget["max_atoms"] is not None)
        natoms, nedges = self._sizes[part]
        budget = dict(self.budget)
        if part != "train" and self.eval_batch_size is not None:
            budget["batch_size"] = self.eval_batch_size
        return BudgetBatchSampler(
            natoms, nedges, **budget, shuffle=shuffle, seed=self.seed, epoch=epoch, skip=skip, place=frames.place
        )  # fmt: skip

    def batches_per_epoch(self) -> int:
        """Training batches in the first epoch."""
        return len(self._sampler("train", self.frames("train"), shuffle=True))

    def _loader(self, frames: Frames, sampler: BudgetBatchSampler) -> ResumableLoader:
        if self.num_workers:
            frames.prepare()
        return ResumableLoader(
            _Caught(frames), batch_sampler=sampler, collate_fn=_join, num_workers=self.num_workers, pin_memory=torch.cuda.is_available()
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
                remedy="set trainer.reload_dataloaders_every_n_epochs to 1",
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
