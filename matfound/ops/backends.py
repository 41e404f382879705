"""The one table of implementations: hardware chooses here and nowhere else."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from matfound.errors import InputError, nearest
from matfound.ops import gaunt, so2, symmetric_contraction
from matfound.ops.cuda import compiler
from matfound.ops.tensor_product import cpu, cuda, reference, table

#: (operation, backend) → function. Signatures and semantics are those of the reference.
TABLE: dict[tuple[str, str], Callable[..., Any]] = {
    ("tensor_product", "reference"): reference.per_edge,
    ("tensor_product", "cpu"): reference.per_edge,
    ("tensor_product", "cuda"): cuda.per_edge,
    ("tensor_product_gather_sum", "reference"): reference.gather_sum,
    ("tensor_product_gather_sum", "cpu"): cpu.gather_sum,
    ("tensor_product_gather_sum", "cuda"): cuda.gather_sum,
    ("tensor_product_gather_sum_tabulated", "reference"): table.reference,
    ("tensor_product_gather_sum_tabulated", "cpu"): table.reference,
    ("tensor_product_gather_sum_tabulated", "cuda"): table.cuda,
    ("symmetric_contraction", "reference"): symmetric_contraction.reference,
    ("so2_rotate", "reference"): so2.rotate,
    ("so2_linear", "reference"): so2.linear,
    ("so2_rotate_back", "reference"): so2.rotate_back,
    ("gaunt_product", "reference"): gaunt.reference,
    ("gaunt_product", "grid"): gaunt.grid,
    ("gaunt_product", "fourier"): gaunt.fourier,
}
#: What "auto" takes on a device where size decides as well.
BY_SIZE: dict[tuple[str, str], Callable[..., Any]] = {("tensor_product_gather_sum", "cpu"): cpu.gather_sum_by_size}


def get(operation: str, backend: str = "reference", device: torch.device | None = None) -> Callable[..., Any]:
    """The function of an operation on a backend.

    Args:
        operation: its name in `TABLE`.
        backend: "reference", "cpu" (torch operations arranged for caches), "cuda" (kernels of our own, compiled when they are first
            used), …; or "auto": "cpu" (for large graphs) or "cuda" by where the tensors are, if the operation has it and (for "cuda")
            NVRTC is installed, else "reference".
        device: where the tensors are, for "auto".

    Raises:
        InputError: no such operation or backend; the nearest name is suggested.
    """
    if backend == "auto":
        place = "" if device is None else device.type
        if (operation, place) in BY_SIZE:
            return BY_SIZE[operation, place]
        fits = (operation, place) in TABLE and (place != "cuda" or compiler.is_available())
        backend = place if fits else "reference"
    function = TABLE.get((operation, backend))
    if function is None:
        known = [b for o, b in TABLE if o == operation]
        if not known:
            raise InputError(f"there is no operation '{operation}'", remedy=nearest(operation, {o for o, _ in TABLE}))
        raise InputError(f"'{operation}' has no backend '{backend}'", remedy=nearest(backend, known))
    return function


def choose(model: nn.Module, backend: str) -> int:
    """Use a backend in every layer of a built model that has a choice; its state dict stays as it is.

    Returns:
        How many layers have one.

    Raises:
        InputError: no operation has such a backend.
    """
    known = {name for _, name in TABLE} | {"auto"}
    if backend not in known:
        raise InputError(f"there is no backend '{backend}'", remedy=nearest(backend, known))
    layers = [layer for layer in model.modules() if isinstance(getattr(layer, "backend", None), str)]
    for layer in layers:
        setattr(layer, "backend", backend)  # noqa: B010 - modules declare no such attribute
    return len(layers)
