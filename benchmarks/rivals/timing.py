"""What the benchmarks with rivals share: timing of calls, peak memory, versions, structures."""

import contextlib
import gc
import importlib.metadata
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ase
import numpy as np
import torch
from ase.build import bulk

#: What a row of a run depends on.
PACKAGES = (
    "torch", "e3nn", "numpy", "ase", "sevenn", "mace-torch", "matscipy", "openequivariance", "cuequivariance", "cuequivariance-torch",
    "cuequivariance-ops-torch-cu13", "cuequivariance-ops-torch-cu12", "triton", "fairchem-core", "torch-geometric", "torch_scatter",
    "torch_sparse",
)  # fmt: skip


def clean() -> None:
    """Free what is left of the code before, and start counting memory anew; TF32 off, whatever that code has set."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timed(
    call: Callable[[], Any],
    device: torch.device,
    seconds: float,
    *,
    prepare: Callable[[], Any] | None = None,
    wall: bool = False,
    warm: int = 3,
) -> dict[str, float]:
    """Medians over single calls: `ms`, `host` (ms until the call returns), and `GiB`, the peak that torch allocated on a GPU.

    Args:
        call: what is timed.
        device: where it computes; on a GPU, time passes between two events around the call.
        seconds: as many calls as fit, but from 5 (3 of slow ones) to 100.
        prepare: called before each call, and not timed.
        wall: for calls that bring their results to the host: `ms` by the host's clock.
        warm: calls before; two of slow ones.
    """
    cuda = device.type == "cuda"
    prepare = prepare or (lambda: None)
    began = time.perf_counter()
    for n in range(warm):
        if n < 2 or time.perf_counter() < began + 4 * seconds:
            prepare()
            call()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    spent: list[float] = []
    host: list[float] = []
    stop = time.perf_counter() + seconds
    while len(spent) < (5 if time.perf_counter() < stop + seconds else 3) or (time.perf_counter() < stop and len(spent) < 100):
        prepare()
        if cuda:
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
        began = time.perf_counter()
        call()
        host.append((time.perf_counter() - began) * 1e3)
        if cuda and not wall:
            end.record()
            torch.cuda.synchronize()
            spent.append(start.elapsed_time(end))
        else:
            spent.append(host[-1])
    found = {"ms": statistics.median(spent), "host": statistics.median(host)}
    return found | ({"GiB": torch.cuda.max_memory_allocated() / 2**30} if cuda else {})


def turns(
    makers: Mapping[str, Callable[[], Callable[[], Any]]],
    device: torch.device,
    seconds: float,
    *,
    rounds: int = 3,
    limit_s: int = 120,
    others: Mapping[str, int] | None = None,
    after: Callable[[str], None] = lambda name: None,
) -> dict[str, dict[str, float] | str]:
    """`timed` of several calls in turns, since machines are faster in one minute than in another: medians of the rounds, or why there are
    none.

    Args:
        makers: each makes a call, anew in each round.
        device: where they compute.
        seconds: for each call, over all rounds.
        rounds: how many.
        limit_s: seconds after which a call is given up, in each round.
        others: bytes that the others hold, which do not count.
        after: called after each turn with its name.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in makers}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name, make in makers.items():
            if name in failed:
                continue
            clean()
            try:
                with limit(limit_s):
                    found[name].append(timed(make(), device, seconds / rounds))
            except Exception as error:  # noqa: BLE001 - one that fails must not end the comparison
                failed[name] = why(error)
            after(name)
    rows: dict[str, dict[str, float] | str] = dict(failed)
    for name, several in found.items():
        if name not in failed:
            row = {key: statistics.median(one[key] for one in several) for key in several[0]}
            if "GiB" in row:
                row["GiB"] -= (others or {}).get(name, 0) / 2**30
            rows[name] = row
    return rows


def held() -> int:
    """Bytes that torch has allocated on a GPU."""
    gc.collect()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (timed(lambda: target.copy_(source), device, 0.5)["ms"] * 1e-3)


@contextlib.contextmanager
def limit(seconds: int) -> Iterator[None]:
    """TimeoutError in whatever takes longer: some packages compile for minutes."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def why(error: Exception) -> str:
    """One line about what went wrong."""
    if isinstance(error, ImportError):
        return f"not installed: {' '.join(str(error).split())[:100]}"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:150]}"


def environment(device: torch.device) -> dict[str, Any]:
    """Device and versions, for the JSON file."""
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU", "versions": versions}


def silicon(size: int) -> ase.Atoms:
    """Diamond of 8, 64, 216, 512, 1,000 … atoms, rattled by 0.05 Å."""
    repetitions = round((size / 8) ** (1 / 3))
    if 8 * repetitions**3 != size:
        raise SystemExit(f"there is no cube of silicon with {size} atoms: take 8, 64, 216, 512, 1000, …")
    atoms = bulk("Si", "diamond", a=5.43, cubic=True) * ((repetitions,) * 3)
    atoms.positions += np.random.default_rng(size).normal(scale=0.05, size=atoms.positions.shape)
    return atoms


def crystals(atoms: int) -> list[ase.Atoms]:
    """Rattled crystals of 32 elements and compounds in cells of 32 to 64 atoms, until there are so many atoms: 94 of them have 5,018."""
    kinds = {
        ("fcc", 2): "Cu 3.61 Al 4.05 Ni 3.52 Ag 4.09 Au 4.08 Pd 3.89 Pt 3.92 Pb 4.95",
        ("rocksalt", 2): "NaCl 5.64 MgO 4.21 KCl 6.29 LiF 4.03 CaO 4.81 NaF 4.63 LiCl 5.13 KBr 6.60",
        ("zincblende", 2): "GaAs 5.65 ZnS 5.41 AlP 5.46 InP 5.87 SiC 4.36 BN 3.62 GaP 5.45 CdTe 6.48",
        ("bcc", 3): "Fe 2.87 W 3.17 Mo 3.15 Nb 3.30 Ta 3.30 V 3.03 Cr 2.91 Na 4.29",
    }
    known = []
    for (structure, repetitions), text in kinds.items():
        words = text.split()
        known += [(name, structure, float(a), repetitions) for name, a in zip(words[::2], words[1::2], strict=True)]
    made: list[ase.Atoms] = []
    while sum(map(len, made)) < atoms:
        name, structure, a, repetitions = known[5 * len(made) % len(known)]
        crystal = bulk(name, structure, a=1.01 * a, cubic=True).repeat(repetitions)
        crystal.rattle(0.08, seed=len(made))
        made.append(crystal)
    return made
