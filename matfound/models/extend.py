"""A finished model with one more level of theory: where fine-tuning starts."""

import copy
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from matfound.errors import InputError, nearest
from matfound.models import checkpoint
from matfound.models.base import Potential, build

Freeze = Literal["none", "backbone"]


def extend(
    model: str | Path | Potential,
    dataset: str,
    parent: str | None = None,
    freeze: Freeze = "none",
    dtype: str | None = None,
) -> Potential:
    """A copy of a model with one new head beside the old ones, which predicts exactly what its parent does.

    The vocabulary grows by `dataset`; every tensor that has a row for each dataset (last layers, scales, references) gets a row that is a
    copy of the parent's, also in heads of your own. Everything else is as it was, and so are the predictions of the old heads. The new
    dataset becomes the default of the model, for crystals and molecules; the old ones are there by name.

    In a recipe: `potential: {class_path: matfound.models.extend.extend, init_args: {model: NAME, dataset: mine}}`.

    Args:
        model: name or folder of a checkpoint, or a potential (which stays as it is).
        dataset: name of the new level of theory.
        parent: name of the one to start from; None: the only one, or the one default of the model.
        freeze: "backbone" leaves only the parameters of the heads to train. The hidden layers of a readout are shared by all datasets.
        dtype: "float32" or "float64" for the weights; None keeps their type.

    Returns:
        In eval mode, on the device of the model; the parameters to train, and only these, require gradients.

    Raises:
        InputError: no such model or parent; a name that is taken; several levels of theory and no parent; or a backbone that cannot tell
            one more dataset apart.
    """
    old = model if isinstance(model, Potential) else checkpoint.load(model)
    index = parent_index(old, parent)
    if dataset.casefold() in (name.casefold() for name in old.datasets):
        raise InputError(f"the model has a dataset '{dataset}' already", remedy="choose another name for yours")
    if not dataset.strip():
        raise InputError("the new dataset has no name", remedy="choose one")
    if freeze not in ("none", "backbone"):
        raise InputError(f"freeze is '{freeze}'", remedy=nearest(freeze, ("none", "backbone")))
    config = copy.deepcopy(old.config)
    config["init_args"]["datasets"] = [*old.datasets, dataset]
    config["init_args"]["default_dataset"] = {"molecular": dataset, "periodic": dataset}
    config["init_args"]["backbone"]["init_args"] |= old.backbone.grown(index)
    for name, head in old.heads.items():
        config["init_args"]["heads"][name]["init_args"] |= head.grown(index)  # type: ignore[operator]
    new: Potential = build(config)
    new.to(device=next(old.parameters()).device, dtype=old.dtype)
    expected, state = new.state_dict(), old.state_dict()
    if expected.keys() != state.keys():
        name = min(expected.keys() ^ state.keys())
        raise InputError(f"the model cannot grow: the tensor '{name}' is not in both, the old one and the new one")
    new.load_state_dict({name: _grown(name, state[name], expected[name].shape, len(old.datasets), index) for name in state})
    if dtype is not None:
        new.to(checkpoint.as_dtype(dtype))
    new.eval().requires_grad_(freeze == "none")
    if freeze == "backbone":
        new.heads.requires_grad_(True)
    return new


def parent_index(potential: Potential, parent: str | None) -> int:
    """Index of the dataset that a new one starts from.

    Raises:
        InputError: no such dataset; or none was named, and the model has several and no single default.
    """
    if parent is not None:
        return potential.dataset_index(parent)
    defaults = set(potential.default_dataset.values())
    if len(potential.datasets) == 1:
        return 0
    if len(defaults) == 1:
        return potential.dataset_index(defaults.pop())
    raise InputError(
        f"the model knows several levels of theory: {', '.join(potential.datasets)}", remedy="name the one that is closest to your data"
    )


def _grown(name: str, value: Tensor, shape: torch.Size, datasets: int, parent: int) -> Tensor:
    """A tensor of the model, with one more row for the new dataset where it has a row for each, or one for all."""
    if value.shape == shape:
        return value
    axes = [axis for axis, (a, b) in enumerate(zip(value.shape, shape, strict=False)) if a != b]
    sizes = (value.shape[axes[0]], shape[axes[0]]) if len(value.shape) == len(shape) and len(axes) == 1 else None
    if sizes not in ((datasets, datasets + 1), (1, datasets + 1)):
        raise InputError(f"the model cannot grow: '{name}' would go from shape {tuple(value.shape)} to {tuple(shape)}")
    rows = [*range(datasets), parent] if sizes == (datasets, datasets + 1) else [0] * (datasets + 1)
    return value.index_select(axes[0], torch.tensor(rows, device=value.device))
