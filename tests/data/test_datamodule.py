"""Splits, graphs, batches and the cache of the datamodule; resuming is in tests/training."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import ase.io
import pytest
import torch

from matfound.data import datamodule
from matfound.data.datamodule import AtomicDataModule, Frames, SplitConfig
from matfound.data.files import FileDataset
from matfound.errors import InputError
from matfound.graphs.neighbors import add_graphs
from matfound.graphs.spec import GraphSpec
from matfound.structures.atomic_data import AtomicData

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
        current_epoch=0,
        world_size=1,
        reload_dataloaders_every_n_epochs=1,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )
    return data


def ids(batches: Any) -> list[list[str]]:
    return [list(batch["id"]) for batch in batches]


def flat(batches: Any) -> list[str]:
    return [name for batch in ids(batches) for name in batch]


def same(left: AtomicData, right: AtomicData) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(left[k], right[k]) if isinstance(left[k], torch.Tensor) else left[k] == right[k] for k in left.keys())


@pytest.fixture
def searches(monkeypatch):
    """Counts how often graphs are built."""
    calls = []
    monkeypatch.setattr(datamodule, "add_graphs", lambda data, graphs: calls.append(data.id) or add_graphs(data, graphs))
    return calls


# ---------------------------------------------------------------------------------------------------------------------- splits


def test_random_split(dataset):
    splits = module({"cu": dataset}).splits()["cu"]
    assert [len(splits[part]) for part in ("train", "val", "test")] == [6, 3, 3]
    assert sorted(i for frames in splits.values() for i in frames) == list(range(12))
    assert splits != module({"cu": dataset}, split=SplitConfig(fractions=ALL, seed=1)).splits()["cu"]


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
    assert data.splits() == {"cu": {"train": [3, 1], "val": [2]}}
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
    assert data.splits() == {"cu": {"train": [2, 0], "val": [4]}}
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
    splits = data.splits()["cu"]
    assert [frame for _, frame in data.frames("train").frames] == splits["train"] + splits["val"]


# --------------------------------------------------------------------------------------------------------------------- samples


def test_samples_have_graphs_and_their_dataset(dataset):
    data = module({"a": dataset, "b": FileDataset(dataset.sources[0].file)}, vocabulary=["b", "other", "a"])
    assert [reader.name for reader in data.readers.values()] == ["a", "b"]
    part = data.frames("train")
    assert len(part) == 12
    assert [int(part[i].dataset) for i in (0, 6)] == [2, 0]
    sample, (_, frame) = part[3], part.frames[3]
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
    assert state == {"epoch": 2, "consumed": 1}
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
    data.trainer.world_size = 4
    with pytest.raises(InputError, match="batches are made for one process, received 4"):
        data.setup("fit")


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
