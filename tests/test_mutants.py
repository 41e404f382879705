"""Break the package on purpose, one line at a time, and show that its tests notice. `make mutants` runs this file alone."""

import dataclasses
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One seeded mistake: `text`, which stands exactly once in `file`, becomes `mutation`, and each of `tests` must fail."""

    name: str
    file: str
    text: str
    mutation: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "wrong stress sign",
        "matfound/nn/gradients.py",
        "    stress = virial / ",
        "    stress = -virial / ",
        ("tests/nn/test_gradients.py::test_stress_is_the_strain_derivative_and_positive_in_tension",),
    ),
    Mutant(
        "wrong shift sign",
        "matfound/graphs/neighbors.py",
        "vectors = vectors + steps * cells[:, k]",
        "vectors = vectors - steps * cells[:, k]",
        ("tests/graphs/test_neighbors.py::test_shift_is_the_image_of_the_source",),
    ),
    Mutant(
        "a label dropped in collate",
        "matfound/structures/atomic_data.py",
        "for part in parts for name in part.field_names()}",
        "for part in parts[:1] for name in part.field_names()}",
        ("tests/structures/test_atomic_data.py::test_a_label_missing_in_one_sample",),
    ),
    Mutant(
        "references not subtracted",
        "matfound/tasks/statistics.py",
        "(energies - counts @ fitted) / natoms",
        "energies / natoms",
        (
            "tests/tasks/test_statistics.py::test_residuals_are_what_references_leave_over_per_atom",
            "tests/tasks/test_statistics.py::test_energy_spread_is_after_references_and_per_atom",
        ),
    ),
    Mutant(
        "references not added back",
        "matfound/nn/heads.py",
        " + self.table.reference[dataset, batch.numbers]",
        "",
        ("tests/nn/test_heads.py::test_energies_contain_the_references_of_their_dataset",),
    ),
    Mutant(
        "cutoff off by 10 %",
        "matfound/graphs/neighbors.py",
        "distance >= cutoff",
        "distance >= 0.9 * cutoff",
        ("tests/graphs/test_neighbors.py::test_edges_by_brute_force",),
    ),
    Mutant(
        "frames that are not differentiated",
        "matfound/models/equiformer_v3.py",
        "packed_rotation(self.frames(vectors), ",
        "packed_rotation(self.frames(vectors.detach()), ",
        (
            "tests/models/test_equiformer_v3.py::test_stress_is_the_gradient_in_an_aligned_crystal",
            "tests/models/test_equiformer_v3.py::test_hessian_vector_products",
        ),
    ),
    Mutant(
        "attention with one envelope in place of two",
        "matfound/nn/attention.py",
        "target(target.sum(weights) + eps) * envelope",
        "target(target.sum(weights) + eps)",
        ("tests/models/test_equiformer_v3.py::test_energy_is_smooth_at_the_cutoff",),
    ),
)


def plant(root: Path, mutant: Mutant) -> None:
    """Write the mistake into a copy of the repository."""
    path = root / mutant.file
    source = path.read_text(encoding="utf-8")
    count = source.count(mutant.text)
    assert count == 1, f"{mutant.name}: the text stands {count} times in {mutant.file}, expected once: {mutant.text!r}"
    path.write_text(source.replace(mutant.text, mutant.mutation), encoding="utf-8")


def copy(root: Path) -> Path:
    """What the named tests need, as a repository of its own."""
    for name in ("matfound", "tests", "datasets", "models", "recipes"):
        shutil.copytree(REPO / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "pyproject.toml", root)
    return root


def run(root: Path, tests: Sequence[str]) -> dict[str, bool]:
    """Run tests in the copy; whether each of them passed. A test that could not run at all is an error of this file."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("COV", "PYTEST"))}
    environment |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.setdefault("MATFOUND_DATA", str(REPO.parent / "shared"))
    report = root / "report.xml"
    # Without the import hook that checks shapes: twice as fast, and values are to be caught here, not types.
    # And a folder of its own for temporary files: a run of pytest removes those of all but the last three.
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", f"--junitxml={report}"]
    options.append(f"--basetemp={root / 'tmp'}")
    command = [sys.executable, "-m", "pytest", *options, *tests]
    process = subprocess.run(command, check=False, cwd=root, env=environment, capture_output=True, text=True)
    assert process.returncode in (0, 1), process.stdout + process.stderr
    cases = list(ET.parse(report).iter("testcase"))
    passed = {}
    for test in tests:
        file, _, name = test.partition("::")
        module = file.removesuffix(".py").replace("/", ".")
        own = [case for case in cases if case.get("classname") == module and (case.get("name") or "").partition("[")[0] == name]
        unusable = [case for case in own if case.find("error") is not None or case.find("skipped") is not None]
        assert own, f"{test} did not run:\n{process.stdout}"
        assert not unusable, f"{test} was skipped or could not be set up:\n{process.stdout}"
        passed[test] = all(case.find("failure") is None for case in own)
    return passed


@pytest.mark.slow
def test_sound_copy_passes(tmp_path: Path) -> None:
    tests = sorted({test for mutant in MUTANTS for test in mutant.tests})
    assert run(copy(tmp_path), tests) == dict.fromkeys(tests, True)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_caught(mutant: Mutant, tmp_path: Path) -> None:
    plant(copy(tmp_path), mutant)
    assert run(tmp_path, mutant.tests) == dict.fromkeys(mutant.tests, False)


def test_text_must_stand_once(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    with pytest.raises(AssertionError, match="stands 2 times"):
        plant(tmp_path, Mutant("twice", "a.py", "x = 1", "x = 2", ()))
    with pytest.raises(AssertionError, match="stands 0 times"):
        plant(tmp_path, Mutant("never", "a.py", "y = 1", "y = 2", ()))
