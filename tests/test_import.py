"""`import matfound` and `matfound --help` answer at once."""

import os
import subprocess
import sys
import time

import pytest

#: Without what coverage adds to every Python that it measures.
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("COV")}


def seconds(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=ENVIRONMENT)
    return time.perf_counter() - start


def excess(*arguments: str, limit: float) -> float:
    """Seconds over bare Python: the least of several runs, since a busy machine only adds; more of them while it is too much."""
    bare = ours = float("inf")
    for _ in range(12):
        bare = min(bare, seconds("-c", "pass"))
        ours = min(ours, seconds(*arguments))
        if ours - bare < 0.7 * limit:
            break
    return ours - bare


def test_import_is_fast() -> None:
    assert excess("-c", "import matfound", limit=0.3) <= 0.3


def test_help_is_fast() -> None:
    assert excess("-c", "from matfound.cli.main import main; main(['--help'])", limit=0.6) <= 0.6


@pytest.mark.parametrize("statement", ["import matfound", "import matfound.cli.main", "import matfound; matfound.__version__"])
def test_nothing_heavy_is_imported(statement: str) -> None:
    heavy = ["ase", "lightning", "matplotlib", "numpy", "pydantic", "rdkit", "torch"]
    code = f"import sys; {statement}; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=ENVIRONMENT)
    assert run.stdout.strip() == "[]"


def test_lazy_names_arrive() -> None:
    code = "import matfound, sys; [getattr(matfound, name) for name in matfound.__all__]; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)


def test_unknown_name() -> None:
    import matfound

    with pytest.raises(AttributeError, match="no attribute 'Calculater'"):
        matfound.Calculater  # noqa: B018
