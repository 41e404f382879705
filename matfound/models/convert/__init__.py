"""Checkpoints of other projects: one adapter file a format. Their code is never imported, and no pickle is trusted."""

import os
from collections.abc import Sequence
from typing import Any

from matfound import unpickle
from matfound.errors import InputError
from matfound.models.base import Potential
from matfound.models.convert import fairchem, mace, sevennet

#: Raised when a conversion changes, so that cached copies are made anew.
CONVERTER_VERSION = 1


def convert(file: str | os.PathLike[str], datasets: Sequence[str] = (), licence: str = "", *, ema: bool = True) -> Potential:
    """The potential of a foreign checkpoint, which is recognised by its content.

    Args:
        file: a SevenNet checkpoint (`torch.save`, ending in .pth), a MACE model exported as `matfound.models.convert.mace` says, or a
            checkpoint of fairchem 1.x or of EquiformerV3's code (.pt).
        datasets: names for the vocabulary where the file has none.
        licence: of the weights.
        ema: where a file of fairchem has averaged weights beside the last ones, take the averaged ones.

    Returns:
        in eval mode, with the weights' own type; it reproduces the original's outputs.

    Raises:
        InputError: not a format that is read, damaged, or with parts that are not known; names the file and those parts.
    """
    content = _load(file)
    try:
        adapter = next((adapter for adapter in (sevennet, mace, fairchem) if adapter.recognises(content)), None)
        if adapter is None:
            remedy = "give a SevenNet checkpoint (.pth), an exported MACE model, or a checkpoint of fairchem 1.x (.pt)"
            raise InputError(f"not a checkpoint that can be converted: {_kind(content)}", remedy=remedy)
        options = {"ema": ema} if adapter is fairchem else {}
        potential = adapter.convert(content, datasets, licence, **options)
    except InputError as error:
        raise error.at(file) from None
    return potential.eval().requires_grad_(False)


def _load(file: str | os.PathLike[str]) -> object:
    """The content of a file; of a pickled MACE model, what to do with it."""
    try:
        return unpickle.load(file)
    except InputError as error:
        if "'mace." not in error.problem:
            raise
        remedy = "export it with mace-torch; the lines to run are in the documentation of matfound.models.convert.mace"
        raise InputError("a pickled object of mace-torch, which only its own code can read", remedy=remedy, file=file) from error


def _kind(content: Any) -> str:
    if not isinstance(content, dict):
        return f"the file holds a {type(content).__name__}"
    keys = [str(key) for key in content]
    return "it has the keys " + ", ".join(keys[:8]) + (", …" if len(keys) > 8 else "") if keys else "it is empty"
