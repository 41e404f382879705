"""Checkpoints of fairchem 1.x, ocp and the code of EquiformerV3: EquiformerV2, EquiformerV3, GemNet-OC, SchNet, DimeNet++ and PaiNN.

What differs between the files: prefixes of the keys (`module.`, `_orig_mod.`, any number of them); the configuration, whose model is a
name with `model_attributes` beside it in the older files; normalizers called `target` and `grad_target` there; the layout, one network
(`eqv2`) or a backbone with heads (`hydra`); and whether averaged weights (`ema`) lie beside the last ones, as in files that training
resumes from. Then the averaged ones are taken, which are those that were evaluated: other readers of such files take the last ones.

Energies come back in eV: the file's normalizers and element references are part of the heads. An element whose reference is larger than
1e6 eV was not in the training data (least squares leave anything there) and is not known.
"""

import functools
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matfound.errors import InputError, nearest
from matfound.graphs.neighbors import add_graphs
from matfound.models.base import Backbone, Head, Potential
from matfound.models.convert import equiformer_v2, equiformer_v3, gemnet_oc
from matfound.models.convert.tensors import Tensors
from matfound.models.equiformer_v2_heads import EquiformerV2Energy
from matfound.models.gemnet_oc import GemNetOC
from matfound.nn.heads import EnergyTable, Float64Buffers
from matfound.nn.so3.grid import GridWarning
from matfound.structures.atomic_data import AtomicData

log = logging.getLogger(__name__)

_PREFIX = re.compile(r"^((_orig_mod|module)\.)+")
#: References that no element has.
_LARGEST_REFERENCE = 1e6
_OLD_NORMALIZERS = {"target": "energy", "grad_target": "forces"}

Build = Callable[[Mapping[str, Any], Mapping[str, Mapping[str, Any]], float | None], tuple[Backbone, dict[str, Head]]]


class _Family(NamedTuple):
    """How a family's part of a file is read; see `matfound.models.convert.equiformer_v2`."""

    build: Build
    fill: Callable[[Any, Mapping[str, Head], Tensors], None]
    derived: str


def _families() -> dict[str, _Family | Callable[[], _Family]]:
    v2 = _Family(equiformer_v2.build, equiformer_v2.fill, equiformer_v2.DERIVED)

    def v3(denoising: bool) -> _Family:
        def build(config: Mapping[str, Any], heads: Any, grid_error: float | None) -> Any:  # noqa: ARG001 - it has no separate heads
            return equiformer_v3.build(config, denoising, grid_error)

        return _Family(build, equiformer_v3.fill, equiformer_v3.DERIVED)

    gemnet = _Family(gemnet_oc.build, gemnet_oc.fill, gemnet_oc.DERIVED)
    return {
        **dict.fromkeys(equiformer_v2.MODELS, v2),
        "equiformer_v3": v3(False),
        "equiformer_v3_dens": v3(True),
        **dict.fromkeys(gemnet_oc.MODELS, gemnet),
        **{name: functools.partial(_baseline, name) for name in ("schnet", "dimenetplusplus", "painn")},
    }


def _baseline(name: str) -> _Family:
    """Imported when it is needed: PyG's layers take a second."""
    from matfound.models.convert import baselines

    return _Family(*baselines.MODELS[name], baselines.DERIVED)


def recognises(content: object) -> bool:
    """Whether unpickled content is a checkpoint of fairchem 1.x."""
    return (
        isinstance(content, dict) and "state_dict" in content and isinstance(content.get("config"), dict) and "model" in content["config"]
    )


def convert(content: Mapping[str, Any], datasets: Sequence[str] = (), licence: str = "", *, ema: bool = True) -> Potential:
    """The potential of an unpickled checkpoint; see `matfound.models.convert.convert`.

    Args:
        content: with `state_dict` and `config`, and `normalizers`, `elementrefs`, `ema` where the file has them.
        datasets: a name for the level of theory.
        licence: of the weights.
        ema: take the averaged weights, if there are any.

    Warns:
        GridWarning: the activations' grid is too coarse; states how much turning a structure changes the forces, which is measured.
    """
    if len(datasets) > 1:
        raise InputError(f"the file has one level of theory, received names for {len(datasets)}", remedy="give one name, or none")
    name, config, heads = _model(content["config"])
    families = _families()
    if name not in families:
        raise InputError(f"the model '{name}' of the file is not read", remedy=nearest(name, families))
    found = families[name]
    family = found if isinstance(found, _Family) else found()
    state = _state(content, family.derived, ema=ema)
    potential, coarse = _build(family, config, heads, list(datasets) or ["default"], licence)
    potential.to(state.left[next(iter(state.left))].dtype)
    with torch.no_grad():
        if not config.get("use_energy_lin_ref"):
            # References that the model could add to its output, and does not.
            for key in [key for key in state.left if key.endswith("energy_lin_ref")]:
                state.take(key)
        family.fill(potential.backbone, dict(potential.heads.items()), state)  # type: ignore[arg-type]
        state.finish()
        if isinstance(potential.backbone, GemNetOC):
            gemnet_oc.complete_factors(potential.backbone, content.get("scale_dict"))
        _scale(potential, content)
    if coarse:
        _measure(potential)
    return potential


def _model(config: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name and options of the network, and of its heads where they are apart."""
    model = config["model"]
    options = dict(config.get("model_attributes") or {}) if isinstance(model, str) else dict(model)
    name = str(options.pop("name", model))
    if name != "hydra":
        return name, options, {}
    backbone = dict(options.get("backbone") or {})
    # A name in the registry, or the path of the class.
    return str(backbone.pop("model", "")).rpartition(".")[2], backbone, dict(options.get("heads") or {})


def _build(
    family: _Family, config: Mapping[str, Any], heads: Mapping[str, Any], datasets: list[str], licence: str
) -> tuple[Potential, bool]:
    """The potential, and whether its grid is too coarse."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", GridWarning)
            # An error of 0 stands for one that is not known yet: the grid is accepted.
            backbone, found = family.build(config, heads, 0.0)
        coarse = any(issubclass(warning.category, GridWarning) for warning in caught)
        if not coarse:
            backbone, found = family.build(config, heads, None)
        return Potential(backbone, found, datasets, licence=licence), coarse
    except (TypeError, KeyError) as error:
        raise InputError(f"the options of the model cannot be read: {error}", remedy="get the file again") from None


def _state(content: Mapping[str, Any], derived: str, *, ema: bool) -> Tensors:
    """The tensors without prefixes, averaged ones where they are wanted."""
    state = Tensors(content["state_dict"], re.compile(derived), "fairchem-core 1.10", lambda key: _PREFIX.sub("", key))
    averaged = (content.get("ema") or {}).get("shadow_params")
    if averaged is None:
        return state
    if not ema:
        log.warning("matfound: the last weights are taken, not the averaged ones (ema)")
        return state
    # They are in the order of the parameters, as the state dict is, and without those that are not trained.
    untrained = ("energy_lin_ref", ".scale_factor")
    names = [key for key in state.left if not re.search(derived, key) and not key.endswith(untrained)]
    if [tuple(state.left[name].shape) for name in names] != [tuple(tensor.shape) for tensor in averaged]:
        raise InputError("the averaged weights (ema) are not those of the model's tensors", remedy="convert the last weights: --no-ema")
    log.warning("matfound: the averaged weights (ema) are taken")
    state.left.update(zip(names, averaged, strict=True))
    return state


def _scale(potential: Potential, content: Mapping[str, Any]) -> None:
    """Normalizers and element references into the heads; what the file has none of stays in the model's own units."""
    normalizers = {_OLD_NORMALIZERS.get(name, name): _normalizer(value) for name, value in (content.get("normalizers") or {}).items()}
    table = _table(potential, "energy")
    if isinstance(table, EnergyTable):
        shift, scale = normalizers.pop("energy", (0.0, 1.0))
        table.shift.fill_(shift)
        table.scale.fill_(scale)
        references = _references((content.get("elementrefs") or {}).get("energy"))
        known = torch.tensor(sorted(potential.backbone.elements))
        table.reference[:, known] = references[known]
        own = potential.heads["energy"]
        if isinstance(own, EquiformerV2Energy) and own.own_references:
            absent = torch.isnan(_filled(own.references)[: len(own.references)])
            table.reference[:, : len(absent)][:, absent] = torch.nan
            own.references[absent] = 0.0
    for field, name, part in (
        ("forces", "scale", "forces"),
        ("stress", "scale", "stress"),
        ("stress", "isotropic_scale", "stress_isotropic"),
        ("stress", "anisotropic_scale", "stress_anisotropic"),
    ):
        table = _table(potential, field)
        if table is not None and name in dict(table.named_buffers()) and part in normalizers:
            mean, scale = normalizers.pop(part)
            table.get_buffer(name).fill_(scale)
            if part == "stress_isotropic":
                table.isotropic_shift.fill_(mean)
            elif mean:
                raise InputError(f"the normalizer '{part}' has the mean {mean:g}, expected 0", remedy="get the file again")
    if potential.conservative and isinstance(table := _table(potential, "energy"), EnergyTable):
        for part in {"forces", "stress"} & normalizers.keys():
            # Forces and stress follow from the energy, and so does their scale.
            mean, scale = normalizers.pop(part)
            if mean or abs(scale / float(table.scale[0]) - 1) > 1e-4:
                problem = f"the normalizer '{part}' is {mean:g}, {scale:g} in a gradient model, expected 0 and the energy's scale"
                raise InputError(f"{problem}, {float(table.scale[0]):g}", remedy="get the file again")
    if normalizers:
        raise InputError(
            f"the file has normalizers that no head takes: {', '.join(normalizers)}", remedy="it is of a kind that is not known"
        )


def _table(potential: Potential, head: str) -> Float64Buffers | None:
    """Scales of a head, if there is one."""
    return getattr(potential.heads[head], "table", None) if head in potential.heads else None


def _normalizer(value: Any) -> tuple[float, float]:
    """Mean and scale."""
    entries = {str(key): item for key, item in dict(value).items()}
    found = [entries.get("mean", 0.0), entries.get("rmsd", entries.get("std"))]
    try:
        mean, scale = (float(torch.as_tensor(item).double().reshape(())) for item in found)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"a normalizer with {', '.join(entries)}", remedy="expected mean and rmsd, one number each") from None
    return mean, scale


def _references(value: Any) -> Tensor:
    """(119,) reference energies in eV: 0 without any, NaN for elements that the training data did not have."""
    if value is None:
        return torch.zeros(119, dtype=torch.float64)
    entries = dict(value) if isinstance(value, Mapping) else {"element_references": value}
    found = next((entries[key] for key in ("element_references", "coeff") if key in entries), None)
    if not isinstance(found, Tensor):
        raise InputError(f"element references with {', '.join(map(str, entries))}", remedy="expected a tensor 'element_references'")
    return _filled(found.double().flatten())


def _filled(values: Tensor) -> Tensor:
    """By atomic number, up to 118; numbers that no element has are NaN."""
    table = torch.full((119,), torch.nan, dtype=torch.float64)
    table[: min(len(values), 119)] = values[:119]
    return torch.where(table.abs() > _LARGEST_REFERENCE, torch.full_like(table, torch.nan), table)


def _measure(potential: Potential) -> None:
    """Find out what the coarse grid does, write it into the configuration and warn."""
    error = rotation_error(potential)
    potential.backbone.config["init_args"]["grid_error"] = error
    warnings.warn(
        "the file's grid of the activations is too coarse: turning a structure changes its forces by up to "
        f"{error:.1%} of the largest, as in the original",
        GridWarning,
        stacklevel=3,
    )


def rotation_error(potential: Potential, rotations: int = 4, seed: int = 0) -> float:
    """Largest change of the forces when a structure is turned, relative to the largest force; of the energy where there are none.

    Args:
        potential: in any type; it is put in eval mode meanwhile.
        rotations: how many random ones.
        seed: of a cluster of 12 atoms, and of the rotations.
    """
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    pos = 1.5 * torch.stack(torch.meshgrid(*[torch.arange(k) for k in (3, 2, 2)], indexing="ij"), dim=-1).reshape(12, 3) + 0.2 * spread
    known = sorted(potential.elements(0))
    numbers = torch.tensor([known[int(i)] for i in torch.randint(len(known), (12,), generator=generator)])
    training, results = potential.training, []
    potential.eval()
    for n in range(rotations + 1):
        turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0] if n else torch.eye(3, dtype=torch.float64)
        turn = turn * torch.linalg.det(turn)
        data = AtomicData(numbers=numbers, pos=pos @ turn.T, cell=torch.zeros(1, 3, 3, dtype=torch.float64), pbc=torch.zeros(1, 3).bool())
        with torch.no_grad():
            out = potential(add_graphs(data, potential.graphs))
        results.append(out["forces"] @ turn if "forces" in out else out["energy"])
    potential.train(training)
    largest = max(float(results[0].abs().max()), 1e-30)
    return max(float((other - results[0]).abs().max()) for other in results[1:]) / largest
