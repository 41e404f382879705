"""GemNet-OC of fairchem 1.x: names of its options and tensors."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch

from matfound.errors import InputError, nearest
from matfound.models.base import Head
from matfound.models.convert.tensors import Tensors
from matfound.models.gemnet_oc import GemNetOC
from matfound.models.gemnet_oc_heads import GemNetOCEnergy, GemNetOCForces
from matfound.models.gemnet_oc_layers import Scale

log = logging.getLogger(__name__)

#: Names of the network, as registered and as a class.
MODELS = ("gemnet_oc", "GemNetOC")

#: Options that every file has.
_SIZES = {
    "num_spherical": "num_spherical",
    "num_radial": "num_radial",
    "num_blocks": "num_blocks",
    "emb_size_atom": "atom_channels",
    "emb_size_edge": "edge_channels",
    "emb_size_rbf": "radial_channels",
    "emb_size_cbf": "circular_channels",
    "emb_size_sbf": "spherical_channels",
    "num_before_skip": "before_skip",
    "num_after_skip": "after_skip",
    "num_concat": "concat_layers",
    "num_atom": "update_layers",
    "num_output_afteratom": "output_layers",
}
#: Pairs of them.
_PAIRS = {
    ("emb_size_trip_in", "emb_size_trip_out"): "triplet_channels",
    ("emb_size_quad_in", "emb_size_quad_out"): "quadruplet_channels",
    ("emb_size_aint_in", "emb_size_aint_out"): "atom_message_channels",
}
#: What the options are where a file does not say (fairchem-core 1.10).
_DEFAULTS: dict[str, Any] = {
    "num_atom_emb_layers": 0,
    "num_global_out_layers": 2,
    "regress_forces": True,
    "direct_forces": False,
    "forces_coupled": False,
    "extensive": True,
    "cutoff": 6.0,
    "cutoff_qint": None,
    "cutoff_aeaint": None,
    "cutoff_aint": None,
    "max_neighbors": 50,
    "max_neighbors_qint": None,
    "max_neighbors_aeaint": None,
    "max_neighbors_aint": None,
    "enforce_max_neighbors_strictly": True,
    "envelope": {"name": "polynomial", "exponent": 5},
    "sbf": {"name": "spherical_harmonics"},
    "quad_interaction": False,
    "atom_edge_interaction": False,
    "edge_atom_interaction": False,
    "atom_interaction": False,
    "qint_tags": [0, 1, 2],
    "num_elements": 83,
}
#: Options with one value that is read here.
_FIXED: dict[str, Any] = {
    "rbf": {"name": "gaussian"},
    "rbf_spherical": None,
    "cbf": {"name": "spherical_harmonics"},
    "activation": "silu",
    "scale_basis": False,
    "scale_backprop_forces": False,
    "use_pbc": True,
}
#: Options that change nothing in the network: how graphs are made (ours are), initial values, and where scale factors came from.
_IGNORED = {"name", "model", "output_init", "otf_graph", "scale_file", "num_targets", "use_pbc_single"}

#: Tensors that follow from the configuration, or are another name of one that is read.
DERIVED = r"\.rbf\.offset$|(^|\.)seq_energy_pre\.|\.temp_buffer$"
#: Factors.
_FACTOR = re.compile(r"(^|\.)scale_\w+\.factor$")

_INTERACTIONS = {"trip": "triplet", "quad": "quadruplet", "atom_edge": "atom_edge", "edge_atom": "edge_atom"}
_DOWN = {
    "rbf_h": "update", "rbf_out": "output", "rbf_tint": "edge", "cbf_tint": "triplet", "rbf_qint": "quadruplet", "cbf_qint": "middle",
    "sbf_qint": "dihedral", "rbf_aeint": "atom_edge", "cbf_aeint": "atom_edge_angle", "rbf_eaint": "edge_atom",
    "cbf_eaint": "edge_atom_angle", "rbf_aint": "atom",
}  # fmt: skip
#: Foreign name to ours, in this order.
_NAMES = [
    (r"\.linear\.weight$", ".weight"),
    (r"\.scale_factor$", ".factor"),
    (r"\.dense_mlp\.", ".layers."),
    (r"^atom_emb\.embeddings\.weight$", "backbone.embedding"),
    (r"^edge_emb\.", "backbone.edge_embedding."),
    (r"^mlp_(\w+)\.", lambda m: f"backbone.down_{_DOWN.get(m[1], m[1])}."),
    (r"^out_mlp_E\.", "heads.energy.network."),
    (r"^out_energy\.", "heads.energy.last."),
    (r"^out_mlp_F\.", "heads.forces.network."),
    (r"^out_forces\.", "heads.forces.last."),
    (r"^int_blocks\.", "backbone.blocks."),
    (r"^out_blocks\.", "backbone.outputs."),
    (r"\.dense_ca\.", ".skip."),
    (r"\.atom_interaction\.", ".atom_atom."),
    (r"\.(trip|quad|atom_edge|edge_atom)_interaction\.", lambda m: f".{_INTERACTIONS[m[1]]}."),
    (r"\.dense_(ba|db)\.", ".dense."),
    (r"\.mlp_rbf\.", ".radial."),
    (r"\.scale_rbf\.", ".scale_radial."),
    (r"\.mlp_[cs]bf\.bilinear\.", ".bilinear."),
    (r"\.mlp_cbf\.", ".circular."),
    (r"\.scale_cbf\.", ".scale_circular."),
    (r"\.scale_([cs]bf|rbf)_sum\.", ".scale_sum."),
    (r"\.down_projection\.", ".down."),
    (r"\.up_projection_ac\.", ".up.opposite."),
    (r"(\.edge_atom)\.up_projection_ca\.", r"\1.up."),
    (r"\.up_projection_ca\.", ".up.same."),
    (r"\.up_projection\.", ".up."),
    (r"\.layers_(before|after)_skip\.", r".\1_skip."),
    (r"\.atom_emb_layers\.", ".atom_layers."),
    (r"\.atom_update\.", ".update."),
    (r"\.concat_layer\.", ".concat."),
    (r"\.residual_m\.", ".concat_layers."),
    (r"(\.outputs\.\d+)\.(scale_sum|layers)\.", r"\1.update.\2."),
    (r"\.outputs\.(\d+)\.dense_rbf\.", r".outputs.\1.update.radial."),
    (r"\.dense_rbf\.", ".radial."),
    (r"\.seq_energy2\.", ".after_atom."),
    (r"\.seq_forces\.", ".edge_layers."),
    (r"\.dense_rbf_F\.", ".edge_radial."),
    (r"\.scale_rbf_F\.", ".scale_edge."),
]  # type: list[tuple[str, Any]]


def rename(key: str) -> str:
    """Our name of a tensor: "int_blocks.0.dense_ca.linear.weight" is "backbone.blocks.0.skip.weight"."""
    for pattern, name in _NAMES:
        key = re.sub(pattern, name, key)
    return key


def build(
    config: Mapping[str, Any], heads: Mapping[str, Mapping[str, Any]], grid_error: float | None = None
) -> tuple[GemNetOC, dict[str, Head]]:
    """The network and the heads of a file's options, with weights of their own.

    Args:
        config: options of the network.
        heads: options of each head; only the layout without separate ones is read.
        grid_error: not used.

    Raises:
        InputError: an option that is not known here.
    """
    del grid_error
    if heads:
        raise InputError(f"GemNet-OC with separate heads, {', '.join(heads)}, is not known here")
    pairs = {name for both in _PAIRS for name in both}
    known = _SIZES.keys() | pairs | _DEFAULTS.keys() | _FIXED.keys() | _IGNORED
    unknown = sorted(config.keys() - known)
    if unknown:
        raise InputError(f"the options {', '.join(unknown)} are not known here", remedy=nearest(unknown[0], known))
    for key, value in _FIXED.items():
        if (config.get(key) or value) != value:
            raise InputError(f"the option {key} = {config[key]!r} is not known here, expected {value!r}")
    get = {key: config[key] if config.get(key) is not None else value for key, value in _DEFAULTS.items()}.__getitem__
    envelope = dict(get("envelope"))
    if envelope.pop("name", None) != "polynomial" or set(envelope) > {"exponent"}:
        raise InputError(f"the envelope {get('envelope')!r} is not known here, expected a polynomial")
    sizes: dict[str, Any] = {ours: int(config[name]) for name, ours in _SIZES.items()}
    sizes |= {ours: [int(config[name]) for name in both] for both, ours in _PAIRS.items()}
    backbone = GemNetOC(
        **sizes,
        **_graph_options(get),
        spherical_basis=get("sbf")["name"],
        envelope_exponent=int(envelope.get("exponent", 5)),
        atom_layers=int(get("num_atom_emb_layers")),
        quadruplets=bool(get("quad_interaction")),
        atom_edge=bool(get("atom_edge_interaction")),
        edge_atom=bool(get("edge_atom_interaction")),
        atom_atom=bool(get("atom_interaction")),
        quadruplet_tags=[int(tag) for tag in get("qint_tags")],
        direct_forces=bool(get("direct_forces")),
        num_elements=int(get("num_elements")),
    )
    forces, direct, layers = bool(get("regress_forces")), bool(get("direct_forces")), int(get("num_global_out_layers"))
    found: dict[str, Head] = {"energy": GemNetOCEnergy(layers, bool(get("extensive")), forces=forces and not direct)}
    if direct:
        found["forces"] = GemNetOCForces(layers, bool(get("forces_coupled")))
    return backbone, found


def _graph_options(get: Any) -> dict[str, Any]:
    """Cutoffs and numbers of neighbours; what is left out is the main graph's, and of all atoms the largest."""
    cutoffs = [float(get(name) or get("cutoff")) for name in ("cutoff_qint", "cutoff_aeaint")]
    limits = [int(get(name) or get("max_neighbors")) for name in ("max_neighbors_qint", "max_neighbors_aeaint")]
    return {
        "cutoff": float(get("cutoff")),
        "cutoff_quadruplets": cutoffs[0],
        "cutoff_atom_edges": cutoffs[1],
        "cutoff_atoms": float(get("cutoff_aint") or max(float(get("cutoff")), *cutoffs)),
        "max_neighbors": int(get("max_neighbors")),
        "max_neighbors_quadruplets": limits[0],
        "max_neighbors_atom_edges": limits[1],
        "max_neighbors_atoms": int(get("max_neighbors_aint") or max(int(get("max_neighbors")), *limits)),
        "strict": bool(get("enforce_max_neighbors_strictly")),
    }


def fill(backbone: GemNetOC, heads: Mapping[str, Head], state: Tensors) -> None:
    """Copy the weights.

    Args:
        backbone: as `build` made it.
        heads: likewise, attached to it.
        state: tensors of the file without any prefix; those that are copied are taken out. Scale factors need not be among them: older
            files have them apart.

    Raises:
        InputError: a tensor is missing or of another shape.
    """
    found = {rename(key): key for key in state.left if not re.search(DERIVED, key)}
    ours = [(f"backbone.{name}", p) for name, p in backbone.named_parameters()]
    ours += [(f"heads.{head}.{name}", p) for head, module in heads.items() for name, p in module.named_parameters()]
    with torch.no_grad():
        for name, parameter in ours:
            if _FACTOR.search(name) and name not in found:
                continue
            # One level of theory: what has a row for each has one.
            parameter.copy_(state.take(found.get(name, name), *parameter.shape))


def load_factors(backbone: GemNetOC, factors: Mapping[str, Any]) -> None:
    """Set the scale factors from one of the published dictionaries, module path to number.

    Raises:
        InputError: it has others than the model, or the model has different ones already.
    """
    scales = {f"backbone.{name}": module for name, module in backbone.named_modules() if isinstance(module, Scale)}
    given = {rename(f"{key}.scale_factor").removesuffix(".factor"): float(value) for key, value in factors.items()}
    odd = sorted(scales.keys() ^ given.keys())
    if odd:
        whose = "the model" if odd[0] in scales else "the file"
        raise InputError(f"{len(given)} scale factors for a model with {len(scales)}: only {whose} has '{odd[0]}'")
    for name, scale in scales.items():
        before = float(scale.factor)
        if before and abs(before - given[name]) > 1e-5 * abs(before):
            raise InputError(f"the scale factor '{name}' is {given[name]:g}, and {before:g} in the model", remedy="get the file again")
    with torch.no_grad():
        for name, scale in scales.items():
            scale.factor.fill_(given[name])


def complete_factors(backbone: GemNetOC, factors: Mapping[str, Any] | None) -> None:
    """Scale factors that a file has apart from its tensors; warns where it has none in either place.

    Raises:
        InputError: as `load_factors`.
    """
    if factors:
        load_factors(backbone, factors)
    unknown = sum(isinstance(module, Scale) and not module.factor for module in backbone.modules())
    if unknown:
        log.warning("matfound: the file has no value for %d scale factors, which are 1 therefore; matfound fit-scales finds them", unknown)
