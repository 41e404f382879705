"""`matfound demo` from end to end, with one epoch and relaxations that are content at once."""

import json
from pathlib import Path

import pytest

from matfound.cli import demo
from matfound.cli.main import main


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "FMAX", 1e3)
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--epochs", "1"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["seconds"] >= summary["training_seconds"] > 0
    for dataset, fields in (
        ("minidft-molecules", {"energy", "forces", "gap", "charges"}),
        ("minidft-crystals", {"energy", "forces", "stress"}),
    ):
        errors = summary["errors"][dataset]
        assert fields <= errors.keys()
        assert all(row["gain"] == pytest.approx(row["baseline_mae"] / row["mae"]) for row in errors.values())
    for kind, more in (("molecule", {"rmsd_to_dft"}), ("crystal", {"volume", "dft_volume", "volume_error"})):
        facts = summary["relaxations"][kind]
        assert {"system", "converged", "steps", "initial_fmax", "final_fmax"} | more <= facts.keys()
        assert facts["initial_fmax"] > 0.5, "the start must be far from relaxed"
    assert summary["relaxations"]["crystal"]["dft_volume"] == pytest.approx(66.6, abs=0.2)
    for name in ("report.html", "model/config.json", "molecule.png", "crystal.png", "volume.png", "molecule-trace.png"):
        assert (out / name).stat().st_size > 500, name
    printed = capsys.readouterr().out
    assert "Done in" in printed and "times better" in printed


def test_the_volume_of_lowest_energy() -> None:
    volumes = [56.0, 58.0, 60.0, 62.0, 64.0]
    assert demo.minimum_volume(volumes, [0.01 * (v - 60.7) ** 2 for v in volumes]) == pytest.approx(60.7, abs=0.05)
