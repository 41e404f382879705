"""Two processes that train together (gloo, on the CPU): the same batches, the same model, and one voice."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from matfound import unpickle

Entry = dict[str, Any]


@pytest.fixture
def ddp(make_recipe: Callable[[Path], Any], tmp_path: Path) -> Callable[..., Any]:
    """A recipe for so many ranks, in a folder of its own, that records what each of them sees."""

    def make(name: str, ranks: int = 2, **data: Any) -> Any:
        (tmp_path / name).mkdir(exist_ok=True)
        recipe = make_recipe(tmp_path / name)
        recipe.content["trainer"].update(devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=2)
        recipe.content["trainer"]["callbacks"].append(
            {"class_path": "recording.Record", "init_args": {"file": str(recipe.folder / "seen")}}
        )
        recipe.content["data"].update(data)
        return recipe

    return make


@pytest.fixture
def run(server: Any) -> Callable[..., tuple[list[int], str]]:
    """Runs a recipe on its ranks; their exit codes, and what they printed."""

    def start(recipe: Any, *options: str, verb: str = "fit") -> tuple[list[int], str]:
        log = recipe.folder / f"log-{verb}-{len(list(recipe.folder.glob('log-*')))}"
        started = server.start(verb, "--config", recipe.write(), *options, output=log, ranks=recipe.content["trainer"]["devices"])
        started.wait()
        return started.codes, started.text

    return start


def seen(recipe: Any) -> list[Entry]:
    """What all ranks have recorded."""
    return [json.loads(line) for file in sorted(recipe.folder.glob("seen-*")) for line in file.read_text().splitlines()]


def ids(entries: list[Entry], stage: str, epoch: int) -> list[str]:
    return sorted(name for entry in entries if (entry["stage"], entry["epoch"]) == (stage, epoch) for name in entry["ids"])


def steps(entries: list[Entry], stage: str, epoch: int, rank: int) -> list[int]:
    """Structures in each batch of a rank."""
    return [len(entry["ids"]) for entry in entries if (entry["stage"], entry["epoch"], entry["rank"]) == (stage, epoch, rank)]


def history(recipe: Any) -> list[dict[str, float]]:
    state = unpickle.load(recipe.run / "checkpoints/last.ckpt")
    (report,) = (value for key, value in state["callbacks"].items() if key.startswith("RunReport"))
    return [{key: value for key, value in row.items() if "per_second" not in key} for row in report["history"]]


# ----------------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("size", [2, 5])  # with 5, the second rank runs out: of training batches, and of validation batches
def test_two_ranks_train_the_model_of_one(size, ddp, run):
    """... that has their joined batches: weights, averaged weights, losses and metrics agree to rounding."""
    two, one = ddp("two", batch_size=size), ddp("one", ranks=1, batch_size=2 * size)
    for recipe in (two, one):
        recipe.content["trainer"]["precision"] = "64-true"
        codes, text = run(recipe)
        assert not any(codes), text
    entries = seen(two)
    whole = [f"frame-{i}" for i in range(30)]
    for epoch in (0, 1):
        train, val = ids(entries, "train", epoch), ids(entries, "val", epoch)
        assert len(train) == 24 and len(set(train)) == 24 and set(train) <= set(whole)
        assert len(val) == 3 and len(set(val)) == 3 and not set(val) & set(train)
        assert (train, val) == (ids(seen(one), "train", epoch), ids(seen(one), "val", epoch))
        assert len(steps(entries, "train", epoch, 0)) == len(steps(entries, "train", epoch, 1)) == -(-24 // (2 * size))
    assert (steps(entries, "train", 0, 1)[-1], steps(entries, "val", 0, 1)) == ((2, [1]) if size == 2 else (0, [0]))
    for left, right in zip(history(two), history(one), strict=True):
        assert left == pytest.approx(right, rel=1e-9)
    weights, expected = (load_file(recipe.run / "model/model.safetensors") for recipe in (two, one))
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-7, atol=1e-9, equal_nan=True)
    assert yaml.safe_load((two.run / "config.yaml").read_text())["trainer"]["devices"] == 2
    assert sorted(file.name for file in two.run.iterdir()) == ["checkpoints", "config.yaml", "logs", "model", "report.html"]


def test_a_test_sees_every_sample_once(ddp, run):
    recipe = ddp("run", batch_size=1)
    recipe.content["trainer"]["max_steps"] = 1
    assert not any(run(recipe)[0])
    for file in recipe.folder.glob("seen-*"):
        file.unlink()
    codes, text = run(recipe, verb="test")
    assert not any(codes), text
    assert text.count("last.ckpt") == 1 and text.count("energy, MAE") == 1 and "arning" not in text
    found = [name for entry in seen(recipe) for name in entry["ids"]]
    assert len(found) == len(set(found)) == 3 and {entry["stage"] for entry in seen(recipe)} == {"test"}
    assert steps(seen(recipe), "test", 0, 0) == [1, 1] and steps(seen(recipe), "test", 0, 1) == [1, 0]


# ------------------------------------------------------------------------------------------------------------ interruptions


def test_killed_and_resumed(ddp, run):
    """One rank is killed: the other says so. Resumed, the run ends as one that was not interrupted, bit for bit."""
    whole, broken = ddp("whole"), ddp("broken")
    assert not any(run(whole)[0])
    broken.content["trainer"]["callbacks"].append({"class_path": "recording.Fail", "init_args": {"rank": 1, "step": 8, "kill": True}})
    codes, text = run(broken)
    assert codes == [1, -9]
    assert text.splitlines()[-1].startswith("matfound: error: another process of the run has ended (look for why")
    assert "Traceback" not in text
    broken.content["trainer"]["callbacks"].pop()
    codes, text = run(broken, "--ckpt_path", "last")
    assert codes == [0, 0], text
    assert (broken.run / "model/model.safetensors").read_bytes() == (whole.run / "model/model.safetensors").read_bytes()
    assert history(broken) == history(whole)


def test_resumed_on_another_number_of_ranks(ddp, run):
    """Two ranks, then three, then one, within one epoch of eight batches: every sample is trained on once."""
    for n, (ranks, until) in enumerate(((2, 1), (3, 2), (1, -1))):
        recipe = ddp("run", ranks=ranks, batch_size=3)
        recipe.content["trainer"].update(max_epochs=1, max_steps=until)
        codes, text = run(recipe, *(["--ckpt_path", "last"] if n else []))
        assert not any(codes), text
    entries = seen(recipe)
    train = ids(entries, "train", 0)
    assert len(train) == len(set(train)) == 24
    assert [len(steps(entries, "train", 0, rank)) for rank in (0, 1, 2)] == [5, 2, 1]


def test_interrupted(ddp, server, wait_for):
    """Ctrl-C reaches all: one line, and each ends."""
    recipe = ddp("run")
    there = recipe.stop("on_train_batch_start", 3, wait=True)
    started = server.start("fit", "--config", recipe.write(), output=recipe.folder / "log", ranks=2)
    wait_for(there)
    started.kill(signal.SIGINT)
    started.wait()
    assert started.codes[0] == 130 and started.codes[1] in (130, 1)
    assert started.text.count("matfound: interrupted\n") == 1 and "Traceback" not in started.text and "error" not in started.text


# ------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_is_said_once(rank, ddp, run):
    recipe = ddp("run")
    recipe.content["trainer"]["callbacks"].append({"class_path": "recording.Fail", "init_args": {"rank": rank}})
    codes, text = run(recipe)
    assert codes == [1, 1]
    assert text.splitlines() == ["matfound: error: some.extxyz: frame 7: the frame is damaged"]


def test_an_error_of_all_is_said_once(ddp, run):
    codes, text = run(ddp("run", max_atoms=2))
    assert codes == [1, 1]
    assert text.count("\n") == 1 and "the structure has 3 atoms, more than a batch may have (max_atoms: 2)" in text


# ------------------------------------------------------------------------------------------------------------------ command


def test_the_command_starts_its_processes(ddp):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    recipe = ddp("run")
    recipe.content["trainer"].update(max_epochs=1, limit_train_batches=1)
    argv = [str(Path(sys.executable).with_name("matfound")), "fit", "--config", str(recipe.write())]
    process = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    lines = process.stdout.splitlines()
    assert lines[0].startswith("epoch 1/1  100%") and lines[-1].startswith("model: ") and process.stdout.count("epoch") == 1
    assert {entry["rank"] for entry in seen(recipe)} == {0, 1}
    assert (recipe.run / "model/model.safetensors").is_file()
