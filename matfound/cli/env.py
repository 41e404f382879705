"""What runs here, as plain text for bug reports."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import matfound

#: Distributions that may be there beside the dependencies.
OPTIONAL = (
    "vesin",
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "nvalchemi-toolkit-ops",
    "torch-sim-atomistic",
    "ray",
    "triton",
)


def describe() -> str:
    """One fact a line: platform, torch and its devices, versions of the dependencies, where matfound is."""
    facts = {
        "matfound": matfound.__version__ + _commit(),
        "installed in": str(Path(matfound.__file__).parent),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cpu": f"{_cpu_name()}, {_usable_cpus()} of {os.cpu_count()} cores usable",
        **_torch(),
        **{name: _version(name) for name in _dependencies() if name != "torch"},
        **{name: version for name in OPTIONAL if (version := _version(name)) != "not installed"},
    }
    width = max(len(name) for name in facts)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _dependencies() -> list[str]:
    """The distributions that matfound requires without extras; a short list where it runs uninstalled."""
    try:
        required = importlib.metadata.requires("matfound") or []
    except importlib.metadata.PackageNotFoundError:
        return ["ase", "e3nn", "lightning", "numpy", "pymatgen", "rdkit", "torch", "torch-geometric"]
    plain = [line for line in required if "extra ==" not in line]
    return sorted({re.split(r"[\s\[<>=!~;(]", line, maxsplit=1)[0] for line in plain})


def _commit() -> str:
    """The git commit of a source checkout."""
    root = Path(matfound.__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f" (git {found.stdout.strip()})" if found.returncode == 0 and found.stdout.strip() else ""


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _torch() -> dict[str, str]:
    try:
        import torch
    except ImportError as error:
        return {"torch": f"cannot be imported: {error}"}
    facts = {
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "cuda": torch.version.cuda or "not in this build of torch",
    }
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            facts[f"cuda:{i}"] = f"{properties.name}, {memory}, compute capability {properties.major}.{properties.minor}"
    return facts
