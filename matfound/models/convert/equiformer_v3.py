"""The names of EquiformerV3's official code (arXiv:2604.09130, a fork of fairchem v1): configuration and tensors.

`matfound.models.convert.fairchem` reads its checkpoints; here are the parts that belong to this network.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from matfound.errors import InputError, nearest
from matfound.models.base import Head
from matfound.models.convert.tensors import Tensors
from matfound.models.equiformer_v3 import Block, EdgeNetwork, EquiformerV3, GraphAttention
from matfound.models.equiformer_v3_heads import EquiformerV3Energy, EquiformerV3Forces, EquiformerV3Noise, EquiformerV3Stress
from matfound.nn.norm import MergedLayerNorm
from matfound.nn.so3.linear import SO3Linear

#: Option of the original to the backbone's argument.
_ARGUMENTS = {
    "max_radius": "cutoff",
    "max_neighbors": "max_neighbors",
    "enforce_max_neighbors_strictly": "strict",
    "num_layers": "num_layers",
    "lmax": "lmax",
    "mmax": "mmax",
    "num_channels": "channels",
    "num_heads": "heads",
    "attn_hidden_channels": "attention_hidden",
    "attn_alpha_channels": "alpha_channels",
    "attn_value_channels": "value_channels",
    "ffn_hidden_channels": "ffn_hidden",
    "edge_channels": "edge_channels",
    "num_radial_basis": "num_basis",
    "max_num_elements": "num_elements",
    "attn_grid_resolution_list": "attention_grid",
    "ffn_grid_resolution_list": "ffn_grid",
    "avg_degree": "avg_neighbors",
    "attn_eps": "attention_eps",
    "attn_weights_drop": "attention_dropout",
    "drop_path_rate": "drop_path",
}
#: What the original takes where the published configurations leave an option out.
_DEFAULTS: dict[str, Any] = {
    "enforce_max_neighbors_strictly": True,
    "avg_degree": 23.395238876342773,
    "avg_num_nodes": 77.81317,
    "attn_eps": 1e-16,
    "attn_weights_drop": 0.0,
    "drop_path_rate": 0.0,
}
#: Options with the values that the network here has.
_FIXED: dict[str, tuple[Any, ...]] = {
    "use_pbc": (True,),
    "regress_forces": (True, False),
    "regress_stress": (True, False),
    "direct_prediction": (True, False),
    "norm_type": ("merge_layer_norm",),
    "use_atom_edge_embedding": (True,),
    "use_envelope": (True,),
    "attn_activation": ("sep-merge_gates2_swiglu", "sep-merge_gates2_swiglu_mem"),
    "ffn_activation": ("sep-merge_gates2_swiglu",),
    "use_attn_renorm": (True,),
    "use_add_merge": (False,),
    "use_rad_l_parametrization": (True,),
    "softcap": (None,),
    "use_grid_mlp": (True,),
    "use_gate_force_head": (True, False),
    "use_head_reg": (False,),
}
#: Options that matter in training only, or not at all here, where graphs are our own.
_IGNORED = {
    "name", "use_pbc_single", "otf_graph", "alpha_drop", "attn_mask_rate", "value_drop", "proj_drop", "ffn_drop", "avg_num_nodes",
    "gradient_checkpointing_block_list",
}  # fmt: skip
#: Tensors that follow from the configuration.
DERIVED = (
    r"(^|\.)(distance_expansion\.offset|expand_index|balance_degree_weight|zero_padded_change_matrix)$"
    r"|(^|\.)so3_rotation\.|(^|\.)(to_grid_mat|from_grid_mat)$"
)


def build(config: Mapping[str, Any], denoising: bool, grid_error: float | None = None) -> tuple[EquiformerV3, dict[str, Head]]:
    """The network and its heads, with weights of their own.

    Args:
        config: the original's options.
        denoising: whether it is `equiformer_v3_dens`.
        grid_error: see `EquiformerV3`.

    Raises:
        InputError: an option or a value that is not known; or one without which the network is not known.
    """
    for key, value in config.items():
        if key not in _ARGUMENTS and key not in _IGNORED and (key not in _FIXED or value not in _FIXED[key]):
            known = f"expected {' or '.join(map(str, _FIXED[key]))}" if key in _FIXED else nearest(key, [*_ARGUMENTS, *_FIXED])
            raise InputError(f"the option {key} = {value!r} of EquiformerV3 is not known here", remedy=known)
    config = _DEFAULTS | dict(config)
    missing = [key for key in (*_ARGUMENTS, "regress_forces", "direct_prediction") if key not in config]
    if missing:
        raise InputError(f"the configuration of EquiformerV3 lacks {', '.join(missing)}", remedy="get the file again")
    arguments = {ours: config[theirs] for theirs, ours in _ARGUMENTS.items()}
    backbone = EquiformerV3(**arguments, force_embedding=denoising, grid_error=grid_error)
    forces, stress = bool(config["regress_forces"]), bool(config.get("regress_stress", False))
    gradient = not config["direct_prediction"]
    if not gradient and not config.get("use_gate_force_head", True):
        raise InputError("the force head without gates (use_gate_force_head = False) of EquiformerV3 is not known here")
    energy = EquiformerV3Energy(gradient and forces, gradient and stress, float(config["avg_num_nodes"]))
    heads: dict[str, Head] = {"energy": energy}
    if forces and not gradient:
        heads["forces"] = EquiformerV3Forces()
    if stress and not gradient:
        heads["stress"] = EquiformerV3Stress()
    if denoising:
        heads["noise"] = EquiformerV3Noise()
    return backbone, heads


def fill(backbone: EquiformerV3, heads: Mapping[str, Head], state: Tensors) -> None:
    """Copy the weights. Heads have rows for each level of theory; all get the same.

    Args:
        backbone: as `build` made it.
        heads: likewise, attached to it.
        state: tensors of the original, by its names without any prefix; those that are copied are taken out.

    Raises:
        InputError: a tensor is missing or of another shape.
    """
    with torch.no_grad():
        backbone.embedding.copy_(state.take("sphere_embedding.weight", *backbone.embedding.shape))
        _edge_network(backbone.edge_degree, state, "edge_degree_embedding.")
        for n, block in enumerate(backbone.blocks):
            assert isinstance(block, Block)
            _block(block, state, f"blocks.{n}.")
        _norm(backbone.norm, state, "norm.")
        if backbone.force_embedding is not None:
            _so3_linear(backbone.force_embedding.linear, state, "force_embedding.")
        for head in heads.values():
            if isinstance(head, EquiformerV3Energy):
                _linear(head.hidden, state, "energy_block.linear_1.")
                _linear(head.last, state, "energy_block.linear_2.")
            elif isinstance(head, EquiformerV3Forces):
                _attention(head.readout.attention, state, "force_block.")
            elif isinstance(head, EquiformerV3Noise):
                _attention(head.readout.attention, state, "dens_block.")
            elif isinstance(head, EquiformerV3Stress):
                _so3_linear(head.linear_1, state, "stress_block.so3_linear_1.")
                _linear(head.gate, state, "stress_block.gating_linear.")
                _so3_linear(head.linear_2, state, "stress_block.so3_linear_2.")


def _copy(parameter: Tensor, state: Tensors, key: str, rows: int = 0) -> None:
    """Copy a tensor; with `rows`, along axis `rows - 1` one row is repeated for all."""
    shape = list(parameter.shape)
    if rows:
        shape[rows - 1] = 1
    parameter.copy_(state.take(key, *shape).expand_as(parameter))


def _linear(layer: nn.Linear, state: Tensors, prefix: str) -> None:
    outputs = state.peek(f"{prefix}weight").shape[0]
    rows = int(outputs == 1)
    _copy(layer.weight, state, f"{prefix}weight", rows)
    if layer.bias is not None:
        _copy(layer.bias, state, f"{prefix}bias", rows)


def _so3_linear(layer: SO3Linear, state: Tensors, prefix: str) -> None:
    single = state.peek(f"{prefix}bias").numel() == 1
    _copy(layer.weight, state, f"{prefix}weight", 2 * int(single))
    _copy(layer.bias, state, f"{prefix}bias", int(single))


def _norm(norm: MergedLayerNorm, state: Tensors, prefix: str) -> None:
    _copy(norm.weight, state, f"{prefix}affine_weight")
    _copy(norm.bias, state, f"{prefix}affine_bias")


def _edge_network(network: EdgeNetwork, state: Tensors, prefix: str) -> None:
    _copy(network.pair.source, state, f"{prefix}source_embedding.weight")
    _copy(network.pair.target, state, f"{prefix}target_embedding.weight")
    for n, layer in enumerate(network.network.layers):
        for name, parameter in layer.named_parameters():
            _copy(parameter, state, f"{prefix}rad_func.net.{n}.{name}")


def _attention(attention: GraphAttention, state: Tensors, prefix: str) -> None:
    _edge_network(attention.radial, state, prefix)
    for n, convolution in ((1, attention.linear_1), (2, attention.linear_2)):
        so2 = f"{prefix}so2_linear_{n}."
        first, *others = convolution.weights
        _copy(first, state, f"{so2}fc_m0.weight")
        _copy(convolution.bias, state, f"{so2}fc_m0.bias")
        for m, weight in enumerate(others):
            _copy(weight, state, f"{so2}so2_m_linear.{m}.fc.weight")
    _copy(attention.alpha_dot, state, f"{prefix}alpha_dot")
    _copy(attention.alpha_norm.weight, state, f"{prefix}alpha_norm.weight")
    _copy(attention.alpha_norm.bias, state, f"{prefix}alpha_norm.bias")
    _so3_linear(attention.project, state, f"{prefix}proj.")


def _block(block: Block, state: Tensors, prefix: str) -> None:
    _norm(block.norm_1, state, f"{prefix}norm_1.")
    _attention(block.attention, state, f"{prefix}ga.")
    _norm(block.norm_2, state, f"{prefix}norm_2.")
    network, ffn = block.feed_forward, f"{prefix}ffn."
    _so3_linear(network.linear_1, state, f"{ffn}so3_linear_1.")
    _so3_linear(network.linear_2, state, f"{ffn}so3_linear_2.")
    _linear(network.scalar, state, f"{ffn}scalar_mlp.0.linear.")
    _linear(network.gate, state, f"{ffn}grid_mlp.gating_linear.")
    _linear(network.grid_1, state, f"{ffn}grid_mlp.grid_linear_1.")
    _linear(network.grid_2, state, f"{ffn}grid_mlp.grid_linear_2.")
