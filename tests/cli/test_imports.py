"""`--import`, and slices that begin with a minus."""

from pathlib import Path

import ase.io
import pytest

from matfound.cli.main import main

MODULE = '''
from matfound.nn.heads import NodeHead


class Mine(NodeHead):
    """A head of one's own."""
'''
SAVE = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, ".")
import own_heads
from matfound.models.base import Potential
from matfound.models.checkpoint import save
from matfound.models.nequip import NequIP
potential = Potential(NequIP(cutoff=3.0, num_layers=1, irreps="4x0e", lmax=0, elements=[8, 12]), {"charges": own_heads.Mine("charges")})
save(potential, "own")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import subprocess
    import sys

    from ase.build import bulk

    monkeypatch.chdir(tmp_path)
    Path("own_heads.py").write_text(MODULE)
    subprocess.run([sys.executable, "-c", SAVE], check=True)
    ase.io.write("in.extxyz", [bulk("MgO", "rocksalt", a=a) for a in (4.0, 4.1, 4.2, 4.3)])
    return tmp_path


def test_a_checkpoint_with_a_class_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["predict", "in.extxyz", "out.extxyz", "--model", "own"]
    assert main(command) == 1
    assert "import own_heads first" in capsys.readouterr().err
    assert main([*command, "--import", "own_head"]) == 1
    assert "--import own_head: No module named 'own_head'" in capsys.readouterr().err
    assert main([*command, "--import", "own_heads"]) == 0
    assert len(ase.io.read("out.extxyz", ":")) == 4
    # and frames from the end, which begin with a minus
    assert main([*command, "--index", "-2:"]) == 0
    assert len(ase.io.read("out.extxyz", ":")) == 2
    assert main([*command, "--index", "-1"]) == 0
    assert len(ase.io.read("out.extxyz", ":")) == 1
