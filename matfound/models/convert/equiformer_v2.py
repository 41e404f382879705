"""EquiformerV2 of fairchem 1.x: names of its options and tensors."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from matfound.errors import InputError, nearest
from matfound.models.base import Head
from matfound.models.convert.tensors import Tensors
from matfound.models.equiformer_v2 import EquiformerV2
from matfound.models.equiformer_v2_heads import EquiformerV2Energy, EquiformerV2Forces, EquiformerV2Stress

#: What the options are where a file does not say (fairchem-core 1.10).
_DEFAULTS: dict[str, Any] = {
    "max_neighbors": 500,
    "max_radius": 5.0,
    "max_num_elements": 90,
    "num_layers": 12,
    "sphere_channels": 128,
    "attn_hidden_channels": 128,
    "num_heads": 8,
    "attn_alpha_channels": 32,
    "attn_value_channels": 16,
    "ffn_hidden_channels": 512,
    "norm_type": "rms_norm_sh",
    "lmax_list": [6],
    "mmax_list": [2],
    "edge_channels": 128,
    "share_atom_edge_embedding": False,
    "use_m_share_rad": False,
    "use_gate_act": False,
    "use_grid_mlp": False,
    "alpha_drop": 0.1,
    "drop_path_rate": 0.05,
    "enforce_max_neighbors_strictly": True,
    "grid_resolution": 0,
    "avg_num_nodes": 77.81317,
    "avg_degree": 23.395238876342773,
    "use_energy_lin_ref": False,
}
#: Options with one value that is read here.
_FIXED: dict[str, Any] = {
    "use_atom_edge_embedding": True,
    "distance_function": "gaussian",
    "use_s2_act_attn": False,
    "use_attn_renorm": True,
    "use_sep_s2_act": True,
}
#: Options that change nothing in the network: how graphs are made (ours are), initial values, training, and what the code ignores.
_IGNORED = {
    "name", "model", "use_pbc", "use_pbc_single", "otf_graph", "regress_forces", "regress_stress", "regress_energy", "num_sphere_samples",
    "num_distance_basis", "attn_activation", "ffn_activation", "proj_drop", "weight_init", "load_energy_lin_ref", "direct_forces",
    "use_force_encoding", "use_noise_schedule_sigma_encoding", "use_denoising_energy", "use_denoising_stress", "activation_checkpoint",
}  # fmt: skip
_STRESS_FIXED = {"use_source_target_embedding": True, "decompose": True, "extensive": False, "edge_level": False}

#: Names of the network, as registered and as classes.
MODELS = (
    "equiformer_v2", "equiformer_v2_backbone", "equiformer_v2_dens_backbone", "EquiformerV2", "EquiformerV2Backbone", "EqV2DeNSBackbone",
)  # fmt: skip
_ENERGY = ("equiformer_v2_energy_head", "EquiformerV2EnergyHead", "DeNSScalarHead")
_FORCES = ("equiformer_v2_force_head", "EquiformerV2ForceHead", "DeNSVectorHead")
_STRESS = ("rank2_symmetric_head", "Rank2SymmetricTensorHead", "DeNSRank2Head")

#: Tensors that follow from the configuration.
DERIVED = (
    r"(^|\.)(SO3_rotation|SO3_grid|mappingReduced|mapping)\.|(^|\.)distance_expansion\.offset$"
    r"|\.(balance_degree_weight|expand_index)$"
)
#: Parts of denoising runs (DeNS) that are off when there is no noise.
_DENOISING = re.compile(r"(^|\.)(force_embedding|denoising_pos_block)\.")

#: Foreign name to ours, in this order, each as often as it occurs.
_NAMES = [
    (r"(^|\.)sphere_embedding\.weight$", r"\1embedding"),
    (r"\bedge_degree_embedding\.", "edge_degree."),
    (r"\b(source|target)_embedding\.weight$", r"pair.\1"),
    (r"(\bso2_conv_1\.)?\brad_func\.net\.", "radial.layers."),
    (r"\.ga\.", ".attention."),
    (r"\bso2_conv_(\d)\.fc_m0\.weight$", r"linear_\1.weights.0"),
    (r"\bso2_conv_(\d)\.fc_m0\.bias$", r"linear_\1.bias"),
    (r"\bproj\.", "project."),
    (r"\.ffn\.", ".feed_forward."),
    (r"\bso3_linear_(\d)\.", r"linear_\1."),
    (r"\b(scalar_mlp\.0|gating_linear)\.", "scalar."),
    (r"\.affine_weight$", ".weight"),
    (r"\.affine_bias$", ".bias"),
    (r"\.norm_l0\.", ".scalar."),
    (r"\bsphharm_norm\b", "harmonics_norm"),
    (r"\bxedge_layer_norm\b", "message_norm"),
    (r"\bblock\.scalar_MLP\.", "isotropic."),
    (r"\bblock\.irrep2_MLP\.", "anisotropic."),
]


def rename(key: str) -> str:
    """Our name of a tensor: "blocks.0.ga.proj.weight", with "backbone." or without, is "backbone.blocks.0.attention.project.weight"."""
    key = re.sub(r"^(output_heads\.\w+\.)?energy_block\.", "heads.energy.network.", key)
    key = re.sub(r"^(output_heads\.\w+\.)?force_block\.", "heads.forces.network.", key)
    key = re.sub(r"^(\w+\.)*energy_lin_ref$", "heads.energy.references", key)
    key = re.sub(r"^output_heads\.\w+\.(?=sphharm_norm|xedge_layer_norm|block\.)", "heads.stress.", key)
    if not key.startswith(("heads.", "backbone.", "output_heads.")):
        key = "backbone." + key
    for pattern, name in _NAMES:
        key = re.sub(pattern, name, key)
    return re.sub(r"\bso2_conv_(\d)\.so2_m_conv\.(\d+)\.fc\.weight$", lambda m: f"linear_{m[1]}.weights.{int(m[2]) + 1}", key)


def build(
    config: Mapping[str, Any], heads: Mapping[str, Mapping[str, Any]], grid_error: float | None = None
) -> tuple[EquiformerV2, dict[str, Head]]:
    """The network and the heads of a file's options, with weights of their own.

    Args:
        config: options of the network, or of its backbone.
        heads: options of each head; empty for the older layout, which has no separate ones.
        grid_error: as in `EquiformerV2`.

    Raises:
        InputError: an option that is not known here.
    """
    unknown = sorted(config.keys() - _DEFAULTS.keys() - _FIXED.keys() - _IGNORED)
    if unknown:
        raise InputError(f"the options {', '.join(unknown)} are not known here", remedy=nearest(unknown[0], _DEFAULTS))
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise InputError(f"the option {key} = {config[key]!r} is not known here, expected {value!r}")
    get = {key: config[key] if config.get(key) is not None else value for key, value in _DEFAULTS.items()}.__getitem__
    if len(get("lmax_list")) != 1 or len(get("mmax_list")) != 1:
        raise InputError(f"features of several resolutions, lmax_list = {get('lmax_list')}, are not known here")
    lmax, mmax = int(get("lmax_list")[0]), int(get("mmax_list")[0])
    backbone = EquiformerV2(
        cutoff=float(get("max_radius")),
        max_neighbors=int(get("max_neighbors")),
        strict=bool(get("enforce_max_neighbors_strictly")),
        num_layers=int(get("num_layers")),
        lmax=lmax,
        mmax=mmax,
        channels=int(get("sphere_channels")),
        heads=int(get("num_heads")),
        attention_hidden=int(get("attn_hidden_channels")),
        alpha_channels=int(get("attn_alpha_channels")),
        value_channels=int(get("attn_value_channels")),
        ffn_hidden=int(get("ffn_hidden_channels")),
        edge_channels=int(get("edge_channels")),
        num_elements=int(get("max_num_elements")),
        norm=get("norm_type"),
        activation="gate" if get("use_gate_act") else "separable",
        grid_mlp=bool(get("use_grid_mlp")) and not get("use_gate_act"),
        grid=_grid(get("grid_resolution"), lmax, lmax),
        attention_grid=_grid(get("grid_resolution"), lmax, mmax),
        shared_embedding=bool(get("share_atom_edge_embedding")),
        shared_radial=bool(get("use_m_share_rad")),
        avg_neighbors=float(get("avg_degree")),
        alpha_drop=float(get("alpha_drop")),
        drop_path=float(get("drop_path_rate")),
        grid_error=grid_error,
    )
    energy = EquiformerV2Energy(float(get("avg_num_nodes")), bool(get("use_energy_lin_ref")))
    return backbone, _heads(config, heads, energy, get("norm_type"))


def _grid(resolution: int, lmax: int, order: int) -> list[int]:
    """Latitudes and longitudes; 0 is none given, for which fairchem takes the least that represents the features."""
    return [resolution, resolution] if resolution else [2 * (lmax + 1), 2 * order + (3 if order == lmax else 1)]


def _heads(config: Mapping[str, Any], heads: Mapping[str, Mapping[str, Any]], energy: Head, norm: Any) -> dict[str, Head]:
    """Those of the file; the older layout has energy, and forces if the options say so."""
    if not heads:
        forces = {"forces": EquiformerV2Forces()} if config.get("regress_forces", True) else {}
        return {"energy": energy, **forces}
    found: dict[str, Head] = {}
    for name, options in heads.items():
        kind = str(options.get("module")).rpartition(".")[2]
        if kind in _ENERGY and options.get("reduce", "sum") == "sum":
            found["energy"] = energy
        elif kind in _FORCES:
            found["forces"] = EquiformerV2Forces()
        elif kind in _STRESS and all(options.get(key, value) == value for key, value in _STRESS_FIXED.items()):
            found["stress"] = EquiformerV2Stress(norm)
        else:
            raise InputError(f"the head '{name}', {dict(options)}, is not known here")
    return found


def fill(backbone: EquiformerV2, heads: Mapping[str, Head], state: Tensors) -> None:
    """Copy the weights; parts that serve denoising in training only are left out.

    Args:
        backbone: as `build` made it.
        heads: likewise, attached to it.
        state: tensors of the file without any prefix; those that are copied are taken out.

    Raises:
        InputError: a tensor is missing or of another shape.
    """
    for key in [key for key in state.left if _DENOISING.search(key)]:
        state.take(key)
    found = {rename(key): key for key in state.left}
    ours = [(f"backbone.{name}", p) for name, p in backbone.named_parameters()]
    ours += [(f"heads.{head}.{name}", p) for head, module in heads.items() for name, p in module.named_parameters()]
    with torch.no_grad():
        for name, parameter in ours:
            # One level of theory: what has a row for each has one.
            parameter.copy_(state.take(found.get(name, name), *parameter.shape))
