"""Datasets, a split and a batch budget, as Lightning takes them."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Int
from lightning.pytorch import LightningDataModule

from matfound import catalog
from matfound.data.dataset import Dataset, check_groups
from matfound.data.frames import Frames, ResumableLoader, make_loader
from matfound.data.mixture import Mixture, check_mixture
from matfound.data.samplers import BudgetBatchSampler, check_budget
from matfound.data.splits import Split, key_values, load_split, random_split, select, split_by_key, stratified_split
from matfound.errors import InputError, nearest
from matfound.graphs import neighbors
from matfound.structures.atomic_data import AtomicData

#: Where graphs are built.
Where = Literal["auto", "workers", "device"]


@dataclasses.dataclass
class SplitConfig:
    """How frames are divided.

    Args:
        file: a stored split (see `matfound.data.splits.load_split`); the other arguments are then unused.
        fractions: share of each part.
        by: a key (formula, trajectory, …) whose frames must stay together, or "scaffold", for molecules.
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
            return split_by_key(key_values(dataset, self.by), self.fractions, self.seed)
        if self.stratify:
            return stratified_split(key_values(dataset, self.stratify), self.fractions, self.seed)
        return random_split(len(dataset), self.fractions, self.seed)


class AtomicDataModule(LightningDataModule):
    """Trains on any number of datasets together.

    Without `weights`, `temperature` and `samples_per_epoch`, an epoch has every training sample once. With any of them it is a mixture:
    see `matfound.data.mixture.Mixture`. Batches have their structures in the order of the datasets, and as drawn within each.

    Of several processes (ranks), each takes every `world`-th batch of the same epoch; all take the same number of steps, with batches
    of no structures where a rank has run out. So validation sees every sample exactly once.

    Args:
        datasets: readers by the names that the model's vocabulary has for them.
        split: how each dataset is divided into train, val and test; one for all, or one by name for each.
        train: parts of the split to train on.
        batch_size: at most so many structures in a batch (of one process).
        max_atoms: at most so many atoms in a batch.
        max_edges: at most so many edges in a batch. They are counted beforehand: every sample is read once more.
        eval_batch_size: structures in a validation batch; default: `batch_size`.
        num_workers: processes that read and build graphs; 0 does it in the training process.
        seed: of the order of the batches.
        statistics_frames: references and scales are fitted to at most so many training frames, shared out over the datasets so that
            small ones give all of theirs.
        cache_frames: a part of at most so many frames stays in memory with its graphs, which are then built once; 0 keeps none.
        weights: share of each dataset in an epoch, up to a common factor; 0 does not train on it.
        temperature: T of p ∝ n^(1/T), the share of a dataset of n training frames: 1 mixes by size, larger ones raise small sets.
        samples_per_epoch: of a mixture; default: as many as there are training frames.
        graphs: where those of batches are built that are not kept: "workers" (or the training process, without workers), "device",
            after the copy; "auto": on a GPU if there are no workers, or if it takes whole batches in one search; otherwise in the
            workers.

    Raises:
        InputError: no datasets, no budget, or a number that makes no sense.
    """

    def __init__(
        self,
        datasets: dict[str, Dataset],
        # In this order: jsonargparse does not look further when a class does not fit.
        split: SplitConfig | dict[str, dict[str, Any] | SplitConfig] | None = None,
        train: Sequence[str] = ("train",),
        batch_size: int | None = None,
        max_atoms: int | None = None,
        max_edges: int | None = None,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        statistics_frames: int = 50_000,
        cache_frames: int = 5_000,
        weights: dict[str, float] | None = None,
        temperature: float | None = None,
        samples_per_epoch: int | None = None,
        graphs: Where = "auto",
    ) -> None:
        super().__init__()
        if not datasets:
            raise InputError("data.datasets is empty", remedy="name at least one dataset")
        self.readers = dict(datasets)
        for name, reader in self.readers.items():
            reader.name = name
        check_groups(self.readers)
        self.split_configs = self._split_configs(split or SplitConfig())
        self.train_parts = tuple(train)
        self.budget = {"batch_size": batch_size, "max_atoms": max_atoms, "max_edges": max_edges}
        check_budget(**self.budget)
        check_budget(batch_size=1 if eval_batch_size is None else eval_batch_size, statistics_frames=statistics_frames)
        for key, value in (("num_workers", num_workers), ("seed", seed), ("cache_frames", cache_frames)):
            if value < 0:
                raise InputError(f"data.{key} must not be negative, received {value}")
        if graphs not in get_args(Where):
            raise InputError(f"data.graphs: unknown place '{graphs}'", remedy=nearest(graphs, get_args(Where)))
        check_mixture(list(self.readers), weights, temperature, samples_per_epoch)
        self.weights, self.temperature, self.samples_per_epoch = weights, temperature, samples_per_epoch
        self.eval_batch_size, self.graphs = eval_batch_size, graphs
        self.num_workers, self.seed, self.statistics_frames, self.cache_frames = num_workers, seed, statistics_frames, cache_frames
        self._splits: dict[str, dict[str, np.ndarray]] = {}
        self._frames: dict[str, Frames] = {}
        self._sizes: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
        self._resume: dict[str, int] = {}

    def _split_configs(self, split: SplitConfig | dict[str, dict[str, Any] | SplitConfig]) -> dict[str, SplitConfig]:
        """How each dataset is divided."""
        if isinstance(split, SplitConfig):
            return dict.fromkeys(self.readers, split)
        for name in split:
            if name not in self.readers:
                raise InputError(f"data.split has '{name}', which is no dataset", remedy=nearest(name, self.readers))
        for name in self.readers:
            if name not in split:
                raise InputError(f"data.split lacks '{name}'", remedy="give every dataset a split, or one for all")
        return {name: _split_config(name, given) for name, given in split.items()}

    def setup(self, stage: str) -> None:
        """Refuse what would fail only later.

        Raises:
            InputError: nothing to validate or test on where that was asked for, a validation frame that is larger than a batch may be,
                or a group of labels whose columns are not the model's.
        """
        check_groups(self.readers)
        part = "test" if stage == "test" else "val"
        frames = self.frames(part)
        if len(frames):
            self._sampler(part, frames)
        elif stage != "fit":
            known = {known for split in self.splits().values() for known, chosen in split.items() if len(chosen)}
            raise InputError(f"there are no frames in {part}", remedy=f"the split has {', '.join(sorted(known))}")

    def splits(self) -> dict[str, dict[str, Int[np.ndarray, " _"]]]:
        """The frames of each part of each dataset."""
        if not self._splits:
            self._splits = {
                name: {part: np.asarray(frames, dtype=np.int64) for part, frames in self.split_configs[name].of(reader).items()}
                for name, reader in self.readers.items()
            }
        return self._splits

    def frames(self, part: str) -> Frames:
        """The samples of a part, with graphs for the model that the trainer trains; the same object every time.

        Raises:
            InputError: the model's vocabulary lacks a dataset, or there are no frames to train on.
        """
        potential = self._potential
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
            rows = self._chosen(part)
            keep = sum(map(len, rows)) <= self.cache_frames
            self._frames[part] = Frames(
                list(self.readers.values()), rows, indices, dict(potential.graphs), keep, build=not self._builds_on_device()
            )  # fmt: skip
            self._sizes.pop(part, None)
        return self._frames[part]

    @property
    def _potential(self) -> Any:
        return self.trainer.lightning_module.potential  # type: ignore[union-attr]

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device  # type: ignore[union-attr]

    def _builds_on_device(self) -> bool:
        """Whether graphs are built where batches are computed with."""
        if self.graphs != "auto":
            return self.graphs == "device"
        return self._device.type == "cuda" and (self.num_workers == 0 or neighbors.has_batched_search(self._device))

    def _chosen(self, part: str) -> list[Int[np.ndarray, " _"]]:
        """The frames of a part, reader by reader."""
        parts = self.train_parts if part == "train" else (part,)
        chosen = []
        for name, split in self.splits().items():
            unused = part == "train" and self.weights is not None and not self.weights[name]
            found = [split[wanted] for wanted in parts if wanted in split and not unused]
            chosen.append(np.concatenate([np.zeros(0, dtype=np.int64), *found]))
        if part == "train" and not sum(map(len, chosen)):
            known = {known for split in self.splits().values() for known in split}
            raise InputError(f"there are no frames in {' + '.join(parts) or 'no part'}", remedy=nearest(parts[0] if parts else "", known))
        return chosen

    def mixture(self) -> Mixture | None:
        """How the training samples are mixed; None if an epoch has each of them once.

        Raises:
            InputError: as `matfound.data.mixture.Mixture`.
        """
        if self.weights is None and self.temperature is None and self.samples_per_epoch is None:
            return None
        sizes = dict(zip(self.readers, np.diff(self.frames("train").offsets).tolist(), strict=True))
        return Mixture(sizes, self.weights, self.temperature, self.samples_per_epoch, self.seed)

    def samples(self, part: str) -> Iterator[AtomicData]:
        """Training statistics are taken from these: all frames of a part, or an even selection of `statistics_frames` from it."""
        frames = self.frames(part)
        self.mixture()  # refuses what makes no sense before much is read
        starts, sizes = frames.offsets[:-1], np.diff(frames.offsets)
        for d, limit in enumerate(shares(sizes, self.statistics_frames).tolist()):
            step = max(1, -(-int(sizes[d]) // max(limit, 1)))
            yield from (frames[int(starts[d]) + i] for i in range(0, int(sizes[d]), step))

    def _sampler(self, part: str, frames: Frames, *, everywhere: bool = False, **options: Any) -> BudgetBatchSampler:
        """Batches of a part; `everywhere`: the same on every rank, and not those of this rank."""
        if part not in self._sizes:
            self._sizes[part] = self._count(frames)
        natoms, nedges = self._sizes[part]
        budget: dict[str, Any] = dict(self.budget)
        if part != "train" and self.eval_batch_size is not None:
            budget["batch_size"] = self.eval_batch_size
        trainer = self.trainer
        assert trainer is not None
        ranks: dict[str, Any] = {} if everywhere else {"rank": trainer.global_rank, "world": trainer.world_size}
        return BudgetBatchSampler(natoms, nedges, **budget, seed=self.seed, place=frames.place, **ranks, **options)

    def _count(self, frames: Frames) -> tuple[Int[np.ndarray, " samples"], Int[np.ndarray, " samples"] | None]:
        """Atoms and edges of every sample, as far as a budget needs them."""
        if self.budget["max_edges"] is not None:
            return frames.nedges()
        if self.budget["max_atoms"] is not None:
            return frames.natoms(), None
        return np.broadcast_to(np.int32(1), len(frames)), None

    def _train_sampler(self, epoch: int, **options: Any) -> BudgetBatchSampler:
        mixture = self.mixture()
        order = None if mixture is None else mixture.epoch(epoch)
        return self._sampler("train", self.frames("train"), shuffle=True, epoch=epoch, order=order, **options)

    def batches_per_epoch(self) -> int:
        """Training steps in the first epoch: its batches, shared out over the ranks."""
        return len(self._train_sampler(0))

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
        consumed, steps = self._start(epoch)
        sampler = self._train_sampler(epoch, skip=consumed, steps=steps)
        return self._loader("train", sampler)

    def _loader(self, part: str, sampler: BudgetBatchSampler) -> ResumableLoader:
        return make_loader(self.frames(part), sampler, part, num_workers=self.num_workers, device=self._device)

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """The validation set in order; nothing if the split has none."""
        return self._eval_loader("val")

    def test_dataloader(self) -> ResumableLoader | list[Any]:
        """The test set in order."""
        return self._eval_loader("test")

    def _eval_loader(self, part: str) -> ResumableLoader | list[Any]:
        frames = self.frames(part)
        return self._loader(part, self._sampler(part, frames)) if len(frames) else []

    def all_batches(self, part: str) -> Iterator[AtomicData]:
        """All batches of "val" or "test", on the trainer's device and with graphs; on every rank the same."""
        frames = self.frames(part)
        if len(frames):
            for batch in self._loader(part, self._sampler(part, frames, everywhere=True)):
                yield self.on_after_batch_transfer(batch.to(self._device, non_blocking=True), 0)

    def transfer_batch_to_device(self, batch: AtomicData, device: torch.device, dataloader_idx: int) -> AtomicData:
        """Without waiting for the copy; no copy where the batch is there already."""
        return batch.to(device, non_blocking=True)

    def on_after_batch_transfer(self, batch: AtomicData, dataloader_idx: int) -> AtomicData:
        """Build the graphs that the batch lacks.

        Raises:
            InputError: a structure without a graph; names file and frame.
        """
        graphs = self._potential.graphs
        part, samples = batch.origin if "origin" in batch else ("", [])
        if "origin" in batch:
            del batch["origin"]
        if set(graphs) - set(batch.graph_names()):
            try:
                neighbors.add_graphs(batch, graphs)
            except InputError:
                if part:
                    self._frames[part].blame(samples)
                raise
        return batch

    def _start(self, epoch: int) -> tuple[int, int]:
        """Batches of an epoch that were consumed before this run, by all ranks together, and in how many steps."""
        if self._resume.get("epoch") != epoch:
            return 0, 0
        return self._resume["consumed"], self._resume.get("steps", self._resume["consumed"])

    def state_dict(self) -> dict[str, int]:
        """The epoch, how many of its batches training has consumed on all ranks (not: how many were prefetched), in how many steps.

        The number of ranks may change when a run is resumed; batches that were padded for the old one are not counted as consumed twice.
        """
        trainer = self.trainer
        assert trainer is not None
        steps: int = trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        consumed, before = self._start(trainer.current_epoch)
        return {"epoch": trainer.current_epoch, "consumed": consumed + (steps - before) * trainer.world_size, "steps": steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Where to go on."""
        self._resume = dict(state)


def _split_config(name: str, given: Mapping[str, Any] | SplitConfig) -> SplitConfig:
    if isinstance(given, SplitConfig):
        return given
    known = {field.name: field.type for field in dataclasses.fields(SplitConfig)}
    for key, value in given.items():
        if key not in known:
            raise InputError(f"data.split.{name}: unknown key '{key}'", remedy=nearest(key, known))
        wanted: Any = {"fractions": Mapping, "seed": int}.get(key, str)
        if not isinstance(value, wanted) and not (value is None and wanted is str):
            words = {"fractions": "a share for each part", "seed": "a whole number"}.get(key, "a text")
            raise InputError(f"data.split.{name}.{key}: expected {words}, received {value!r}")
    return SplitConfig(**given)


def shares(sizes: Int[np.ndarray, " datasets"], total: int) -> Int[np.ndarray, " datasets"]:
    """At most `total`, shared out over datasets: as much to each as to any other, as far as it has that much; the rest to the others.

    At least one of each that is not empty.
    """
    found, left = np.zeros(len(sizes), dtype=np.int64), total
    order = np.argsort(sizes, kind="stable")
    for place, d in enumerate(order):
        found[d] = min(int(sizes[d]), max(left // (len(order) - place), 1))
        left -= int(found[d])
    return found
