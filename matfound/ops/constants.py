"""Constant tensors of an operation, made when they are first needed."""

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor


def constant(spec: Any, name: str, make: Callable[..., Tensor], *key: Hashable, like: Tensor) -> Tensor:
    """`make(spec, *key)`, of another tensor's type and on its device.

    It is kept with the specification, since torch.compile reads attributes, and would look through `functools.lru_cache` at how a
    constant is made, which it cannot compile. So whoever compiles calls once without compiling first.

    Args:
        spec: has a dictionary `constants`.
        name: of what is made.
        make: makes it.
        key: which one.
        like: see above.
    """
    place = (name, key, like.dtype, like.device)
    found: Tensor | None = spec.constants.get(place)
    if found is None:
        found = spec.constants[place] = make(spec, *key).to(device=like.device, dtype=like.dtype)
    return found
