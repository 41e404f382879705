"""Chosen frames of several datasets, and the loader that makes batches of them."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from matfound.data.dataset import Dataset
from matfound.data.packed import Packed
from matfound.errors import InputError
from matfound.fields import graph_key
from matfound.graphs.neighbors import add_graphs
from matfound.graphs.spec import GraphSpec
from matfound.structures.atomic_data import AtomicData, collate, concatenate, empty_batch

#: Samples that are read together where edges are counted.
CHUNK = 64

Batch = TypeVar("Batch")
Sent = TypeVar("Sent")


class Frames(TorchDataset[AtomicData]):
    """Chosen frames of several datasets, with graphs; what the workers run.

    Which frames these are is held in arrays: workers share them, whereas a list would be copied into each, entry by entry.

    Args:
        datasets: readers.
        rows: the chosen frames of each reader. Samples are counted through them, reader by reader.
        indices: entry of the model's vocabulary of each reader.
        graphs: what the model wants.
        keep: finished samples stay in memory, up to `KEPT_BYTES`. They are shared: what is handed out must not be changed in place.
        build: batches get their graphs here; otherwise they are left to whoever has the batch on its device. Kept samples always have
            them.
    """

    #: Of tensors that are kept at most; further samples are made anew each time.
    KEPT_BYTES = 2**30

    def __init__(
        self,
        datasets: Sequence[Dataset],
        rows: Sequence[Int[np.ndarray, " _"]],
        indices: Sequence[int],
        graphs: Mapping[str, GraphSpec],
        keep: bool = False,
        build: bool = True,
    ) -> None:
        self.datasets, self.indices, self.graphs, self.keep, self.build = list(datasets), list(indices), dict(graphs), keep, build or keep
        #: The frame of each sample in its reader, and where each reader's samples begin (and the last one's end).
        self.rows = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
        self.offsets = np.cumsum([0, *(len(chosen) for chosen in rows)])
        self._kept: dict[int, AtomicData] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.rows)

    def locate(self, sample: int) -> tuple[int, int]:
        """The reader of a sample, and its frame there."""
        return int(np.searchsorted(self.offsets, sample, side="right")) - 1, int(self.rows[sample])

    def place(self, sample: int) -> tuple[str, int]:
        """File of a sample, and its frame in that file."""
        reader, frame = self.locate(sample)
        return self.datasets[reader].place(frame)

    def __getitem__(self, sample: int) -> AtomicData:
        """One sample with its graphs.

        Raises:
            InputError: a damaged frame, or one without a graph; names file and frame.
        """
        if sample in self._kept:
            return copy.copy(self._kept[sample])
        reader, frame = self.locate(sample)
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

    def grouped(self, samples: Sequence[int]) -> Int[np.ndarray, " samples"]:
        """Samples in the order that a batch has them: reader by reader, and as given within each."""
        chosen = np.asarray(samples, dtype=np.int64)
        return chosen[np.argsort(np.searchsorted(self.offsets, chosen, side="right"), kind="stable")]

    def batch(self, samples: Sequence[int]) -> AtomicData:
        """The batch of these samples, in the order of `grouped`; of none, one without structures.

        Each reader reads all of its frames at once.

        Raises:
            InputError: as for a single sample.
        """
        return self._batch(self.grouped(samples), self.build) if len(samples) else empty_batch(list(self.graphs))

    def _batch(self, samples: Int[np.ndarray, " samples"], build: bool) -> AtomicData:
        if self.keep:
            return collate([self[int(sample)] for sample in samples])
        readers = np.searchsorted(self.offsets, samples, side="right") - 1
        try:
            parts = []
            for reader in np.unique(readers).tolist():
                part = self.datasets[reader].batch(self.rows[samples[readers == reader]].tolist())
                part.dataset = torch.full((part.num_systems,), self.indices[reader])
                parts.append(part)
            batch = concatenate(parts)
            return add_graphs(batch, self.graphs) if build else batch
        except InputError as error:
            self.blame(samples.tolist())
            raise error

    def blame(self, samples: Sequence[int]) -> None:
        """Read samples one by one, so that the error of a batch names file and frame.

        Raises:
            InputError: of the first sample that has one.
        """
        for sample in samples:
            reader, frame = self.locate(sample)
            try:
                self[sample]
            except InputError as error:
                raise error.at(*self.datasets[reader].place(frame)) from None

    def natoms(self) -> Int[np.ndarray, " samples"]:
        """Atoms of every sample."""
        found = np.zeros(len(self), dtype=np.int32)
        for dataset, start, stop in zip(self.datasets, self.offsets, self.offsets[1:], strict=False):
            rows = self.rows[start:stop]
            if type(dataset).sizes is not Dataset.sizes and len(rows):
                found[start:stop] = dataset.sizes()[rows]
            else:  # asks for every frame, wanted or not
                found[start:stop] = [dataset.natoms(row) for row in rows.tolist()]
        return found

    def nedges(self) -> tuple[Int[np.ndarray, " samples"], Int[np.ndarray, " samples"]]:
        """Atoms of every sample, and edges of its largest graph: reads all samples."""
        atoms, edges = np.zeros(len(self), dtype=np.int32), np.zeros(len(self), dtype=np.int64)
        for start in range(0, len(self), CHUNK):
            samples = np.arange(start, min(start + CHUNK, len(self)))
            batch = self._batch(samples, build=True)
            atoms[samples] = batch.natoms.numpy()
            for name in batch.graph_names():
                edges[samples] = np.maximum(edges[samples], batch[graph_key("nedges", name)].numpy())
        return atoms, edges


class _Caught(TorchDataset[AtomicData | Packed | InputError]):
    """Hands an error over as a batch: raised in a worker, it would arrive as a traceback in place of one line.

    Batches that go elsewhere, to another process or to a GPU, are packed.
    """

    def __init__(self, frames: Frames, part: str, pack: bool) -> None:
        self.frames, self.part, self.pack = frames, part, pack

    def __getitems__(self, samples: list[int]) -> AtomicData | Packed | InputError:
        try:
            batch = self.frames.batch(samples)
        except InputError as error:
            return error
        if samples and not self.frames.build:
            batch.origin = self.part, self.frames.grouped(samples).tolist()  # whom to blame
        return Packed.of(batch) if self.pack or get_worker_info() is not None else batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _raised(batch: AtomicData | Packed | InputError) -> AtomicData | Packed:
    if isinstance(batch, InputError):
        raise batch
    return batch


class ResumableLoader(DataLoader[AtomicData | Packed | InputError]):
    """Batches of frames, with the errors of workers as they were raised.

    Tells Lightning that resuming in mid-epoch is taken care of: the datamodule hands out a loader that skips what was consumed.
    """

    #: Takes batches to the device while the one before is computed with; None leaves that to the trainer.
    copies: "DeviceCopies | None" = None

    def __iter__(self) -> Iterator[AtomicData]:  # type: ignore[override]
        # Lightning makes two iterators an epoch and uses one: workers start with its first batch.
        found = (_raised(batch) for batch in super().__iter__())
        if self.copies is not None:
            packed = (batch for batch in found if isinstance(batch, Packed))
            yield from (batch.unpacked() for batch in ahead(packed, self.copies.send, self.copies.receive))
        else:
            yield from (batch.unpacked() if isinstance(batch, Packed) else batch for batch in found)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see `AtomicDataModule.state_dict`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


def make_loader(frames: Frames, sampler: Any, part: str, *, num_workers: int = 0, device: torch.device | None = None) -> ResumableLoader:
    """The loader of a sampler's batches; to a GPU, batches go through page-locked memory, one ahead of the computation.

    Args:
        frames: whose samples.
        sampler: yields a list of samples for each batch.
        part: what `frames` is called ("train", "val", "test").
        num_workers: processes that make batches.
        device: where they are wanted.
    """
    if num_workers:
        frames.prepare()
    cuda = device is not None and device.type == "cuda"
    loader = ResumableLoader(
        _Caught(frames, part, pack=cuda),
        batch_sampler=sampler,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=cuda,
        # Of its own: seeds of workers must not be drawn from the training's random numbers, which a resumed run has to find as they were.
        generator=torch.Generator(),
    )
    if cuda and device is not None:
        loader.copies = DeviceCopies(device)
    return loader


def ahead(batches: Iterator[Batch], send: Callable[[Batch], Sent], receive: Callable[[Sent], Batch]) -> Iterator[Batch]:
    """Batches, each received when the next one has been sent."""
    waiting: list[Sent] = []
    for batch in batches:
        waiting.append(send(batch))
        if len(waiting) > 1:
            yield receive(waiting.pop(0))
    for sent in waiting:
        yield receive(sent)


class DeviceCopies:
    """Copies to a GPU on a stream of their own, beside the computation.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def send(self, batch: Packed) -> tuple[Packed, torch.cuda.Event]:
        """Begin to copy a batch; the event is when it is there."""
        with torch.cuda.stream(self.stream):
            return batch.to(self.device, non_blocking=True), self.stream.record_event()

    def receive(self, sent: tuple[Packed, torch.cuda.Event]) -> Packed:
        """The batch, for use on the present stream, which waits for it; its memory is not used again before that stream is done."""
        batch, there = sent
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(there)
        batch.block.record_stream(stream)
        return batch
