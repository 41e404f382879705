"""OC20's baselines of fairchem 1.x, SchNet, DimeNet++ and PaiNN: names of their options and tensors.

CGCNN's files are not read: their first layer acts on a table of element properties that is not in them.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from matfound.errors import InputError, nearest
from matfound.models.base import Backbone, Head
from matfound.models.convert.tensors import Tensors
from matfound.models.dimenetplusplus import DimeNetPlusPlus
from matfound.models.painn import PaiNN, PaiNNForces
from matfound.models.perceptron_heads import PerceptronEnergy
from matfound.models.schnet import SchNet

Built = tuple[Backbone, dict[str, Head]]

#: Options that change nothing in the network: how graphs are made (ours are), and a file of factors that are in the state dict, too.
_IGNORED = {"name", "model", "use_pbc", "use_pbc_single", "otf_graph", "scale_file"}
#: What fairchem's code has where a file does not say; SchNet and DimeNet++ take the 50 nearest neighbours and have no such option.
_NEIGHBORS = 50
_SCHNET: dict[str, Any] = {
    "regress_forces": True, "hidden_channels": 128, "num_filters": 128, "num_interactions": 6, "num_gaussians": 50, "cutoff": 10.0,
}  # fmt: skip
_DIMENET: dict[str, Any] = {
    "regress_forces": True, "hidden_channels": 128, "num_blocks": 4, "int_emb_size": 64, "basis_emb_size": 8, "out_emb_channels": 256,
    "num_spherical": 7, "num_radial": 6, "cutoff": 10.0, "envelope_exponent": 5, "num_before_skip": 1, "num_after_skip": 2,
    "num_output_layers": 3,
}  # fmt: skip
_PAINN: dict[str, Any] = {
    "regress_forces": True, "direct_forces": True, "hidden_channels": 512, "num_layers": 6, "num_rbf": 128, "cutoff": 12.0,
    "max_neighbors": 50, "num_elements": 83, "envelope": {"name": "polynomial", "exponent": 5},
}  # fmt: skip
#: Options with one value that is read here.
_FIXED: dict[str, Any] = {
    "readout": "sum", "act": "silu", "rbf": {"name": "gaussian"}, "num_targets": 1, "enforce_max_neighbors_strictly": True,
}  # fmt: skip

#: Tensors that follow from the configuration, that are in a file twice, or that are not trained (averaged weights leave these out).
DERIVED = r"(^|\.)(distance_expansion|radial_basis\.rbf)\.offset$|\.conv\.nn\.|(^|\.)(atomic_mass|initial_atomref)$|\.scale_factor$"

#: Foreign name to ours, in this order, each as often as it occurs.
_NAMES: dict[type[Backbone], list[tuple[str, str]]] = {
    SchNet: [
        (r"^interactions\.(\d+)\.conv\.nn\.", r"twice.\1."),
        (r"^interactions\.(\d+)\.mlp\.", r"backbone.interactions.\1.conv.nn."),
        (r"^(embedding|interactions)\.", r"backbone.\1."),
        (r"^lin1\.", "heads.energy.network.0."),
        (r"^lin2\.", "heads.energy.network.2."),
    ],
    DimeNetPlusPlus: [
        (r"^rbf\.", "backbone.radial."),
        (r"^emb\.", "backbone.embedding."),
        (r"^interaction_blocks\.", "backbone.interactions."),
        (r"^output_blocks\.", "backbone.outputs."),
    ],
    PaiNN: [
        (r"^atom_emb\.embeddings\.", "backbone.embedding."),
        (r"^message_layers\.(\d+)\.x_proj\.", r"backbone.messages.\1.atoms."),
        (r"^message_layers\.(\d+)\.rbf_proj\.", r"backbone.messages.\1.edges."),
        (r"^message_layers\.(\d+)\.x_layernorm\.", r"backbone.messages.\1.norm."),
        (r"^update_layers\.(\d+)\.vec_proj\.", r"backbone.updates.\1.mix."),
        (r"^update_layers\.(\d+)\.xvec_proj\.", r"backbone.updates.\1.network."),
        (r"^upd_out_scalar_scale_(\d+)\.scale_factor$", r"backbone.scales.\1"),
        (r"^out_energy\.", "heads.energy.network."),
        (r"^out_forces\.output_network\.(\d+)\.vec1_proj\.", r"heads.forces.blocks.\1.length."),
        (r"^out_forces\.output_network\.(\d+)\.vec2_proj\.", r"heads.forces.blocks.\1.mix."),
        (r"^out_forces\.output_network\.(\d+)\.update_net\.0\.", r"heads.forces.blocks.\1.network.0."),
    ],
}


def _options(config: Mapping[str, Any], heads: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The file's options, completed.

    Raises:
        InputError: an option that is not known here.
    """
    if heads:
        raise InputError("a backbone with separate heads (hydra) of this model is not read", remedy="convert the file of the whole model")
    unknown = sorted(config.keys() - defaults.keys() - _FIXED.keys() - _IGNORED - {"max_neighbors"})
    if unknown:
        raise InputError(f"the options {', '.join(unknown)} are not known here", remedy=nearest(unknown[0], defaults))
    for key, value in _FIXED.items():
        if key not in defaults and config.get(key, value) != value:
            raise InputError(f"the option {key} = {config[key]!r} is not known here, expected {value!r}")
    return {key: config[key] if config.get(key) is not None else value for key, value in defaults.items()}


def _schnet(config: Mapping[str, Any], heads: Mapping[str, Any], _: float | None) -> Built:
    get = _options(config, heads, _SCHNET)
    channels = int(get["hidden_channels"])
    backbone = SchNet(
        cutoff=float(get["cutoff"]),
        max_neighbors=int(config.get("max_neighbors") or _NEIGHBORS),
        channels=channels,
        num_filters=int(get["num_filters"]),
        num_layers=int(get["num_interactions"]),
        num_basis=int(get["num_gaussians"]),
    )
    forces = bool(get["regress_forces"])
    return backbone, {"energy": PerceptronEnergy([channels // 2], "shifted_softplus", forces=forces, stress=forces)}


def _dimenet(config: Mapping[str, Any], heads: Mapping[str, Any], _: float | None) -> Built:
    get = _options(config, heads, _DIMENET)
    backbone = DimeNetPlusPlus(
        cutoff=float(get["cutoff"]),
        max_neighbors=int(config.get("max_neighbors") or _NEIGHBORS),
        channels=int(get["hidden_channels"]),
        num_layers=int(get["num_blocks"]),
        interaction_channels=int(get["int_emb_size"]),
        basis_channels=int(get["basis_emb_size"]),
        output_channels=int(get["out_emb_channels"]),
        num_spherical=int(get["num_spherical"]),
        num_radial=int(get["num_radial"]),
        envelope_p=int(get["envelope_exponent"]),
        num_before_skip=int(get["num_before_skip"]),
        num_after_skip=int(get["num_after_skip"]),
        num_output_layers=int(get["num_output_layers"]),
        detach_angles=True,
    )
    # Without the angles' part, what would be called a stress is none.
    return backbone, {"energy": PerceptronEnergy([], bias=False, forces=bool(get["regress_forces"]), stress=False)}


def _painn(config: Mapping[str, Any], heads: Mapping[str, Any], _: float | None) -> Built:
    get = _options(config, heads, _PAINN)
    envelope = dict(get["envelope"])
    if envelope.pop("name", "polynomial") != "polynomial" or envelope.keys() - {"exponent"}:
        raise InputError(f"the option envelope = {get['envelope']!r} is not known here", remedy="expected a polynomial with its exponent")
    channels, direct = int(get["hidden_channels"]), bool(get["direct_forces"])
    backbone = PaiNN(
        cutoff=float(get["cutoff"]),
        max_neighbors=int(get["max_neighbors"]),
        channels=channels,
        num_layers=int(get["num_layers"]),
        num_basis=int(get["num_rbf"]),
        envelope_p=int(envelope.get("exponent", 5)),
        num_elements=int(get["num_elements"]),
    )
    gradient = bool(get["regress_forces"]) and not direct
    found: dict[str, Head] = {"energy": PerceptronEnergy([channels // 2], "scaled_silu", forces=gradient, stress=gradient)}
    if get["regress_forces"] and direct:
        found["forces"] = PaiNNForces()
    return backbone, found


def fill(backbone: Backbone, heads: Mapping[str, Head], state: Tensors) -> None:
    """Copy the weights.

    Args:
        backbone: as it was built for the file.
        heads: likewise, attached to it.
        state: tensors of the file without any prefix; those that are copied are taken out.

    Raises:
        InputError: a tensor is missing or of another shape.
    """
    found = {_rename(key, _NAMES[type(backbone)]): key for key in state.left}
    ours = [(f"backbone.{name}", p) for name, p in backbone.named_parameters()]
    ours += [(f"heads.{head}.{name}", p) for head, module in heads.items() for name, p in module.named_parameters()]
    _join_readouts(backbone, state, found)
    _split_gates(state, found)
    with torch.no_grad():
        for name, parameter in ours:
            value = state.take(found.get(name, name), *parameter.shape)
            if ".scales." in name and not value:
                value = torch.ones_like(value)  # a factor that was never fitted is not applied
            parameter.copy_(value)


def _rename(key: str, names: list[tuple[str, str]]) -> str:
    for pattern, name in names:
        key = re.sub(pattern, name, key)
    return key


def _join_readouts(backbone: Backbone, state: Tensors, found: dict[str, str]) -> None:
    """DimeNet++: the last maps of all output blocks as one of all of their features."""
    if isinstance(backbone, DimeNetPlusPlus):
        parts = [state.take(f"output_blocks.{n}.lin.weight") for n in range(len(backbone.outputs))]
        _put(state, found, "heads.energy.network.0.weight", torch.cat(parts, dim=1))


def _split_gates(state: Tensors, found: dict[str, str]) -> None:
    """PaiNN: what makes the scalars and the gates of a gated block is one map in the file."""
    for key in [key for key in state.left if re.search(r"^out_forces\.output_network\.\d+\.update_net\.2\.", key)]:
        block, kind = key.split(".")[2], key.rpartition(".")[2]
        scalars, gates = state.take(key).chunk(2)
        _put(state, found, f"heads.forces.blocks.{block}.scalars.{kind}", scalars)
        _put(state, found, f"heads.forces.blocks.{block}.gates.{kind}", gates)


def _put(state: Tensors, found: dict[str, str], name: str, value: Tensor) -> None:
    state.left[name] = value
    found[name] = name


#: How the name of a network is built and filled.
MODELS: dict[str, tuple[Callable[..., Built], Callable[..., None]]] = {
    "schnet": (_schnet, fill),
    "dimenetplusplus": (_dimenet, fill),
    "painn": (_painn, fill),
}
