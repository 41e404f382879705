"""1,328 sparse assay columns: memory of their conversion, and what they cost in a training step beside one column.

    python benchmarks/sparse_columns.py --out sparse_columns.json

A parquet table of synthetic molecules in the layout of LargeMix's PCBA_1328 (columns `SMILES`, `assayID-…`; 3 % of the cells hold 0 or 1,
the others nothing) is written and converted with `matfound data convert --no-conformers`; what counts is the largest resident memory of
any process of the command. Then two copies of one small NequIP train on the same batches of 64 molecules in turn, one with a head of 1,328
columns, one with a head of one: forward, loss, backward and optimizer step, one thread, CPU time of the process, median of the ratios of
neighbouring steps.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from matfound import __version__, fields
from matfound.data.store import Store
from matfound.graphs.neighbors import add_graphs
from matfound.models.base import Potential
from matfound.models.nequip import NequIP
from matfound.nn.heads import BinaryHead
from matfound.structures.atomic_data import AtomicData
from matfound.tasks.multitask import MultiTask
from matfound.tasks.target import Target

COLUMNS, SHARE, BATCH = 1328, 0.03, 64
PIECES = ["C", "CC", "O", "N", "C(=O)", "c1ccc(cc1)", "C(F)", "CS", "C(C)(C)", "C=C", "C#C"]
#: Runs a command and prints the largest resident memory, in KiB, of any process of it.
PEAK = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def write_table(file: Path, rows: int, block: int = 5000) -> None:
    """The table, in blocks: the whole would take a gigabyte."""
    rng = np.random.default_rng(0)
    names = [f"assayID-{number}" for number in range(COLUMNS)]
    schema = pa.schema([("SMILES", pa.string()), *((name, pa.float64()) for name in names)])
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, rows, block):
            count = min(block, rows - start)
            values = np.where(rng.random((count, COLUMNS)) < SHARE, rng.integers(0, 2, (count, COLUMNS)), np.nan)
            smiles = ["C" + "".join(rng.choice(PIECES, rng.integers(3, 8))) + "C" for _ in range(count)]
            columns = [pa.array(smiles), *(pa.array(values[:, k], from_pandas=True) for k in range(COLUMNS))]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def convert(table: Path, out: Path, *options: str) -> tuple[float, float]:
    """Seconds and MiB of `matfound data convert`."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "matfound", "data", "convert", str(table), str(out), *options]
    found = subprocess.run([sys.executable, "-c", PEAK, *command], stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - start, int(found.stdout.split()[-1]) / 1024


class Step:
    """A model with a head of so many columns, and one training step of it."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.field = "pcba_1328" if columns == COLUMNS else "pcba_one"
        if columns != COLUMNS:
            fields.group(self.field, columns, dtype="int64")
        torch.manual_seed(0)
        backbone = NequIP(cutoff=4.0, num_layers=2, irreps="32x0e+32x1o", lmax=1, radial_hidden=[16])
        potential = Potential(backbone, {"assays": BinaryHead(self.field, hidden=[64], columns=columns)}, ["molecules"])
        self.module = MultiTask(potential, [Target(self.field, loss="bce")], fit_scales=False)
        self.module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-3)

    def __call__(self, batch: AtomicData) -> float:
        """CPU seconds."""
        batch = batch.clone()
        if self.columns != COLUMNS:
            batch[self.field] = batch["pcba_1328"][:, : self.columns].clone()
        start = time.process_time()
        self.optimizer.zero_grad()
        self.module.training_step(batch, 0).backward()
        self.optimizer.step()
        return time.process_time() - start


def main(argv: list[str] | None = None) -> int:
    """Print the figures and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", metavar="FILE.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"matfound": __version__, "torch": torch.__version__, "rows": args.rows, "columns": COLUMNS}
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "PCBA_1328.parquet"
        write_table(table, args.rows)
        seconds, peak = convert(table, Path(folder) / "all", "--no-conformers", "--workers", str(args.workers))
        size = sum(file.stat().st_size for file in (Path(folder) / "all").rglob("*"))
        result |= {"convert_s": seconds, "peak_MiB": peak, "table_bytes": table.stat().st_size, "store_bytes": size}
        print(f"{args.rows:,} molecules x {COLUMNS} columns: converted in {seconds:.0f} s by {args.workers} workers")
        print(
            f"  at most {peak:.0f} MiB resident in a process; {table.stat().st_size / 1e6:.0f} MB of parquet, {size / 1e6:.0f} MB of store"
        )
        few = Path(folder) / "few.parquet"
        write_table(few, 20 * BATCH)
        convert(few, Path(folder) / "few", "--workers", str(args.workers))
        store = Store(Path(folder) / "few")
        steps = {columns: Step(columns) for columns in (1, COLUMNS)}
        graphs = steps[1].module.potential.graphs
        rng = np.random.default_rng(0)
        batches = []
        for _ in range(10):
            batch = store.batch(rng.permutation(len(store))[:BATCH])
            batch.dataset = torch.zeros(BATCH, dtype=torch.int64)
            batches.append(add_graphs(batch, graphs))
        times: dict[int, list[float]] = {columns: [] for columns in steps}
        for number in range(-2, args.steps):  # the first two warm up
            for columns in (1, COLUMNS) if number % 2 else (COLUMNS, 1):
                spent = steps[columns](batches[number % len(batches)])
                if number >= 0:
                    times[columns].append(spent)
    ratios = [many / one for many, one in zip(times[COLUMNS], times[1], strict=True)]
    one, many = statistics.median(times[1]), statistics.median(times[COLUMNS])
    result |= {"step_one_s": one, "step_all_s": many, "ratio": statistics.median(ratios)}
    print(f"a training step of {BATCH} molecules: {one * 1e3:.1f} ms with one column, {many * 1e3:.1f} ms with {COLUMNS}")
    print(f"  ratio {result['ratio']:.3f}")
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
