"""The command itself: exit codes, one-line errors, and a fast --help."""

import errno
import json
import os
import subprocess
import sys
from importlib import import_module

import pytest

import matfound
from matfound.cli import main as module
from matfound.cli.main import VERBS, build_parser, main
from matfound.errors import InputError


@pytest.fixture
def fake(monkeypatch):
    """Let the verb `env` do what a test wants."""

    def install(action):
        monkeypatch.setattr(import_module("matfound.cli.verbs"), "run", action)
        return main(["env"])

    return install


def raising(error):
    def action(args):
        raise error

    return action


def test_help(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb, (_, line) in VERBS.items():
        assert f"\n    {verb} " in text or f"{verb}  " in text or f"\n    {verb}\n" in text
        assert line.split(":")[0] in text.replace("\n                        ", " ")
    assert "exit codes" in text


def test_no_verb_is_wrong_usage(capsys):
    assert main([]) == 2
    assert "verbs" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"matfound {matfound.__version__}\n"


@pytest.mark.parametrize("verb", ["relax", "predict", "evaluate", "env"])
def test_help_of_a_verb(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert f"usage: matfound {verb}" in capsys.readouterr().out


def test_unknown_verb(capsys):
    assert main(["relaks", "in.cif"]) == 2
    assert capsys.readouterr().err == "matfound: error: unknown verb 'relaks' (did you mean 'relax'?)\n"
    assert main(["xyzzy"]) == 2
    assert "known: convert, data, demo" in capsys.readouterr().err
    assert main(["evaluate", "erors"]) == 2
    assert "invalid choice: 'erors'" in capsys.readouterr().err


def test_unknown_options(capsys):
    assert main(["relax", "in.cif", "--model", "m", "--fmx", "0.1"]) == 2
    assert capsys.readouterr().err == "matfound: error: unrecognized arguments: --fmx 0.1 (did you mean '--fmax'?)\n"
    assert main(["relax", "in.cif", "--model", "m", "--qqqqqqq"]) == 2
    assert "see matfound --help" in capsys.readouterr().err
    assert main(["relax", "in.cif", "--model", "m", "extra"]) == 2
    assert "unrecognized arguments: extra (see matfound --help)" in capsys.readouterr().err
    assert main(["--nonsense"]) == 2
    assert main(["relax", "in.cif"]) == 2
    assert capsys.readouterr().err.endswith("required: --model (see matfound relax --help)\n")
    assert main(["relax", "in.cif", "--mod", "m"]) == 2, "options are not abbreviated"
    assert main(["relax", "in.cif", "--model", "m", "--steps", "0"]) == 2
    assert "expected a whole number from 1, received '0'" in capsys.readouterr().err
    assert main(["relax", "in.cif", "--model", "m", "--steps", "few"]) == 2
    assert main(["relax", "in.cif", "--model", "m", "--dtype", "float16"]) == 2


def test_input_errors_are_one_line(fake, capsys):
    error = InputError("the third\nline is odd", remedy="repair it", file="a.xyz", frame=7)
    assert fake(raising(error)) == 1
    assert capsys.readouterr().err == "matfound: error: a.xyz: frame 7: the third line is odd (repair it)\n"


def test_os_errors_are_one_line(fake, capsys):
    assert fake(raising(OSError(errno.ENOSPC, "No space left on device", "out.extxyz"))) == 1
    err = capsys.readouterr().err
    assert err.startswith("matfound: error: out.extxyz: No space left on device: the disk is full")
    assert err.count("\n") == 1
    assert fake(raising(FileNotFoundError(errno.ENOENT, "No such file or directory", "x"))) == 1
    assert capsys.readouterr().err == "matfound: error: x: No such file or directory\n"
    assert fake(raising(OSError("odd"))) == 1
    assert capsys.readouterr().err == "matfound: error: odd\n"
    assert fake(raising(OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"))) == 1
    assert capsys.readouterr().err == "matfound: error: a -> b: Invalid cross-device link\n"


def test_exit_codes(fake, capsys):
    assert fake(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "matfound: interrupted\n"
    assert fake(raising(SystemExit(4))) == 4
    assert fake(raising(SystemExit(None))) == 0
    assert fake(raising(SystemExit("a message"))) == 1
    assert capsys.readouterr().err == "matfound: error: a message\n"
    assert fake(lambda args: None) == 0
    assert fake(lambda args: 3) == 3
    with pytest.raises(ZeroDivisionError):  # a bug of ours shows itself
        fake(raising(ZeroDivisionError()))


def test_a_closed_pipe_is_no_error():
    code = """if True:
        import sys
        from matfound.cli import main, verbs
        verbs.run = lambda args: print("\\n".join("x" * 100 for _ in range(10000)))
        sys.exit(main.main(["env"]))
    """
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0


def test_lightning_verbs_get_their_arguments_unparsed(monkeypatch):
    seen = []

    class Lightning:
        @staticmethod
        def run(argv):
            seen.append(argv)

    real = module.importlib.import_module
    monkeypatch.setattr(module.importlib, "import_module", lambda name: Lightning if name.endswith("lightning") else real(name))
    assert main(["fit", "--config", "a.yaml", "--trainer.max_epochs=3"]) == 0
    assert main(["test", "--help"]) == 0
    assert seen == [["fit", "--config", "a.yaml", "--trainer.max_epochs=3"], ["test", "--help"]]


def test_arguments_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["matfound", "--version"])
    assert main() == 0


def test_python_dash_m(tmp_path):
    found = subprocess.run([sys.executable, "-m", "matfound", "--version"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, f"matfound {matfound.__version__}\n")
    found = subprocess.run([sys.executable, "-m", "matfound", "relaks"], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize("args", [["--help"], ["relax", "--help"], ["evaluate", "errors", "--help"], ["relaks"]])
def test_help_imports_nothing_heavy(args):
    code = (
        "import sys, json; from matfound.cli.main import main; code = main(sys.argv[1:]);"
        "print(json.dumps([code, sorted({name.partition('.')[0] for name in sys.modules})]), file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    code, modules = json.loads(found.stderr.splitlines()[-1])
    assert code == (2 if args == ["relaks"] else 0)
    heavy = {"torch", "numpy", "ase", "pymatgen", "rdkit", "lightning", "matplotlib", "rich", "pydantic", "scipy", "yaml"}
    assert not heavy & set(modules)


def test_every_verb_has_a_parser():
    for verb, (name, _) in VERBS.items():
        if name == "matfound.cli.verbs":
            assert verb in build_parser(verb).format_help()


def test_env(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    lines = dict(line.split(None, 1) for line in text.splitlines() if "installed in" not in line)
    assert lines["matfound"].startswith(matfound.__version__)
    assert lines["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert {"platform", "cpu", "torch", "cuda", "ase", "lightning", "e3nn"} <= lines.keys()
    assert text.isprintable() or "\n" in text


def test_env_without_the_usual(monkeypatch, capsys):
    from matfound.cli import env

    monkeypatch.setattr(env.importlib.metadata, "requires", raising_call(env.importlib.metadata.PackageNotFoundError()))
    assert "ase" in env._dependencies()
    monkeypatch.setattr(env.subprocess, "run", raising_call(FileNotFoundError()))
    assert env._commit() == ""
    monkeypatch.setattr(env.Path, "read_text", raising_call(OSError()))
    assert env._cpu_name()
    assert env._version("no-such-distribution") == "not installed"
    monkeypatch.setitem(sys.modules, "torch", None)
    assert env._torch()["torch"].startswith("cannot be imported")


def raising_call(error):
    def call(*args, **kwargs):
        raise error

    return call


def test_env_on_a_gpu(monkeypatch):
    import torch

    from matfound.cli import env

    class Card:
        name, total_memory, major, minor = "Big Card", 80 * 2**30, 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Card)
    assert env._torch()["cuda:0"] == "Big Card, 80 GiB, compute capability 9.0"


def test_the_message_of_a_full_disk_names_the_file(monkeypatch, tmp_path, capsys, fake):
    from matfound.report.files import write_text

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "report.html"
    target.write_text("old")
    monkeypatch.setattr("pathlib.Path.write_text", full)
    assert fake(lambda args: write_text(target, "new")) == 1
    assert f"{target}: No space left on device" in capsys.readouterr().err
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
