"""The one table of implementations: hardware chooses here and nowhere else."""

from collections.abc import Callable
from typing import Any

from matfound.errors import InputError, nearest
from matfound.ops.tensor_product import reference

#: (operation, backend) → function. Signatures and semantics are those of the reference.
TABLE: dict[tuple[str, str], Callable[..., Any]] = {
    ("tensor_product", "reference"): reference.per_edge,
    ("tensor_product_gather_sum", "reference"): reference.gather_sum,
}


def get(operation: str, backend: str = "reference") -> Callable[..., Any]:
    """The function of an operation on a backend.

    Raises:
        InputError: no such operation or backend; the nearest name is suggested.
    """
    function = TABLE.get((operation, backend))
    if function is None:
        known = [b for o, b in TABLE if o == operation]
        if not known:
            raise InputError(f"there is no operation '{operation}'", remedy=nearest(operation, {o for o, _ in TABLE}))
        raise InputError(f"'{operation}' has no backend '{backend}'", remedy=nearest(backend, known))
    return function
