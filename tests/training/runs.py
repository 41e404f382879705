"""Runs of `matfound fit` in processes of their own, on a recipe that takes a second."""

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import yaml
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

HERE = Path(__file__).resolve().parent

#: Imports once, then forks a process for every command, or as many as there are ranks, as torchrun would start them: importing torch
#: takes longer than the runs.
SERVER = """
import json, os, resource, signal, socket, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, a CI run say, ignores it
from matfound.cli.main import main
import matfound.cli.lightning, matfound.models.nequip, matfound.data.files, matfound.report.html, matfound.report.plots
from lightning.pytorch.utilities.rank_zero import rank_zero_only
matfound.report.html.Report.figure = lambda self, *args, **options: self  # drawing takes longer than training
print("ready", flush=True)

def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]

def start(command, rank, port):
    process = os.fork()
    if process:
        return process
    output = os.open(command["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    if command["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (command["limit"], command["limit"]))
    if command["ranks"] > 1:
        os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(command["ranks"]), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        rank_zero_only.rank = rank
    code = main(command["argv"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    command = json.loads(line)
    port = free_port()
    processes = [start(command, rank, port) for rank in range(command["ranks"])]
    print(json.dumps(processes), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]), flush=True)
"""


class Run:
    """A command that is running."""

    def __init__(self, server: "Server", output: Path) -> None:
        self.server, self.output = server, output
        self.pids: list[int] = json.loads(server.read())
        self.codes: list[int] = []

    def wait(self, seconds: float = 200) -> int:
        """Its exit code (of the first rank); minus the signal that killed it, as this does when it takes longer than that."""
        alarm = threading.Timer(seconds, self.kill, (signal.SIGKILL,))
        alarm.start()
        try:
            self.codes = json.loads(self.server.read())
        finally:
            alarm.cancel()
        return self.codes[0]

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.output.read_text()

    def kill(self, number: int) -> None:
        for process in self.pids:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(process, number)


class Server:
    """Starts commands, one after another."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(HERE.parent.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
        # Not measured: that takes its time, writes files of its own, and has a handler of SIGTERM.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.read() == "ready"

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, *argv: object, output: Path, limit: int = 0, ranks: int = 1) -> Run:
        """Start `matfound ARGV`, with files of at most `limit` bytes, in as many processes as there are ranks."""
        assert self.process.stdin is not None
        command = {"argv": [str(word) for word in argv], "output": str(output), "limit": limit, "ranks": ranks}
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return Run(self, output)


def molecules(file: Path) -> Path:
    """30 frames of water and methane with labels from pair potentials."""
    rng = np.random.default_rng(0)
    frames = []
    for i in range(30):
        atoms = Atoms("OH2", [[0, 0, 0.1], [0, 0.76, -0.5], [0, -0.76, -0.5]]) if i % 3 else Atoms("CH", [[0, 0, 0], [0, 0, 1.1]])
        atoms.rattle(0.05, seed=i)
        forces = rng.normal(size=(len(atoms), 3))
        energy = -10.0 * len(atoms) + rng.normal()
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces - forces.mean(0))
        atoms.info["frame_id"] = f"frame-{i}"
        frames.append(atoms)
    ase.io.write(file, frames, format="extxyz")
    return file


class Recipe:
    """The recipe of a run in a folder."""

    def __init__(self, folder: Path, molecules: Path) -> None:
        self.folder = folder
        self.content: dict[str, Any] = yaml.safe_load(RECIPE)
        self.content["trainer"]["default_root_dir"] = str(folder / "run")
        self.content["data"]["datasets"]["molecules"]["init_args"]["paths"] = str(molecules)

    def copy(self, name: str) -> "Recipe":
        """The same for another folder."""
        other = copy.copy(self)
        other.folder = self.folder / name
        other.folder.mkdir()
        other.content = copy.deepcopy(self.content)
        other.content["trainer"]["default_root_dir"] = str(other.folder / "run")
        return other

    def stop(self, hook: str, step: int, *, wait: bool = False, seconds: float = 100) -> Path:
        """Stop the run at a point, once. Returns the file that shows when it has come there."""
        file = self.folder / f"stopped-{hook}-{step}"
        arguments = {"hook": hook, "step": step, "file": str(file), "wait": wait, "seconds": seconds}
        self.content["trainer"]["callbacks"].append({"class_path": "interruptions.Stop", "init_args": arguments})
        return file

    def write(self) -> Path:
        file = self.folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(self.content, sort_keys=False))
        return file

    @property
    def run(self) -> Path:
        return self.folder / "run"


RECIPE = """
seed_everything: 7
trainer:
  max_epochs: 3
  accelerator: cpu
  gradient_clip_val: 10.0
  num_sanity_val_steps: 0
  callbacks:
    - class_path: lightning.pytorch.callbacks.EMAWeightAveraging
      init_args: {decay: 0.8, use_buffers: false}
model:
  potential:
    class_path: matfound.models.base.Potential
    init_args:
      backbone:
        class_path: matfound.models.nequip.NequIP
        init_args: {cutoff: 3.0, num_layers: 1, irreps: 4x0e+2x1o, lmax: 1, radial_hidden: [4]}
      heads:
        energy: {class_path: matfound.nn.heads.EnergyHead, init_args: {hidden: [4]}}
      datasets: [molecules]
  targets:
    - {field: energy}
    - {field: forces, weight: 5.0}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
  lr_scheduler: {class_path: matfound.training.optim.WarmupCosine}
data:
  datasets:
    molecules: {class_path: matfound.data.files.FileDataset, init_args: {paths: FILE}}
  batch_size: 2
checkpoint: {every_n_train_steps: 3}
"""
