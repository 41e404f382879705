"""The benchmark's counts, which follow from theory, and its report."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from matfound.ops import gaunt, matrix_product


@pytest.fixture(scope="module")
def benchmark(repo: Path) -> ModuleType:
    """The script, imported."""
    spec = importlib.util.spec_from_file_location("matfound_benchmarks_price_of_freedom", repo / "benchmarks" / "price_of_freedom.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def allowed(lmax: int) -> list[tuple[int, int, int]]:
    degrees = range(lmax + 1)
    return [(l1, l2, l3) for l1 in degrees for l2 in degrees for l3 in range(abs(l1 - l2), l1 + l2 + 1)]


def test_counts_are_those_of_theory(benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        out = tmp_path / "result.json"
        code = benchmark.main(["--lmax", "0", "1", "2", "3", "--rows", "4", "--repeats", "1", "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    assert code == 0 and "holds: Gaunt lacks the antisymmetric paths" in capsys.readouterr().out
    result = json.loads(out.read_text(encoding="utf-8"))
    assert len(result["rows"]) == 16
    for row in result["rows"]:
        lmax, name = row["lmax"], row["operation"]
        triples = [triple for triple in allowed(lmax) if "Gaunt" not in name or sum(triple) % 2 == 0]
        assert row["triples"] == row["span"] == len(triples), (name, lmax)
        assert row["odd_triples"] == sum(sum(triple) % 2 for triple in triples)
        assert row["expressivity"] == (len(triples) if name == "Clebsch-Gordan" else 4 * lmax + 1)
        assert row["forward_us"] > 0 and row["forward_backward_us"] > 0
        assert 0 < row["flops_nonzero"] <= row["flops_dense"]
    assert set(result["exponents"]) == {"Clebsch-Gordan", "Gaunt, grid", "Gaunt, Fourier", "matrix product"}


@pytest.mark.parametrize("lmax", [1, 2, 4])
def test_dense_flops_are_those_of_the_code(benchmark: ModuleType, lmax: int) -> None:
    clebsch_gordan, grid, _, matrices = benchmark.products(lmax, "reference")
    x, y = (torch.randn(2, (lmax + 1) ** 2) for _ in range(2))
    with FlopCounterMode(display=False) as counter:
        clebsch_gordan.function(x, y)
    # Scalars are multiplied outside of matrix products, which are what is counted.
    assert counter.get_total_flops() == 2 * (clebsch_gordan.flops_dense - 2 * (lmax + 1) ** 2)
    with FlopCounterMode(display=False) as counter:  # the registered operations hide what they call
        gaunt._on_grid(x.unsqueeze(2), y.unsqueeze(2), lmax, lmax, 2 * lmax)
    assert counter.get_total_flops() == 2 * (grid.flops_dense - (2 * lmax + 1) * (4 * lmax + 1))
    with FlopCounterMode(display=False) as counter:
        matrix_product._product._init_fn(x, y, lmax, lmax, 2 * lmax, lmax)
    assert counter.get_total_flops() == 2 * matrices.flops_dense
