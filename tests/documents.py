"""Runs what documents show, each in a process of its own, forked from one that has imported everything: importing takes longer than most of
them, and neither shapes nor coverage are checked there, which would take longer still.

python documents.py reads commands, JSON lines {kind, path, folder, log}, and prints the exit code of each.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import ase.build
import ase.cli.main
import ase.io

from matfound.cli.main import main

REPO = Path(__file__).resolve().parent.parent
CELL = re.compile(r"^```\{code-cell\}\n(?::[^\n]*\n)*\n?(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TARGETS = set(re.findall(r"^(\w+):", (REPO / "Makefile").read_text(), re.MULTILINE))

ONE_BATCH = [f"--trainer.{option}=1" for option in ("max_epochs", "limit_train_batches", "limit_val_batches", "check_val_every_n_epoch")]
SMALL = [f"--model.potential.init_args.backbone.init_args.{option}" for option in ("num_layers=2", "irreps=8x0e+8x1o", "lmax=1")]
#: Of a tutorial's training; the first validation comes after ten.
FEW_EPOCHS = ["--trainer.max_epochs=10"]
#: What may stand at the start of a line of a bash block, beside `matfound` and `ase`, which are run.
OTHER_COMMANDS = ("make", "pip", "python3", ".venv/bin/pip")
#: And in a tutorial.
TUTORIAL_COMMANDS = ("ls", "cat")
#: Blocks with this in them need the weights in the package sevenn.
NEEDS_WEIGHTS = "sevennet-"
#: Fine, and written but not converged: the model is hardly trained.
EXIT_CODES = (0, 3)


def blocks(path: Path) -> list[tuple[int, str, str]]:
    """Line, language and text of each fenced block."""
    text = path.read_text(encoding="utf-8")
    return [(text[: match.start()].count("\n") + 1, match[1], match[2]) for match in BLOCK.finditer(text)]


def has_weights() -> bool:
    return importlib.util.find_spec("sevenn") is not None


def make_workplace(_: Path) -> None:
    """A barely trained model, as `demo/model` and `runs/minidft/model`, a structure and labelled frames, in this folder."""
    recipe = str(REPO / "recipes/minidft.yaml")
    assert main(["fit", "--config", recipe, "--trainer.default_root_dir=demo", *SMALL, *ONE_BATCH]) == 0
    Path("runs/minidft").mkdir(parents=True)
    os.symlink(Path("demo/model").resolve(), "runs/minidft/model")
    ase.io.write("in.cif", ase.build.bulk("MgO", "rocksalt", a=4.3))
    frames = []
    for i in range(10):
        atoms = ase.build.bulk("MgO", "rocksalt", a=4.2)
        atoms.rattle(0.05, seed=i)
        atoms.info = {"REF_energy": -11.9 + 0.1 * (i % 3), "config_type": f"kind{i % 5}"}
        atoms.set_array("REF_forces", atoms.positions - atoms.get_center_of_mass())
        atoms.set_array("magmoms", atoms.numbers / 10.0)
        frames.append(atoms)
    ase.io.write("my.extxyz", frames)


def run_commands(text: str) -> None:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "make":
            assert words[1] in TARGETS, f"make has no target {words[1]}"
        if words[0] == "ase":
            ase.cli.main.main(args=words[1:])
        elif words[0] != "matfound":
            assert words[0] in OTHER_COMMANDS, line
        if words[0] != "matfound":
            continue
        if words[1] == "fit":
            own = [] if "recipes/finetune.yaml" in words else SMALL  # a model that is there already has its size
            words += [*own, *ONE_BATCH] if any(Path(word).is_file() for word in words) else ["--print_config"]
        if words[1] == "finetune":
            words += ONE_BATCH
        assert words[1] != "demo", "too long to be run here: show `make demo`"
        assert main(words[1:]) in EXIT_CODES, line


def run_blocks(path: Path) -> None:
    """The blocks of a document, in this folder."""
    namespace: dict[str, Any] = {"__name__": "document"}
    for line, language, text in blocks(path):
        if NEEDS_WEIGHTS in text and not has_weights():
            continue
        if language == "python":
            exec(compile("\n" * line + text, str(path), "exec"), namespace)
        elif language == "yaml":
            file = re.match(r"# (\S+\.yaml)", text)
            assert file, f"{path}:{line}: the first line of a YAML block names its file"
            Path(file[1]).write_text(text, encoding="utf-8")
        elif language == "bash":
            run_commands(text)
        else:
            raise AssertionError(f"{path}:{line}: a block of {language}")


def run_cell(path: Path, line: int, text: str, namespace: dict[str, Any]) -> None:
    magic, _, body = text.partition("\n")
    if magic == "%%bash":
        for command in body.replace("\\\n", " ").splitlines():
            words = [word for given in shlex.split(command) for word in (sorted(map(str, Path().glob(given))) or [given])]
            words = words[2:] if words[:2] == ["python", "-m"] else words
            assert words[0] in ("matfound", *TUTORIAL_COMMANDS), command
            if words[0] == "matfound":
                words += FEW_EPOCHS if words[1] in ("fit", "finetune") else []
                assert main(words[1:]) == 0, command
    elif magic.startswith("%%writefile "):
        Path(magic.split()[1]).write_text(body, encoding="utf-8")
    else:
        exec(compile("\n" * line + text, str(path), "exec"), namespace)


def run_tutorial(path: Path) -> None:
    """The cells of a notebook, in this folder."""
    text = path.read_text(encoding="utf-8")
    sys.path.insert(0, str(Path.cwd()))
    namespace: dict[str, Any] = {"__name__": "document"}
    assert len(CELL.findall(text)) == text.count("\n```{code-cell}"), "a cell was not recognised"
    for cell in CELL.finditer(text):
        line = text[: cell.start()].count("\n") + 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            run_cell(path, line, cell[1], namespace)
        print(printed.getvalue())
        assert "except " not in cell[1] or printed.getvalue() or "%%" in cell[1], f"{path}:{line}: no error was shown"


def serve() -> None:
    import matfound.cli.lightning
    import matfound.models.nequip
    import matfound.report.html
    import matfound.report.plots  # noqa: F401

    kinds = {"workplace": make_workplace, "blocks": run_blocks, "tutorial": run_tutorial}
    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        process = os.fork()
        if process == 0:
            log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(log, stream)
            os.chdir(command["folder"])
            os.environ.update(MATFOUND_CACHE=str(Path(command["log"]).parent / "cache"), MPLBACKEND="agg")
            warnings.filterwarnings("error", module=r"matfound($|\.)")
            try:
                kinds[command["kind"]](Path(command["path"]))
                code = 0
            except BaseException:  # noqa: BLE001 - an exit, too, is told
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
