"""A run that is killed and resumed ends as one that was not."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from matfound import unpickle


def outcome(run: Path) -> tuple[bytes, list[dict[str, float]], dict[str, Any]]:
    """The finished model, the history without its times, and the optimizer."""
    state = unpickle.load(run / "checkpoints/last.ckpt")
    (report,) = (value for key, value in state["callbacks"].items() if key.startswith("RunReport"))
    history = [{key: value for key, value in row.items() if "per_second" not in key} for row in report["history"]]
    return (run / "model/model.safetensors").read_bytes(), history, state["optimizer_states"][0]["state"]


def same(run: Path, other: Path) -> None:
    (weights, history, moments), (other_weights, other_history, other_moments) = outcome(run), outcome(other)
    assert history == other_history
    for moment, other_moment in zip(moments.values(), other_moments.values(), strict=True):
        assert all(torch.equal(moment[key], other_moment[key]) for key in moment)
    assert weights == other_weights


def start(server, recipe, *options: str) -> int:
    run = server.start("fit", "--config", recipe.write(), *options, output=recipe.folder / "log")
    code = run.wait()
    assert code in (0, -9), run.text
    return code


def killed(server, recipe, *stops: tuple[str, int]) -> Path:
    """Run, be killed at each of the stops, be resumed each time."""
    for hook, step in stops:
        recipe.stop(hook, step)
    codes = [start(server, recipe, *(["--ckpt_path", "last"] if n else [])) for n in range(len(stops) + 1)]
    assert codes == [-9] * len(stops) + [0]
    return recipe.run


@pytest.fixture(scope="module")
def whole(server, make_recipe, tmp_path_factory):
    """A run that was not interrupted; with a checkpoint at its end alone."""
    recipe = make_recipe(tmp_path_factory.mktemp("whole"))
    recipe.content["checkpoint"]["every_n_train_steps"] = 1000
    assert start(server, recipe, "--ckpt_path", "last") == 0
    printed = (recipe.folder / "log").read_text()
    assert printed.startswith(f"matfound: nothing to resume in {recipe.run}/checkpoints yet, starting from the beginning\n")
    assert "arning" not in printed and len(printed.splitlines()) < 14
    return recipe.run


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_twice_in_mid_epoch(workers, server, recipe, whole):
    recipe.content["data"]["num_workers"] = workers
    same(whole, killed(server, recipe, ("on_train_batch_end", 8), ("on_before_optimizer_step", 22)))
    assert len(outcome(whole)[1]) == 3


#: How often a checkpoint is written, and where the run is killed.
PLACES: dict[str, tuple[int, tuple[tuple[str, int], ...]]] = {
    "while validating": (3, (("on_validation_batch_end", 12), ("on_validation_start", 24))),
    "with nothing saved": (100, (("on_train_batch_end", 5),)),
    "after saving at the end of an epoch": (12, (("on_train_batch_start", 12),)),
    "before saving at the end of an epoch": (12, (("on_validation_end", 24),)),
    "while writing a checkpoint": (3, (("fsync", 6), ("fsync", 24))),
}


@pytest.mark.parametrize("place", PLACES)
def test_killed(place, server, recipe, whole):
    recipe.content["checkpoint"]["every_n_train_steps"], stops = PLACES[place]
    same(whole, killed(server, recipe, *stops))


#: The same for other trainers.
TRAINERS: dict[str, tuple[dict[str, Any], int, tuple[tuple[str, int], ...]]] = {
    "accumulating gradients, validating within an epoch": (
        {"accumulate_grad_batches": 5, "val_check_interval": 0.25}, 1, (("on_train_batch_start", 2), ("on_validation_batch_end", 5)),
    ),
    "limited in steps": ({"max_epochs": -1, "max_steps": 31}, 6, (("on_train_batch_end", 14), ("on_train_batch_end", 29))),
    "short epochs, rare validation, no averaged weights": (
        {"limit_train_batches": 7, "check_val_every_n_epoch": 2, "callbacks": []}, 7, (("on_validation_start", 14),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TRAINERS)
def test_killed_with(case, server, recipe):
    trainer, recipe.content["checkpoint"]["every_n_train_steps"], stops = TRAINERS[case]
    recipe.content["trainer"].update(trainer)
    whole = recipe.copy("whole")
    assert start(server, whole) == 0
    same(whole.run, killed(server, recipe, *stops))


@pytest.fixture(scope="module")
def store(molecules, tmp_path_factory):
    """The molecules as a store."""
    from matfound.data.convert import convert

    folder = tmp_path_factory.mktemp("store") / "molecules"
    convert(molecules, folder)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_with_a_mixture(workers, server, recipe, store):
    """Files and a store, drawn unevenly, read by workers, and random numbers in training: the same batches and the same weights."""
    data = recipe.content["data"]
    data["datasets"]["stored"] = {"class_path": "matfound.data.store.Store", "init_args": {"paths": str(store)}}
    recipe.content["model"]["potential"]["init_args"]["datasets"] = ["stored", "molecules"]
    data.update(
        split={"molecules": {"fractions": {"train": 0.3, "val": 0.1, "test": 0.1}}, "stored": {"by": "id"}},
        temperature=2.0, samples_per_epoch=44, batch_size=4, cache_frames=0, num_workers=workers,
    )  # fmt: skip
    recipe.content["trainer"]["callbacks"].append({"class_path": "recording.Noise"})
    whole = recipe.copy("whole")
    for one in (whole, recipe):
        one.content["trainer"]["callbacks"].append({"class_path": "recording.Record", "init_args": {"file": str(one.folder / "seen")}})
    assert start(server, whole) == 0
    same(whole.run, killed(server, recipe, ("on_train_batch_end", 8), ("on_before_optimizer_step", 22)))
    expected, found = seen(whole.folder / "seen-0"), seen(recipe.folder / "seen-0")
    assert {key: set(batches) for key, batches in found.items()} == {key: set(batches) for key, batches in expected.items()}
    assert any(len(batches) > 1 for key, batches in found.items() if key[0] == "train")  # some were trained on twice, all alike


def seen(file: Path) -> dict[tuple[str, int, int], list[tuple[str, ...]]]:
    """Structures by stage, epoch and batch, each time that they were seen."""
    found: dict[tuple[str, int, int], list[tuple[str, ...]]] = {}
    for line in file.read_text().splitlines():
        entry = json.loads(line)
        found.setdefault((entry["stage"], entry["epoch"], entry["batch"]), []).append(tuple(entry["ids"]))
    return found


def test_interrupted(server, recipe, whole, wait_for):
    """Ctrl-C: one line, code 130, and nothing is lost. Resumed when finished, it does not train, and keeps the averaged weights."""
    there = recipe.stop("on_train_batch_start", 8, wait=True)
    run = server.start("fit", "--config", recipe.write(), output=recipe.folder / "log")
    wait_for(there)
    run.kill(signal.SIGINT)
    assert run.wait() == 130
    assert run.text.endswith("matfound: interrupted\n") and "Traceback" not in run.text
    assert not (recipe.run / "model").exists()
    for _ in ("to its end", "once more"):
        assert start(server, recipe, "--ckpt_path", "last") == 0
        same(whole, recipe.run)


def test_terminated(server, recipe, wait_for):
    """A batch system's SIGTERM: the batch is finished, code 143."""
    there = recipe.stop("on_train_batch_start", 8, wait=True, seconds=1)
    run = server.start("fit", "--config", recipe.write(), output=recipe.folder / "log")
    wait_for(there)
    run.kill(signal.SIGTERM)
    assert run.wait() == 143
    assert "Traceback" not in run.text
    assert (recipe.run / "checkpoints/last.ckpt").is_file() and not (recipe.run / "model").exists()


def test_full_disk(server, recipe, whole):
    """The write that fails names its file, and leaves the previous one to resume from."""
    recipe.stop("on_train_batch_start", 8)
    start(server, recipe)
    last = recipe.run / "checkpoints/last.ckpt"
    before = last.read_bytes()
    output = recipe.folder / "full"
    run = server.start("fit", "--config", recipe.write(), "--ckpt_path", "last", output=output, limit=len(before) // 2)
    assert run.wait() == 1
    line = run.text.splitlines()[-1]
    assert line.startswith(
        f"matfound: error: {last}: cannot save the checkpoint: File too large; the previous checkpoint there is intact (free"
    )
    assert "Traceback" not in run.text
    assert last.read_bytes() == before and [file.name for file in last.parent.iterdir()] == ["last.ckpt"]
    assert start(server, recipe, "--ckpt_path", "last") == 0
    same(whole, recipe.run)
