"""matfound: molecular and materials foundation models, trained and used in one place.

>>> import matfound
>>> atoms.calc = matfound.Calculator("demo/model")  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matfound.inference.calculator import Calculator
    from matfound.inference.committee import Committee
    from matfound.inference.relax import relax
    from matfound.models.checkpoint import load
    from matfound.structures.atomic_data import AtomicData

__version__ = "0.1.0"
__all__ = ["AtomicData", "Calculator", "Committee", "__version__", "load", "relax"]

# torch takes seconds to import; nothing here does until a name is used.
_HOME = {
    "AtomicData": "matfound.structures.atomic_data",
    "Calculator": "matfound.inference.calculator",
    "Committee": "matfound.inference.committee",
    "load": "matfound.models.checkpoint",
    "relax": "matfound.inference.relax",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'matfound' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
