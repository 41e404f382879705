"""Splits, graphs, batches and the cache of the datamodule; resuming is in tests/training."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import ase.io
import numpy as np
import pytest
import torch

from matfound.data import frames as frames_module
from matfound.data.datamodule import AtomicDataModule, SplitConfig, shares
from matfound.data.files import FileDataset
from matfound.data.frames import Frames, ahead
from matfound.errors import InputError
from matfound.graphs import neighbors
from matfound.graphs.neighbors import add_graphs
from matfound.graphs.spec import GraphSpec
from matfound.structures.atomic_data import AtomicData, collate

GRAPHS = {"main": GraphSpec(3.0), "wide": GraphSpec(4.0)}
ALL = {"train": 0.5, "val": 0.25, "test": 0.25}


@pytest.fixture
def dataset(frames, tmp_path):
    """Twelve copper cells from a file."""
    file = tmp_path / "cu.extxyz"
    ase.io.write(file, frames, format="extxyz")
    return FileDataset(str(file))


class Potential:
    """What a datamodule asks of a model."""

    def __init__(self, datasets: list[str]) -> None:
        self.datasets, self.graphs, self.dataset_index = datasets, dict(GRAPHS), datasets.index


def module(datasets: dict[str, Any], vocabulary: list[str] | None = None, **options: Any) -> AtomicDataModule:
    """A datamodule that a trainer uses."""
    options = {"split": SplitConfig(fractions=ALL), "batch_size": 2} | options
    data = AtomicDataModule(datasets, **options)
    progress = SimpleNamespace(current=SimpleNamespace(processed=0))
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(potential=Potential(vocabulary or list(datasets))),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        current_epoch=0,
        global_rank=0,
        world_size=1,
        reload_dataloaders_every_n_epochs=1,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )
    return data


def ids(batches: Any) -> list[list[str]]:
    return [list(batch["id"]) for batch in batches]


def flat(batches: Any) -> list[str]:
    return [name for batch in ids(batches) for name in batch]


def parts(data: AtomicDataModule, dataset: str = "cu") -> dict[str, list[int]]:
    return {part: frames.tolist() for part, frames in data.splits()[dataset].items()}


def same(left: AtomicData, right: AtomicData) -> bool:
    assert sorted(left.keys()) == sorted(right.keys())
    return all(torch.equal(left[k], right[k]) if isinstance(left[k], torch.Tensor) else left[k] == right[k] for k in left.keys())


@pytest.fixture
def searches(monkeypatch):
    """Counts how often graphs are built."""
    calls = []

    def counted(data: AtomicData, graphs: Any) -> AtomicData:
        calls.extend(data.id if data.is_batch else [data.id])
        return add_graphs(data, graphs)

    monkeypatch.setattr(frames_module, "add_graphs", counted)
    return calls


# ---------------------------------------------------------------------------------------------------------------------- splits


def test_random_split(dataset):
    splits = parts(module({"cu": dataset}))
    assert [len(splits[part]) for part in ("train", "val", "test")] == [6, 3, 3]
    assert sorted(i for frames in splits.values() for i in frames) == list(range(12))
    assert splits != parts(module({"cu": dataset}, split=SplitConfig(fractions=ALL, seed=1)))


def test_split_by_key_keeps_a_key_together(dataset):
    splits = module({"cu": dataset}, split=SplitConfig(fractions={"train": 0.6, "val": 0.4}, by="group")).splits()["cu"]
    groups = {part: {i % 3 for i in frames} for part, frames in splits.items()}
    assert groups["train"].isdisjoint(groups["val"]) and groups["train"] | groups["val"] == {0, 1, 2}


def test_stratified_split_shares_out_each_key(dataset):
    splits = module({"cu": dataset}, split=SplitConfig(fractions={"train": 0.5, "val": 0.5}, stratify="config_type")).splits()["cu"]
    assert sorted(i % 2 for i in splits["train"]) == [0, 0, 0, 1, 1, 1]


def test_split_by_file(dataset, tmp_path):
    file = tmp_path / "split.json"
    file.write_text(json.dumps({"cu": {"train": ["cu-3", "cu-1"], "val": ["cu-2"]}}))
    data = module({"cu": dataset}, split=SplitConfig(file=str(file)))
    assert parts(data) == {"train": [3, 1], "val": [2]}
    assert len(data.frames("test")) == 0
    assert data.test_dataloader() == []


def test_split_by_file_and_frame(frames, tmp_path):
    """Frame ids need not be unique where a split goes by file and frame."""
    files = [tmp_path / folder / "cu.extxyz" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        ase.io.write(file, frames[:3], format="extxyz")
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"cu": {"train": [f"{files[0]}#2", f"{files[0]}#0"], "val": [f"{files[1]}#1"]}}))
    data = module({"cu": FileDataset([str(file) for file in files])}, split=SplitConfig(file=str(split), key="file_frame"))
    assert parts(data) == {"train": [2, 0], "val": [4]}
    part = module({"cu": FileDataset(str(files[1]), index="1:")})
    assert part.readers["cu"].keys("file_frame") == [f"{files[1]}#1", f"{files[1]}#2"]


def test_bad_splits(dataset, tmp_path):
    with pytest.raises(InputError, match="either by a key or stratified, received by='group' and stratify='config_type'"):
        SplitConfig(by="group", stratify="config_type")
    with pytest.raises(InputError, match="no frame has the key 'grup' .*did you mean 'group'"):
        module({"cu": dataset}, split=SplitConfig(by="grup")).splits()
    with pytest.raises(InputError, match=r"split\.json: no such file"):
        module({"cu": dataset}, split=SplitConfig(file=str(tmp_path / "split.json"))).splits()
    with pytest.raises(InputError, match="there are no frames in trian .*did you mean 'train'"):
        module({"cu": dataset}, train=["trian"]).frames("train")


def test_several_parts_can_be_trained_on(dataset):
    data = module({"cu": dataset}, train=["train", "val"])
    assert data.frames("train").rows.tolist() == parts(data)["train"] + parts(data)["val"]


# --------------------------------------------------------------------------------------------------------------------- samples


def test_samples_have_graphs_and_their_dataset(dataset):
    data = module({"a": dataset, "b": FileDataset(dataset.sources[0].file)}, vocabulary=["b", "other", "a"])
    assert [reader.name for reader in data.readers.values()] == ["a", "b"]
    part = data.frames("train")
    assert len(part) == 12
    assert [int(part[i].dataset) for i in (0, 6)] == [2, 0]
    sample, (reader, frame) = part[3], part.locate(3)
    assert reader == 0 and part.locate(6)[0] == 1
    expected = add_graphs(dataset.get(frame), GRAPHS)
    for name in ("edge_index", "edge_index@wide", "edge_shift", "edge_perm@wide", "energy", "forces"):
        assert torch.equal(sample[name], expected[name])
    assert "edge_index" not in dataset.get(frame) and "dataset" not in dataset.get(frame)
    assert part.place(3) == (dataset.sources[0].file, frame)


def test_a_dataset_that_the_model_does_not_know(dataset):
    with pytest.raises(InputError, match="a dataset 'cooper' that the model's vocabulary lacks .*did you mean 'copper'"):
        module({"cooper": dataset}, vocabulary=["copper", "gold"]).frames("train")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cache", [0, 100])
def test_errors_name_file_and_frame(workers, cache, frames, tmp_path):
    frames[5].positions[1] = frames[5].positions[0]
    file = tmp_path / "cu.extxyz"
    ase.io.write(file, frames, format="extxyz")
    data = module({"cu": FileDataset(str(file))}, num_workers=workers, split=SplitConfig(fractions={"train": 1.0}), cache_frames=cache)
    with pytest.raises(InputError) as error:
        list(data.train_dataloader())
    assert str(error.value).startswith(f"{file}: frame 5: atoms 0 and 1 are in the same place")
    assert "\n" not in str(error.value)


def test_statistics_from_some_samples(dataset):
    data = module({"cu": dataset}, split=SplitConfig(fractions={"train": 1.0}), statistics_frames=5)
    assert [sample.id for sample in data.samples("train")] == [f"cu-{i}" for i in (0, 3, 6, 9)]
    data.statistics_frames = 12
    assert len(list(data.samples("train"))) == 12


# --------------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("budget", [{"batch_size": 5}, {"batch_size": None, "max_atoms": 16}, {"batch_size": 3, "max_edges": 900}])
def test_budgets(budget, dataset):
    data = module({"cu": dataset}, split=SplitConfig(fractions={"train": 1.0}), **budget)
    batches = list(data.train_dataloader())
    assert len(batches) == data.batches_per_epoch()
    assert sorted(flat(batches)) == sorted(f"cu-{i}" for i in range(12))
    assert max(batch.num_systems for batch in batches) <= (budget["batch_size"] or 12)
    assert max(batch.num_nodes for batch in batches) <= budget.get("max_atoms", 999)
    # the largest graph counts
    assert max(batch["edge_index@wide"].shape[1] for batch in batches) <= budget.get("max_edges", 99999)


def test_a_frame_that_is_too_large(dataset):
    data = module({"cu": dataset}, batch_size=None, max_atoms=7)
    with pytest.raises(InputError, match=r"cu\.extxyz: frame \d+: the structure has 8 atoms"):
        data.train_dataloader()
    with pytest.raises(InputError, match=r"cu\.extxyz: frame \d+: the structure has 8 atoms"):
        data.setup("fit")  # before the first epoch, not after it


def test_evaluation_is_in_order_with_batches_of_its_own(dataset):
    data = module({"cu": dataset}, batch_size=1, eval_batch_size=2)
    val = [f"cu-{i}" for i in data.splits()["cu"]["val"]]
    assert ids(data.val_dataloader()) == [val[:2], val[2:]]
    assert flat(data.test_dataloader()) == [f"cu-{i}" for i in data.splits()["cu"]["test"]]
    assert [len(batch) for batch in ids(data.train_dataloader())] == [1] * 6


def test_workers_change_nothing(dataset):
    def batches(workers: int, cache: int) -> list[AtomicData]:
        data = module({"cu": dataset}, num_workers=workers, cache_frames=cache)
        return [*data.train_dataloader(), *data.val_dataloader()]

    alone = batches(0, 0)
    for workers, cache in ((2, 0), (2, 100), (0, 100)):
        others = batches(workers, cache)
        assert len(others) == len(alone) and all(map(same, alone, others))


def test_each_epoch_has_its_order(dataset):
    data = module({"cu": dataset}, seed=3)
    first = ids(data.train_dataloader())
    assert ids(data.train_dataloader()) == first
    data.trainer.current_epoch = 1
    assert ids(data.train_dataloader()) != first
    data.trainer.current_epoch = 0
    assert ids(data.train_dataloader()) == first


def test_resumed_loader_goes_on_where_training_was(dataset):
    data = module({"cu": dataset})
    data.trainer.current_epoch, data.trainer.fit_loop.epoch_loop.batch_progress.current.processed = 2, 1
    state = data.state_dict()
    assert state == {"epoch": 2, "consumed": 1, "steps": 1}
    whole = ids(data.train_dataloader())
    resumed = module({"cu": dataset})
    resumed.load_state_dict(state)
    resumed.trainer.current_epoch = 2
    loader = resumed.train_dataloader()
    assert ids(loader) == whole[1:]
    assert len(loader) == len(whole)
    assert loader.state_dict() == {} and loader.load_state_dict({}) is None
    resumed.trainer.current_epoch = data.trainer.current_epoch = 3
    assert ids(resumed.train_dataloader()) == ids(data.train_dataloader())


def test_what_lightning_must_do(dataset):
    data = module({"cu": dataset})
    data.trainer.reload_dataloaders_every_n_epochs = 0
    with pytest.raises(InputError, match="reloads data every 0 epochs.*set trainer.reload_dataloaders_every_n_epochs to 1"):
        data.train_dataloader()


def test_nothing_to_evaluate(dataset):
    data = module({"cu": dataset}, split=SplitConfig(fractions={"train": 1.0}))
    data.setup("fit")
    assert data.val_dataloader() == []
    with pytest.raises(InputError, match=r"there are no frames in test \(the split has train\)"):
        data.setup("test")
    with pytest.raises(InputError, match="there are no frames in val"):
        data.setup("validate")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datasets": {}}, "data.datasets is empty"),
        ({"batch_size": None}, "no batch budget is set"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"eval_batch_size": 0}, "batch_size must be at least 1"),
        ({"statistics_frames": 0}, "statistics_frames must be at least 1"),
        ({"num_workers": -1}, "data.num_workers must not be negative, received -1"),
        ({"seed": -1}, "data.seed must not be negative"),
        ({"cache_frames": -1}, "data.cache_frames must not be negative"),
    ],
)
def test_bad_arguments(options, message, dataset):
    with pytest.raises(InputError, match=message):
        module(**({"datasets": {"cu": dataset}} | options))


# ----------------------------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("workers", [0, 1])
def test_graphs_are_built_once(workers, dataset, searches):
    data = module({"cu": dataset}, num_workers=workers)
    list(data.samples("train"))  # statistics
    assert len(searches) == 6
    for epoch in range(3):
        data.trainer.current_epoch = epoch
        assert len(list(data.train_dataloader())) == 3
        list(data.val_dataloader())
    assert sorted(searches) == sorted(f"cu-{i}" for part in ("train", "val") for i in data.splits()["cu"][part])


def test_parts_that_are_too_large_are_not_kept(dataset, searches):
    data = module({"cu": dataset}, cache_frames=5)  # train has 6 frames, val 3
    for _ in range(2):
        list(data.train_dataloader())
        list(data.val_dataloader())
    assert len(searches) == 2 * 6 + 3


def test_memory_is_limited(dataset, searches, monkeypatch):
    monkeypatch.setattr(Frames, "KEPT_BYTES", 1)
    data = module({"cu": dataset})
    for _ in range(2):
        list(data.train_dataloader())
    assert len(searches) == 6 + 5  # the first of them is kept, and then it is enough
    data.frames("train").prepare()
    assert len(searches) == 11


def test_what_is_kept_is_not_changed_by_batches(dataset):
    data = module({"cu": dataset}, batch_size=1)
    first = [batch.to_list() for batch in data.train_dataloader()]
    for batch in data.train_dataloader():  # a training step may do what it likes with a batch
        for key in batch.keys():
            if isinstance(batch[key], torch.Tensor):
                batch[key].zero_()
    sample = data.frames("train")[0]
    sample.extra, sample.pos = 1, None
    again = [batch.to_list() for batch in data.train_dataloader()]
    assert all(same(old, new) for olds, news in zip(first, again, strict=True) for old, new in zip(olds, news, strict=True))
    assert "extra" not in data.frames("train")[0]


def test_another_model_gets_its_own_graphs(dataset):
    data = module({"cu": dataset})
    part = data.frames("train")
    assert data.frames("train") is part
    data.trainer.lightning_module.potential = Potential(["cu"])
    assert data.frames("train") is part
    data.trainer.lightning_module.potential.graphs = {"main": GraphSpec(2.7)}
    assert data.frames("train") is not part
    assert data.frames("train")[0].edge_index.shape[1] < part[0].edge_index.shape[1]


def test_split_config_is_a_plain_dataclass():
    assert dataclasses.asdict(SplitConfig())["fractions"] == {"train": 0.8, "val": 0.1, "test": 0.1}


# -------------------------------------------------------------------------------------------------------------- whole batches


class Whole(FileDataset):
    """Reads batches as a store does: at once. A frame in `bad` cannot be read."""

    bad: tuple[int, ...] = ()

    def get(self, i: int) -> AtomicData:
        if i in self.bad:
            raise InputError("the frame is damaged")
        return super().get(i)

    def batch(self, indices: Any) -> AtomicData:
        self.asked = [*getattr(self, "asked", []), list(indices)]
        if set(indices) & set(self.bad):
            raise InputError("a block is damaged")
        return collate([FileDataset.get(self, i) for i in indices])

    def sizes(self) -> np.ndarray:
        return np.array([4 * (1 + i % 2) for i in range(len(self))], dtype=np.int64)


def pair(dataset: FileDataset, **options: Any) -> AtomicDataModule:
    """Two readers of the same file, one of whole batches; nothing is kept."""
    file = dataset.sources[0].file
    return module({"a": FileDataset(file), "b": Whole(file)}, cache_frames=0, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_readers_are_asked_for_whole_batches(workers, dataset):
    """In the order of the datasets, and as drawn within each; the same as sample by sample, however they are read."""
    data = pair(dataset, batch_size=5, num_workers=workers)
    frames, sampler = data.frames("train"), data._train_sampler(0)
    batches = list(data.train_dataloader())
    for batch, samples in zip(batches, sampler, strict=True):
        ordered = [s for s in samples if s < 6] + [s for s in samples if s >= 6]
        assert same(batch, collate([frames[s] for s in ordered]))
        assert batch.dataset.tolist() == sorted(batch.dataset.tolist())
    if not workers:
        asked = [[int(frames.rows[s]) for s in samples if s >= 6] for samples in sampler]
        assert data.readers["b"].asked == [rows for rows in asked if rows]


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_whole_batches_name_file_and_frame(workers, dataset):
    data = pair(dataset, batch_size=5, num_workers=workers)
    row = int(data.splits()["b"]["train"][2])
    data.readers["b"].bad = (row,)
    with pytest.raises(InputError, match=rf"cu\.extxyz: frame {row}: the frame is damaged"):
        list(data.train_dataloader())
    monkey = data.frames("train")
    monkey.datasets[1].get = monkey.datasets[0].get  # type: ignore[method-assign]  # a batch that cannot be read, of samples that can
    with pytest.raises(InputError, match="^a block is damaged"):
        monkey.batch(range(12))


def test_sizes_come_from_the_reader(dataset, monkeypatch):
    data = pair(dataset, batch_size=None, max_atoms=16)
    monkeypatch.setattr(Whole, "natoms", None)
    natoms, _ = data._count(data.frames("train"))
    assert natoms.tolist() == [data.frames("train")[i].num_nodes for i in range(12)]
    assert max(batch.num_nodes for batch in data.train_dataloader()) <= 16


def test_labels_that_one_dataset_lacks(dataset, frames, tmp_path):
    for atoms in frames:
        del atoms.calc.results["forces"], atoms.calc.results["stress"]
    file = tmp_path / "energies.extxyz"
    ase.io.write(file, frames, format="extxyz")
    data = module({"a": dataset, "b": FileDataset(str(file))}, cache_frames=0, batch_size=12)
    (batch,) = data.train_dataloader()
    rows = batch.dataset[batch.batch]
    assert torch.isnan(batch.forces).all(1).tolist() == (rows == 1).tolist()
    assert not torch.isnan(batch.energy).any()


# -------------------------------------------------------------------------------------------------------------- several sets


def test_a_split_for_each_dataset(dataset):
    split = {"a": {"fractions": {"train": 0.5, "test": 0.5}, "seed": 3}, "b": SplitConfig(by="group", fractions={"train": 0.5, "val": 0.5})}
    data = pair(dataset, split=split)
    assert set(parts(data, "a")) == {"train", "test"} and set(parts(data, "b")) == {"train", "val"}
    assert parts(data, "a") == parts(pair(dataset, split=SplitConfig(fractions={"train": 0.5, "test": 0.5}, seed=3)), "a")
    assert len(data.frames("val")) == len(parts(data, "b")["val"])
    assert [data.frames("val").locate(i)[0] for i in range(len(data.frames("val")))] == [1] * len(data.frames("val"))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"a": {}, "c": {}}, r"data.split has 'c', which is no dataset"),
        ({"a": {}}, r"data.split lacks 'b' \(give every dataset a split, or one for all\)"),
        ({"a": {}, "b": {"sed": 3}}, r"data.split.b: unknown key 'sed' \(did you mean 'seed'"),
        ({"a": {}, "b": {"seed": "x"}}, r"data.split.b.seed: expected a whole number, received 'x'"),
        ({"a": {}, "b": {"fractions": 0.5}}, r"data.split.b.fractions: expected a share for each part, received 0.5"),
        ({"a": {}, "b": {"by": 3}}, r"data.split.b.by: expected a text, received 3"),
    ],
)
def test_bad_splits_of_datasets(split, message, dataset):
    with pytest.raises(InputError, match=message):
        pair(dataset, split=split)


def test_mixture(dataset):
    data = pair(dataset, weights={"a": 1.0, "b": 3.0}, samples_per_epoch=8, batch_size=3)
    assert data.batches_per_epoch() == 3
    seen: dict[int, list[str]] = {0: [], 1: []}
    for epoch in range(3):
        data.trainer.current_epoch = epoch
        for batch in data.train_dataloader():
            for name, index in zip(batch.id, batch.dataset.tolist(), strict=True):
                seen[index].append(name)
    assert [len(seen[0]), len(seen[1])] == [3 * 2, 3 * 6]
    assert sorted(seen[0]) == sorted(f"cu-{i}" for i in parts(data, "a")["train"])  # one walk, over three epochs
    assert sorted(seen[1]) == sorted(3 * [f"cu-{i}" for i in parts(data, "b")["train"]])
    data.trainer.current_epoch, data.trainer.fit_loop.epoch_loop.batch_progress.current.processed = 2, 1
    resumed = pair(dataset, weights={"a": 1.0, "b": 3.0}, samples_per_epoch=8, batch_size=3)
    resumed.load_state_dict(data.state_dict())
    resumed.trainer.current_epoch = 2
    assert ids(resumed.train_dataloader()) == ids(data.train_dataloader())[1:]


def test_a_dataset_without_weight_is_not_trained_on(dataset):
    data = pair(dataset, weights={"a": 0.0, "b": 1.0})
    assert {int(sample.dataset) for sample in data.samples("train")} == {1}
    assert {index for batch in data.train_dataloader() for index in batch.dataset.tolist()} == {1}
    assert {index for batch in data.val_dataloader() for index in batch.dataset.tolist()} == {0, 1}


def test_a_mixture_that_makes_no_sense_is_refused_before_much_is_read(dataset, searches):
    data = pair(dataset, weights={"a": 1.0, "b": 1e-9})
    with pytest.raises(InputError, match="an epoch of 12 samples has none of 'b'"):
        list(data.samples("train"))
    assert searches == []
    with pytest.raises(InputError, match="data.weights lacks 'b'"):
        pair(dataset, weights={"a": 1.0})


def test_statistics_are_shared_out(dataset):
    """A small set is not drowned by a large one."""
    assert shares(np.array([1000, 10]), 100).tolist() == [90, 10]
    assert shares(np.array([10, 1000, 0, 500]), 100).tolist() == [10, 45, 0, 45]
    assert shares(np.array([10, 1000]), 2000).tolist() == [10, 1000]
    assert shares(np.array([50, 60, 70]), 2).tolist() == [1, 1, 1]
    split = {"a": {"fractions": {"train": 1.0}}, "b": {"fractions": {"train": 0.2, "val": 0.8}}}
    data = pair(dataset, split=split, statistics_frames=8)
    assert [int(sample.dataset) for sample in data.samples("train")] == [0] * 6 + [1] * 2


# ---------------------------------------------------------------------------------------------------------- graphs, and where


def test_graphs_on_the_device(dataset, searches):
    """Built after the copy, they are those that workers build."""
    here, there = pair(dataset, batch_size=5, graphs="workers"), pair(dataset, batch_size=5, graphs="device")
    expected = list(here.train_dataloader())
    searches.clear()
    raw = list(there.train_dataloader())
    assert searches == [] and not any("edge_index" in batch for batch in raw)
    moved = [there.transfer_batch_to_device(batch, torch.device("cpu"), 0) for batch in raw]
    assert all(map(same, [there.on_after_batch_transfer(batch, 0) for batch in moved], expected))
    assert all(map(same, there.all_batches("val"), here.all_batches("val")))
    assert searches and all(same(here.on_after_batch_transfer(batch, 0), batch) for batch in expected)


def test_errors_on_the_device_name_file_and_frame(frames, tmp_path):
    frames[5].positions[1] = frames[5].positions[0]
    file = tmp_path / "cu.extxyz"
    ase.io.write(file, frames, format="extxyz")
    everything = SplitConfig(fractions={"train": 1.0})
    data = module({"cu": FileDataset(str(file))}, split=everything, cache_frames=0, graphs="device", batch_size=12)
    (batch,) = data.train_dataloader()
    with pytest.raises(InputError, match=r"cu\.extxyz: frame 5: atoms 0 and 1 are in the same place"):
        data.on_after_batch_transfer(batch, 0)


@pytest.mark.parametrize(
    ("device", "graphs", "workers", "cache", "expected"),
    [
        ("cpu", "auto", 0, 0, False),
        ("cuda", "auto", 0, 0, True),
        ("cuda", "auto", 2, 0, True),
        ("cuda", "workers", 2, 0, False),
        ("cpu", "device", 0, 0, True),
        ("cuda", "auto", 0, 100, False),  # what is kept has its graphs
    ],
)
def test_where_graphs_are_built(device, graphs, workers, cache, expected, dataset):
    data = module({"cu": dataset}, graphs=graphs, num_workers=workers, cache_frames=cache)
    data.trainer.strategy.root_device = torch.device(device)
    assert data.frames("train").build is not expected


def test_a_search_by_structure_is_left_to_workers(dataset, monkeypatch):
    monkeypatch.setattr(neighbors, "has_batched_search", lambda device: False)
    for workers, expected in ((0, True), (2, False)):
        data = module({"cu": dataset}, num_workers=workers, cache_frames=0)
        data.trainer.strategy.root_device = torch.device("cuda")
        assert data.frames("train").build is not expected


# ----------------------------------------------------------------------------------------------------------------------- ranks


def ranked(dataset: FileDataset, rank: int, world: int, **options: Any) -> AtomicDataModule:
    data = module({"cu": dataset}, **options)
    data.trainer.global_rank, data.trainer.world_size = rank, world
    return data


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_see_everything_once(world, dataset):
    parts_of = [ranked(dataset, rank, world) for rank in range(world)]
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        shares_of = [list(getattr(data, loader)()) for data in parts_of]
        assert len({len(batches) for batches in shares_of}) == 1
        alone = flat(getattr(module({"cu": dataset}), loader)())
        assert sorted(name for batches in shares_of for name in flat(batches)) == sorted(alone)
    empty = list(parts_of[-1].val_dataloader())[-1]
    if world != 2:
        assert empty.num_systems == 0 and empty.graph_names() == ["main", "wide"]
    assert all(same(a, b) for a, b in zip(parts_of[-1].all_batches("val"), module({"cu": dataset}).all_batches("val"), strict=True))
    assert {data.batches_per_epoch() for data in parts_of} == {-(-3 // world)}


def test_resumed_with_other_ranks(dataset):
    options = {"batch_size": 1}
    whole = flat(module({"cu": dataset}, **options).train_dataloader())
    first = ranked(dataset, 0, 2, **options)
    first.trainer.fit_loop.epoch_loop.batch_progress.current.processed = 1
    state = first.state_dict()
    assert state == {"epoch": 0, "consumed": 2, "steps": 1}
    second = [ranked(dataset, rank, 3, **options) for rank in range(3)]
    loaders = []
    for data in second:
        data.load_state_dict(state)
        loaders.append(data.train_dataloader())
    assert [len(loader) for loader in loaders] == [1 + 2] * 3
    shares_of = [ids(loader) for loader in loaders]
    assert [name for step in zip(*shares_of, strict=True) for batch in step for name in batch] == whole[2:]
    second[0].trainer.fit_loop.epoch_loop.batch_progress.current.processed = 2
    assert second[0].state_dict() == {"epoch": 0, "consumed": 5, "steps": 2}
    old = module({"cu": dataset}, **options)
    old.load_state_dict({"epoch": 0, "consumed": 4})  # as it was written when there was one rank
    assert flat(old.train_dataloader()) == whole[4:]


# ---------------------------------------------------------------------------------------------------------------------- copies


def test_one_ahead():
    """The next batch is on its way when one is handed out, and none gets lost at the end or before an error."""
    told: list[str] = []

    def batches() -> Any:
        yield from "abc"

    def fails() -> Any:
        yield "a"
        raise InputError("the frame is damaged")

    def send(batch: str) -> str:
        told.append(f"send {batch}")
        return batch.upper()

    for batch in ahead(batches(), send, str.lower):
        told.append(f"use {batch}")
    assert told == ["send a", "send b", "use a", "send c", "use b", "use c"]
    assert list(ahead(iter([]), send, str.lower)) == []
    with pytest.raises(InputError, match="the frame is damaged"):
        list(ahead(fails(), send, str.lower))


def test_no_streams_on_the_cpu(dataset):
    loader = module({"cu": dataset}).train_dataloader()
    assert loader.copies is None and not loader.pin_memory
    state = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), state)  # a resumed run makes one loader more


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("graphs", ["workers", "device"])
def test_copies_to_a_gpu(workers, graphs, dataset):
    """Batches on the GPU are those of the CPU, also when the memory of earlier ones is used again while a kernel runs."""
    expected = list(pair(dataset, batch_size=2).train_dataloader())
    data = pair(dataset, batch_size=2, num_workers=workers, graphs=graphs)
    data.trainer.strategy.root_device = device = torch.device("cuda")
    loader = data.train_dataloader()
    assert loader.pin_memory and loader.copies is not None
    sums = []
    busy = torch.randn(4000, 4000, device=device)
    for copied in loader:
        assert copied.pos.is_cuda
        batch = data.on_after_batch_transfer(data.transfer_batch_to_device(copied, device, 0), 0)
        for _ in range(10):
            busy = (busy @ busy).tanh()  # the copy of the next batch has to wait for nothing of this, and this not for the copy
        sums.append((batch.pos.sum(0) + 0 * busy.sum(), batch.cpu()))
    for batch, (total, copy) in zip(expected, sums, strict=True):
        torch.testing.assert_close(total.cpu(), batch.pos.sum(0))
        assert sorted(copy.keys()) == sorted(batch.keys())
        assert torch.equal(copy.pos, batch.pos) and torch.equal(copy.edge_index, batch.edge_index)
