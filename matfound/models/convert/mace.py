"""ScaleShiftMACE models of mace-torch (arXiv:2206.07697, arXiv:2401.00096) as `MACE` potentials.

A `.model` file of mace-torch is a pickled object of its own classes, which only its own code can read. There, these lines write what is
read here, the tensors and the plain facts of the model::

    import torch
    from mace.tools.scripts_utils import extract_config_mace_model


    def plain(value):
        if hasattr(value, "tolist"):
            return value.tolist()
        return value if isinstance(value, (bool, int, float, list)) or value is None else getattr(value, "__name__", str(value))


    model = torch.load("my.model", map_location="cpu", weights_only=False)
    config = {key: plain(value) for key, value in extract_config_mace_model(model).items()}
    torch.save({"state_dict": model.state_dict(), "config": config}, "mace.pt")

The weights of the symmetric contraction belong to coupling trees of which many are the same after symmetrisation. The file stores the
coefficients of its trees; each is a combination of the independent trees here, and its weights are shared out accordingly.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from e3nn.o3 import Irreps
from torch import Tensor

from matfound.errors import InputError
from matfound.models.base import Potential
from matfound.models.convert.tensors import Tensors, coupling_sign, flat_size, matrices
from matfound.models.mace import MACE, LayerReadout, MACEEnergyHead, MACELayer
from matfound.nn.linear import IrrepsLinear
from matfound.ops.symmetric_contraction import u_matrix

#: Constants: empty weights and biases, masks of ones, Clebsch-Gordan blocks, marks of weights that are zero.
_CONSTANTS = re.compile(r"\.(output_mask|bias|_w3j_\d_\d_\d|weights_\w+_zeroed)$|\.conv_tp\.weight$")
#: Interaction blocks: whether there is a self-connection, and whether a density divides the sums.
_BLOCKS = {
    "RealAgnosticInteractionBlock": (False, False),
    "RealAgnosticResidualInteractionBlock": (True, False),
    "RealAgnosticDensityInteractionBlock": (False, True),
    "RealAgnosticDensityResidualInteractionBlock": (True, True),
}
#: Options of the model, and the values of each that the network here has.
_FIXED: dict[str, tuple[Any, ...]] = {
    "interaction_cls": tuple(_BLOCKS),
    "interaction_cls_first": tuple(_BLOCKS),
    "readout_cls": ("NonLinearReadoutBlock", "LinearReadoutBlock"),
    "radial_type": ("bessel",),
    "gate": ("silu", None),
    "distance_transform": ("Agnesi", None, "None"),
    "pair_repulsion": (True, False),
    "apply_cutoff": (True,),
    "edge_irreps": (None, "None"),
    "embedding_specs": (None, "None"),
    "use_so3": (False,),
    "use_agnostic_product": (False,),
    "use_last_readout_only": (False,),
    "use_embedding_readout": (False,),
    "use_edge_irreps_first": (False,),
    "cueq_config": (None, "None"),
    "oeq_config": (None, "None"),
}
_AGAIN = "export it again, with the lines of the documentation"
#: Of a coupling coefficient, how much may not be what symmetry gives: float32 files store them in float32.
_TOLERANCE = 1e-5


def recognises(content: object) -> bool:
    """Whether unpickled content is an exported MACE model."""
    if not (isinstance(content, dict) and {"state_dict", "config"} <= content.keys() and isinstance(content["config"], dict)):
        return False
    return {"r_max", "interaction_cls"} <= content["config"].keys() or "error" in content["config"]


def convert(content: Mapping[str, Any], datasets: Sequence[str] = (), licence: str = "") -> Potential:
    """The potential of an unpickled export; see `matfound.models.convert.convert`. Heads become levels of theory."""
    config = _check_options(content["config"])
    state = Tensors(content["state_dict"], _CONSTANTS, "ScaleShiftMACE of mace-torch 0.3.16")
    heads = [str(name) for name in config.get("heads") or ["default"]]
    names = heads if len(heads) > 1 else list(datasets or ["default"])
    if len(datasets) > 1 and list(datasets) != names:
        raise InputError(f"the file has the levels of theory {', '.join(names)}, received {', '.join(datasets)}", remedy="leave them out")
    try:
        backbone = _backbone(config, state)
    except KeyError as error:
        raise InputError(f"the model's facts lack {error}", remedy="export it again, with the lines of the documentation") from None
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the model's facts cannot be read: {error}", remedy="export it again, with the lines of the documentation"
        ) from None
    width = state.peek("scale_shift.scale").numel()
    if width not in (1, len(names)):
        raise InputError(f"the tensor 'scale_shift.scale' has {width} values for {len(names)} heads", remedy=_AGAIN)
    layers = len(backbone.layers)
    # A single layer has a linear readout; with more of them, the last has a hidden layer.
    hidden = [state.peek(f"readouts.{layers - 1}.linear_1.weight").numel() // backbone.width] if layers > 1 else []
    head = MACEEnergyHead(layers, hidden)
    potential = Potential(backbone, {"energy": head}, names, licence=licence)
    potential.to(state.peek("node_embedding.linear.weight").dtype)
    with torch.no_grad():
        _load_backbone(backbone, config, state)
        _load_head(head, backbone, [int(number) for number in config["atomic_numbers"]], state)
    state.finish()
    return potential


def _check_options(config: Mapping[str, Any]) -> Mapping[str, Any]:
    if "error" in config:
        raise InputError(f"mace-torch could not describe the model: {config['error']}", remedy="only ScaleShiftMACE is read")
    for key, known in _FIXED.items():
        if config.get(key, known[-1]) not in known:
            raise InputError(f"the option {key} = {config[key]!r} is not known here, expected {' or '.join(map(str, known))}")
    if _BLOCKS[config["interaction_cls"]][1] != _BLOCKS[config["interaction_cls_first"]][1]:
        raise InputError("the first layer is normalised in another way than the others", remedy="only density blocks with density blocks")
    return config


def _backbone(config: Mapping[str, Any], state: Tensors) -> MACE:
    """The network, with weights of its own."""
    hidden, layers, degree = Irreps(config["hidden_irreps"]), int(config["num_interactions"]), config["correlation"]
    elements = [int(number) for number in config["atomic_numbers"]]
    if state.take("atomic_numbers", len(elements)).tolist() != elements:
        raise InputError("the elements of the weights and those of the facts differ", remedy=_AGAIN)
    backbone = MACE(
        cutoff=float(state.take("r_max", 1)),
        num_layers=layers,
        irreps=str(hidden),
        lmax=int(config["max_ell"]),
        degree=int(degree[0] if isinstance(degree, list) else degree),
        num_basis=int(config["num_bessel"]),
        radial_hidden=[int(size) for size in config["radial_MLP"]],
        elements=elements,
        first_residual=_BLOCKS[config["interaction_cls_first"]][0],
        residual=_BLOCKS[config["interaction_cls"]][0],
        density=_BLOCKS[config["interaction_cls"]][1],
        transform="agnesi" if config.get("distance_transform") == "Agnesi" else "none",
        pair_repulsion=bool(config.get("pair_repulsion", False)),
        envelope_p=int(state.take("radial_embedding.cutoff_fn.p", 1)),
        embedding_scale=len(elements) ** -0.5,
    )
    first = backbone.layers[0]
    assert isinstance(first, MACELayer)
    if layers > 1 and first.contraction.blocks_out != hidden:
        raise InputError(f"the irreps '{hidden}' are not in the order of their degree", remedy="only sorted ones are read")
    return backbone


def _load_backbone(backbone: MACE, config: Mapping[str, Any], state: Tensors) -> None:
    state.take("num_interactions", 1)
    for part in ("bessel_fn", "cutoff_fn"):
        state.take(f"radial_embedding.{part}.r_max", 1)
    backbone.basis.frequencies.copy_(state.take("radial_embedding.bessel_fn.bessel_weights", backbone.basis.frequencies.numel()))
    # The file's Bessel functions have another factor; the first matrix of the weight networks takes it.
    factor = float(state.take("radial_embedding.bessel_fn.prefactor", 1).double()) / backbone.basis.prefactor
    _load_pairs(backbone, state)
    backbone.embedding.copy_(state.take("node_embedding.linear.weight", *backbone.embedding.shape))
    for n, layer in enumerate(backbone.layers):
        assert isinstance(layer, MACELayer)
        block = f"interactions.{n}."
        _load_linear(layer.linear_in, state, f"{block}linear_up.weight")
        layer.denominator.fill_(float(config["avg_num_neighbors"]))
        if layer.density_network is not None:
            weight = layer.density_network.weights[0]
            weight.copy_(state.take(f"{block}density_fn.layer0.weight", *weight.shape) * factor)
        *hidden, last = layer.weight_network.weights
        for i, weight in enumerate(hidden):
            stored = state.take(f"{block}conv_tp_weights.layer{i}.weight", *weight.shape)
            weight.copy_(stored * factor if i == 0 else stored)
        stored = state.take(f"{block}conv_tp_weights.layer{len(hidden)}.weight", *last.shape)
        last.copy_(_by_path(stored * (1.0 if hidden else factor), layer, state.couplings(f"{block}conv_tp."), n))
        _load_linear(layer.linear_out, state, f"{block}linear.weight")
        _load_linear(layer.connection, state, f"{block}skip_tp.weight", len(backbone.embedding))
        _load_contraction(layer, state, f"products.{n}.symmetric_contractions.contractions.")
        _load_linear(layer.linear_product, state, f"products.{n}.linear.weight")


def _load_pairs(backbone: MACE, state: Tensors) -> None:
    """What depends on pairs of elements: the transform of distances, and the repulsion of nuclei."""
    if backbone.transform is not None:
        prefix = "radial_embedding.distance_transform."
        for name, constant in backbone.transform.constants.items():
            constant.copy_(state.take(f"{prefix}{name}", 1)[0])
        backbone.transform.radii.copy_(state.take(f"{prefix}covalent_radii", len(backbone.transform.radii)))
    if backbone.repulsion is not None:
        prefix = "pair_repulsion_fn."
        if int(state.take(f"{prefix}p", 1)) != backbone.repulsion.envelope.p:
            raise InputError("the envelope of the repulsion is not that of the network", remedy=_AGAIN)
        for name, key in (("exponent", "a_exp"), ("prefactor", "a_prefactor")):
            backbone.repulsion.constants[name].copy_(state.take(f"{prefix}{key}", 1)[0])
        backbone.repulsion.coefficients.copy_(state.take(f"{prefix}c", 4))
        backbone.repulsion.radii.copy_(state.take(f"{prefix}covalent_radii", len(backbone.repulsion.radii)))


def _load_linear(linear: IrrepsLinear, state: Tensors, key: str, elements: int | None = None) -> None:
    flat = state.take(key, flat_size(linear.irreps_in, linear.irreps_out, elements or 1))
    for ir, matrix in matrices(flat, linear.irreps_in, linear.irreps_out, elements).items():
        linear.weights[str(ir)].copy_(matrix)


def _by_path(stored: Tensor, layer: MACELayer, couplings: Mapping[tuple[int, int, int], Tensor], n: int) -> Tensor:
    """Radial weights in the order of the paths; the file's are in that of the output blocks."""
    spec = layer.spec
    slots = sorted(spec.paths, key=lambda path: path[2])
    pieces = dict(zip(slots, stored.split([spec.blocks_in[i].mul for i, _, _ in slots], dim=1), strict=True))
    columns = []
    for i, j, k in spec.paths:
        path = (spec.blocks_in[i].ir.l, spec.blocks_sh[j].ir.l, spec.blocks_out[k].ir.l)
        columns.append(pieces[i, j, k] * coupling_sign(path, couplings, f"layer {n}"))
    return torch.cat(columns, dim=1)


def _load_contraction(layer: MACELayer, state: Tensors, prefix: str) -> None:
    spec = layer.contraction
    dim = sum(ir.dim for _, ir in spec.blocks_in)
    elements, start = layer.contraction_weights.shape[0], 0
    for out, (_, ir) in enumerate(spec.blocks_out):
        for degree in range(1, spec.degree + 1):
            name = "weights_max" if degree == spec.degree else f"weights.{spec.degree - 1 - degree}"
            trees = state.peek(f"{prefix}{out}.{name}").shape[1]
            weights = state.take(f"{prefix}{out}.{name}", elements, trees, spec.channels)
            stored = state.take(f"{prefix}{out}.U_matrix_{degree}", ir.dim, *[dim] * degree, trees).double()
            shares = _shares(stored, u_matrix(spec, out, degree), f"U_matrix_{degree} of contraction {out}")
            found = torch.einsum("pt,etc->epc", shares, weights.double())
            layer.contraction_weights[:, start : start + len(shares)] = found.to(weights.dtype)
            start += len(shares)


def _shares(stored: Tensor, ours: Tensor, what: str) -> Tensor:
    """(paths, trees): the file's trees as combinations of the independent ones here.

    Raises:
        InputError: they are not.
    """
    degree = stored.dim() - 2
    orders = list(itertools.permutations(range(1, degree + 1)))
    symmetric = torch.stack([stored.permute(0, *order, degree + 1) for order in orders]).mean(0).flatten(0, -2)
    basis = ours.flatten(0, -2)
    shares: Tensor = torch.linalg.lstsq(basis, symmetric).solution if basis.shape[1] else basis.new_zeros(0, symmetric.shape[1])
    if float((symmetric - basis @ shares).abs().max()) > _TOLERANCE * max(1.0, float(stored.abs().max())):
        raise InputError(f"{what} does not hold coupling coefficients in e3nn's basis", remedy="export the model as mace-torch trained it")
    return shares


def _load_head(head: MACEEnergyHead, backbone: MACE, elements: Sequence[int], state: Tensors) -> None:
    readout, layers, width = head.readout, len(backbone.layers), backbone.width
    assert isinstance(readout, LayerReadout)
    heads = len(head.table.reference)
    for n in range(max(layers - 1, 1)):
        stored = state.take(f"readouts.{n}.linear.weight", width, heads).T
        if readout.linear is None:
            readout.last[:, :, 0] = stored
        else:  # all linear readouts are one here, which divides by the root of all their inputs
            readout.linear.last[:, n * width : (n + 1) * width, 0] = stored * (layers - 1) ** 0.5
    for hidden in readout.hidden:
        last = f"readouts.{layers - 1}."
        hidden.copy_(state.take(f"{last}linear_1.weight", *hidden.shape))
        units = hidden.shape[1] // heads  # of each head: the other units count for nothing
        stored = state.take(f"{last}linear_2.weight", hidden.shape[1], heads)
        readout.last.zero_()
        for d in range(heads):
            readout.last[d, d * units : (d + 1) * units, 0] = stored[d * units : (d + 1) * units, d]
    rows = torch.tensor(elements)
    energies = state.take("atomic_energies_fn.atomic_energies").double().reshape(-1, len(elements))
    scale, shift = (state.take(f"scale_shift.{name}").double().reshape(-1, 1) for name in ("scale", "shift"))
    head.table.reference[:, rows] = energies.expand(heads, -1) + shift
    head.table.scale[:] = scale
