"""Checkpoints: a folder with `config.json`, `model.safetensors` and a model card. No pickle."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

import matfound
from matfound import catalog, fields
from matfound.errors import InputError, nearest
from matfound.models.base import Potential, build
from matfound.models.upgrades import FORMAT_VERSION, upgrade

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


def describe(potential: Potential) -> dict[str, Any]:
    """The content of `config.json`: how to build the model, and what it promises."""
    outputs = {name: fields.find(name) for name in potential.outputs}
    return {
        "format_version": FORMAT_VERSION,
        "matfound_version": matfound.__version__,
        "model": potential.config,
        "graphs": {name: dataclasses.asdict(spec) for name, spec in potential.graphs.items()},
        "symmetry": potential.backbone.symmetry,
        "continuity": potential.backbone.continuity,
        "conservative": potential.conservative,
        "fields": {name: dataclasses.asdict(field) for name, field in outputs.items()},
        "datasets": potential.datasets,
        "default_dataset": potential.default_dataset,
        "licence": potential.licence,
    }


def save(potential: Potential, folder: str | os.PathLike[str], card: Mapping[str, Any] | None = None) -> Path:
    """Write a checkpoint folder; what stood there before survives until the new one is whole, and any failure.

    Args:
        potential: weights, scales and references are stored as they are.
        folder: created, or replaced.
        card: front matter of the model card; "text" becomes its body.

    Raises:
        InputError: the folder cannot be written, e.g. for a full disk; names it and says what is still there.
    """
    folder = Path(folder)
    files = {
        CONFIG: (json.dumps(describe(potential), indent=1) + "\n").encode(),
        WEIGHTS: save_tensors({k: v.detach().cpu().contiguous() for k, v in potential.state_dict().items()}),
        CARD: _card(potential, dict(card or {})).encode(),
    }
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        temporary.chmod(0o755)
        for name, content in files.items():
            with open(temporary / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _replace(temporary, folder)
    except OSError as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        kept = "the previous checkpoint there is intact" if (folder / CONFIG).exists() else "nothing was left behind"
        raise InputError(
            f"cannot save the checkpoint: {error.strerror}; {kept}", remedy="free space or choose another folder", file=folder
        ) from error
    return folder


def _replace(new: Path, folder: Path) -> None:
    old = _backup(folder)
    if old.exists() and folder.exists():
        shutil.rmtree(old)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def _backup(folder: Path) -> Path:
    """Where the previous checkpoint is between the two renames of `_replace`; `load` looks here after a crash."""
    return folder.with_name(f".{folder.name}.previous")


def load(model: str | os.PathLike[str], *, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None) -> Potential:
    """The potential of a checkpoint folder, or of published weights by their name, ready for inference.

    Args:
        model: the folder; where there is none of that name, a published model such as "sevennet-0" (see `matfound.models.published`),
            or an address on the Hugging Face Hub, "hf://OWNER/NAME" (see `matfound.models.downloaded`).
        device: where to put it.
        dtype: float32 or float64 for the weights; None keeps the stored type. References stay float64.

    Raises:
        InputError: not a checkpoint, damaged, or of a newer format; names the file and the remedy.
    """
    name = os.fspath(model)
    if not Path(model).exists() and (_is_published(name) or name.startswith("hf://")):
        from matfound.models import downloaded, published

        potential = downloaded.from_hub(name) if name.startswith(downloaded.HUB) else published.load(name)
        return potential.to(device=device, dtype=None if dtype is None else as_dtype(dtype))
    folder = _find(model)
    config, state = _read(folder)
    try:
        for field in config["fields"].values():
            fields.declare(fields.from_dict(field))
        potential = build(config["model"])
    except InputError as error:
        raise error.at(folder / CONFIG) from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"damaged: {error}", remedy="get the checkpoint again", file=folder / CONFIG) from error
    expected = potential.state_dict()
    for name in sorted(expected.keys() ^ state.keys()):
        problem = f"tensor '{name}' is missing" if name in expected else f"tensor '{name}' is unknown to the model"
        raise InputError(problem, remedy="config and weights do not belong together", file=folder / WEIGHTS)
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            problem = f"tensor '{name}' has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            raise InputError(problem, remedy="config and weights do not belong together", file=folder / WEIGHTS)
    floats = {tensor.dtype for name, tensor in state.items() if name in dict(potential.named_parameters())}
    potential.to(floats.pop() if len(floats) == 1 else torch.float32)
    potential.load_state_dict(state)
    if dtype is not None:
        potential.to(as_dtype(dtype))
    return potential.to(device).eval().requires_grad_(False)


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """float32 or float64.

    Raises:
        InputError: anything else.
    """
    known = {"float32": torch.float32, "float64": torch.float64}
    found = known.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise InputError(f"dtype '{dtype}' is not supported", remedy=nearest(str(dtype), known))
    return found


def _is_published(name: str) -> bool:
    return name.lower() in {short for full in catalog.names("models") for short in (full, full.rpartition("/")[2])}


def _find(model: str | os.PathLike[str]) -> Path:
    folder = Path(model)
    if not folder.exists() and (_backup(folder) / CONFIG).exists():
        return _backup(folder)
    if (folder / CONFIG).is_file():
        return folder
    if folder.is_file() and folder.name in (CONFIG, WEIGHTS):
        return folder.parent
    if folder.exists():
        raise InputError(f"not a matfound checkpoint: there is no {CONFIG} in it", remedy="name the checkpoint folder", file=folder)
    near = [str(p.parent) for p in folder.parent.glob(f"*/{CONFIG}")] if folder.parent.is_dir() else []
    near += [name.rpartition("/")[2] for name in catalog.names("models")]
    raise InputError(f"there is no checkpoint or published model '{model}'", remedy=nearest(str(folder), near))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / CONFIG).read_text())
        version = int(config["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"damaged: {error}", remedy="get the checkpoint again", file=folder / CONFIG) from error
    if version > FORMAT_VERSION:
        problem = f"checkpoint format {version} is newer than this matfound reads ({FORMAT_VERSION})"
        raise InputError(problem, remedy="upgrade matfound: pip install -U matfound", file=folder / CONFIG)
    try:
        state = load_tensors((folder / WEIGHTS).read_bytes())
    except FileNotFoundError:
        raise InputError("the weights are missing", remedy="get the checkpoint again", file=folder / WEIGHTS) from None
    except SafetensorError as error:
        raise InputError(f"damaged: {error}", remedy="get the checkpoint again", file=folder / WEIGHTS) from error
    return upgrade(config, state)


def _card(potential: Potential, card: dict[str, Any]) -> str:
    text = card.pop("text", None)
    front = {"library_name": "matfound", "tags": ["chemistry", "materials", "interatomic-potential"], **card}
    if potential.licence:
        front.setdefault("license", potential.licence.lower())
    parameters = sum(p.numel() for p in potential.parameters())
    body = text or (
        f"# {front.get('model_name', 'matfound model')}\n\n"
        f"{type(potential.backbone).__name__}, {parameters:,} parameters. Predicts {', '.join(potential.outputs)}; "
        f"levels of theory: {', '.join(potential.datasets)}.\n\n"
        '```python\nimport matfound\n\natoms.calc = matfound.Calculator("path/to/this/folder")\n```\n'
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{body}"
