"""SevenNet checkpoints (arXiv:2402.03789; modalities: arXiv:2409.07947) as `NequIP` potentials.

What differs between the files: key names (until May 2024), the order of the radial weights (until version 0.11 that of the paths before
sorting, then that of the sorted output blocks), whether harmonics are normalised, and the signs of some Clebsch-Gordan blocks, which
e3nn changed between 0.4 and 0.6. Each file stores the blocks that it was trained with; where ours has the other sign, the weights of
that path change theirs.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from e3nn.o3 import Irrep, Irreps
from torch import Tensor

from matfound.errors import InputError
from matfound.models.base import Potential
from matfound.models.convert.tensors import Tensors, coupling_sign, flat_size, matrices
from matfound.models.nequip import Interaction, NequIP, layer_irreps
from matfound.nn.heads import EnergyHead

#: Key names until May 2024, after blanks have become underscores.
_OLD_NAMES = {
    "EdgeEmbedding.": "edge_embedding.",
    "denumerator": "denominator",
    "reducing_nn_input_to_hidden": "reduce_input_to_hidden",
    "reducing_nn_hidden_to_energy": "reduce_hidden_to_energy",
}
#: Constants of e3nn: empty weights and biases, masks of ones, Clebsch-Gordan blocks.
_CONSTANTS = re.compile(r"\.(output_mask|bias|_w3j_\d_\d_\d)$|\.(convolution|mul)\.weight$")
#: Radial weights are in the order of the sorted output blocks from here on.
_SORTED_FROM = (0, 11)
#: Options of the training file, and the only value of each that the network here has.
_FIXED: dict[str, Any] = {
    "_model_type": "E3_equivariant_model",
    "interaction_type": "nequip",
    "use_bias_in_linear": False,
    "readout_as_fcn": False,
    "act_radial": "silu",
    "use_modal_node_embedding": False,
}
_ACTIVATIONS = {"act_scalar": {"e": "silu", "o": "tanh"}, "act_gate": {"e": "silu", "o": "tanh"}}
_MODAL_PARTS = ("use_modal_self_inter_intro", "use_modal_self_inter_outro", "use_modal_output_block")


def recognises(content: object) -> bool:
    """Whether unpickled content is a SevenNet checkpoint."""
    return isinstance(content, dict) and {"model_state_dict", "config"} <= content.keys() and "_type_map" in content["config"]


def _present(key: str) -> str:
    """The present name of a tensor."""
    name = key.replace(" ", "_")
    for old, new in _OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def convert(content: Mapping[str, Any], datasets: Sequence[str] = (), licence: str = "") -> Potential:
    """The potential of an unpickled checkpoint; see `matfound.models.convert.convert`."""
    config = _Config.of(content["config"])
    state = Tensors(content["model_state_dict"], _CONSTANTS, "those of sevenn 0.13.0", _present)
    names = config.modalities or list(datasets or ["default"])
    if len(datasets) > 1 and list(datasets) != names:
        raise InputError(f"the file has the levels of theory {', '.join(names)}, received {', '.join(datasets)}", remedy="leave them out")
    width = state.peek("reduce_input_to_hidden.linear.weight").numel()
    hidden = state.peek("reduce_hidden_to_energy.linear.weight").numel()
    backbone = config.backbone(state)
    head = EnergyHead(hidden=[hidden], activation="none", shared=True) if config.modalities else EnergyHead([hidden], activation="none")
    potential = Potential(backbone, {"energy": head}, names, licence=licence)
    with torch.no_grad():
        _load_backbone(backbone, config, state)
        _load_readout(head, config, state, width // hidden)
    state.finish()
    return potential


@dataclass
class _Config:
    """What of a training file matters here."""

    raw: Mapping[str, Any]
    elements: list[int]
    cutoff: float
    layers: int
    irreps: list[Irreps]
    irreps_sh: Irreps
    modalities: list[str]
    modal_parts: list[bool]
    sorted_columns: bool

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "_Config":
        """Read and check it.

        Raises:
            InputError: an option is missing, or has a value that the network here does not have.
        """
        try:
            _check_options(raw)
            types = {int(number): int(row) for number, row in raw["_type_map"].items()}
            elements = sorted(types, key=types.__getitem__)
            if [types[number] for number in elements] != list(range(len(elements))):
                raise InputError("'_type_map' does not number the elements from 0 on", remedy="get the file again")
            modal_map = dict(raw.get("_modal_map") or {}) if raw.get("use_modality") else {}
            modalities = sorted(modal_map, key=modal_map.__getitem__)
            lmax_edge = int(raw.get("lmax_edge", -1))
            lmax = int(raw["lmax"]) if lmax_edge < 0 else lmax_edge
            parity = -1 if raw["is_parity"] else 1
            irreps_sh = Irreps([(1, (l, parity**l)) for l in range(lmax + 1)])
            return cls(
                raw=raw,
                elements=elements,
                cutoff=float(raw["cutoff"]),
                layers=int(raw["num_convolution_layer"]),
                irreps=_irreps(raw, irreps_sh),
                irreps_sh=irreps_sh,
                modalities=modalities,
                modal_parts=[bool(modalities) and bool(raw.get(part)) for part in _MODAL_PARTS],
                sorted_columns=_version(str(raw["version"])) >= _SORTED_FROM,
            )
        except KeyError as error:
            raise InputError(f"the training options lack {error}", remedy="get the file again, or it is of an unknown kind") from None
        except (TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the training options cannot be read: {error}", remedy="get the file again") from None

    def _hidden(self) -> str | list[str]:
        """What comes out of the layers, in one text where that says it all."""
        outputs = [str(irreps) for irreps in self.irreps[1:]]
        largest = max(outputs, key=lambda text: Irreps(text).dim)
        return largest if layer_irreps(largest, str(self.irreps_sh), self.layers)[1:] == outputs else outputs

    def backbone(self, state: Tensors) -> NequIP:
        """The network, with weights of its own."""
        envelope = dict(self.raw["cutoff_function"])
        kind = envelope["cutoff_function_name"]
        if kind not in ("XPLOR", "poly_cut"):
            raise InputError(f"the cutoff function '{kind}' is not known", remedy="known: XPLOR, poly_cut")
        basis = dict(self.raw["radial_basis"])
        if basis["radial_basis_name"] != "bessel":
            raise InputError(f"the radial basis '{basis['radial_basis_name']}' is not known", remedy="known: bessel")
        backbone = NequIP(
            cutoff=self.cutoff,
            num_layers=self.layers,
            irreps=self._hidden(),
            lmax=self.irreps_sh.lmax,
            symmetry="E3" if self.raw["is_parity"] else "SE3",
            num_basis=state.peek("edge_embedding.basis_function.coeffs").numel(),
            radial_hidden=list(self.raw["weight_nn_hidden_neurons"]),
            elements=self.elements,
            self_connection="linear" if self.raw["self_connection_type"] == "linear" else "elements",
            envelope="xplor" if kind == "XPLOR" else "polynomial",
            envelope_p=int(envelope.get("poly_cut_p_value", 6)),
            envelope_onset=float(envelope["cutoff_on"]) if kind == "XPLOR" else None,
            normalize_harmonics=bool(self.raw.get("_normalize_sph", False)),
            embedding_scale=len(self.elements) ** -0.5,
            modalities=list(range(len(self.modalities))) or None,
        )
        current = self.irreps[0]
        for n, (layer, irreps) in enumerate(zip(backbone.layers, self.irreps[1:], strict=True)):
            assert isinstance(layer, Interaction)
            if layer.gate.irreps_out != irreps or Irreps(layer.spec.irreps_in) != current:
                raise InputError(f"layer {n} goes from {current} to {irreps}, which is not a network that matfound builds")
            current = irreps
        return backbone


def _check_options(raw: Mapping[str, Any]) -> None:
    for key, expected in _FIXED.items():
        if raw.get(key, expected) != expected:
            raise InputError(f"the option {key} = {raw[key]!r} is not known here, expected {expected!r}")
    for key, activations in _ACTIVATIONS.items():
        if any(raw.get(key, activations).get(parity) != name for parity, name in activations.items()):
            raise InputError(f"the option {key} = {raw[key]!r} is not known here, expected {activations!r}")
    if raw["self_connection_type"] not in ("linear", "nequip"):
        raise InputError(
            f"the option self_connection_type = {raw['self_connection_type']!r} is not known here", remedy="known: linear, nequip"
        )


def _irreps(raw: Mapping[str, Any], irreps_sh: Irreps) -> list[Irreps]:
    """Features before and after each layer: as given, or as many channels of every irrep that the products give."""
    if raw.get("irreps_manual"):
        return [Irreps(text) for text in raw["irreps_manual"]]
    layers, channels = int(raw["num_convolution_layer"]), int(raw["channel"])
    lmax = int(raw["lmax_node"]) if int(raw.get("lmax_node", -1)) > 0 else int(raw["lmax"])
    found = [Irreps([(channels, (0, 1))])]
    for n in range(layers):
        last = n == layers - 1
        products = {
            ir for _, a in found[-1] for _, b in irreps_sh for ir in a * b if ir.l <= (0 if last else lmax) and (ir.p == 1 or not last)
        }
        found.append(Irreps([(channels, ir) for ir in sorted(products)]))
    return found


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _load_backbone(backbone: NequIP, config: _Config, state: Tensors) -> None:
    intro, outro, _ = config.modal_parts
    number = len(config.modalities)
    backbone.basis.frequencies.copy_(state.take("edge_embedding.basis_function.coeffs", backbone.basis.frequencies.numel()))
    backbone.embedding.copy_(state.take("onehot_to_feature_x.linear.weight", *backbone.embedding.shape))
    for n, layer in enumerate(backbone.layers):
        assert isinstance(layer, Interaction)
        assert layer.self_connection is not None
        irreps_in, gate = layer.spec.blocks_in, layer.gate.irreps_in
        paths = _paths(layer, config, last=n == config.layers - 1)
        messages = Irreps([(irreps_in[i].mul, ir) for i, _, ir in sorted(paths, key=lambda path: path[2])]).simplify()
        if layer.elementwise:
            key = f"{n}_self_connection_intro.fc_tensor_product.weight"
            _load_linear(layer.self_connection.weights, irreps_in, gate.simplify(), state, key, elements=len(config.elements))
        else:
            _load_linear(layer.self_connection.weights, irreps_in, gate.simplify(), state, f"{n}_self_connection_intro.linear.weight")
        key = f"{n}_self_interaction_1.linear.weight"
        _load_linear(layer.linear_in.weights, irreps_in, irreps_in, state, key, number, has_modality=intro)
        key = f"{n}_self_interaction_2.linear.weight"
        _load_linear(layer.linear_out.weights, messages, gate.simplify(), state, key, number, has_modality=outro)
        layer.denominator.copy_(state.take(f"{n}_convolution.denominator", 1)[0])
        *hidden, last = layer.weight_network.weights
        for i, weight in enumerate(hidden):
            weight.copy_(state.take(f"{n}_convolution.weight_nn.layer{i}.weight", *weight.shape))
        columns, signs = _columns(layer, config, paths, state.couplings(f"{n}_convolution."), n)
        total = sum(irreps_in[i].mul for i, _, _ in paths)
        stored = state.take(f"{n}_convolution.weight_nn.layer{len(hidden)}.weight", last.shape[0], total)
        last.copy_(stored[:, columns] * signs)


def _load_linear(
    weights: Any,
    irreps_in: Irreps,
    irreps_out: Irreps,
    state: Tensors,
    key: str,
    modalities: int = 0,
    *,
    has_modality: bool = False,
    elements: int | None = None,
) -> None:
    """Flat weights lie input block by input block, and in these output block by output block; a matrix [in, (element,) out] each.

    The modality is an input block of its own, the last one. Here, blocks of one irrep are one.
    """
    blocks = Irreps([*irreps_in, *([(modalities, Irrep("0e"))] if has_modality else [])])
    found = matrices(state.take(key, flat_size(blocks, irreps_out, elements or 1)), blocks, irreps_out, elements)
    for name, weight in weights.items():
        matrix = found[Irrep(name)]
        weight[..., : matrix.shape[-2], :] = matrix
    if modalities and not has_modality:
        _without_modality(weights["0e"], irreps_in.count("0e"))


def _without_modality(weight: Tensor, fan: int) -> None:
    """Rows of the modality that do nothing; the others make up for the larger number that they are divided by."""
    weight[:fan] *= (weight.shape[0] / fan) ** 0.5
    weight[fan:] = 0


def _paths(layer: Interaction, config: _Config, *, last: bool) -> list[tuple[int, int, Irrep]]:
    """(input block, harmonics block, output) of the file's tensor product: also those whose output no later part takes."""
    lmax = layer.gate.irreps_in.lmax
    return [
        (i, j, ir)
        for i, (_, ir_in) in enumerate(layer.spec.blocks_in)
        for j, (_, ir_sh) in enumerate(config.irreps_sh)
        for ir in sorted(ir_in * ir_sh)
        if ir.l <= lmax and (ir.p == 1 or not last)
    ]


def _columns(
    layer: Interaction,
    config: _Config,
    paths: list[tuple[int, int, Irrep]],
    couplings: Mapping[tuple[int, int, int], Tensor],
    n: int,
) -> tuple[Tensor, Tensor]:
    """For each radial weight of a layer here, its column in the file and the sign that it takes."""
    blocks, irreps_sh = layer.spec.blocks_in, config.irreps_sh
    order = sorted(paths, key=lambda path: path[2]) if config.sorted_columns else paths
    start: dict[tuple[int, int, Irrep], int] = {}
    count = 0
    for path in order:
        start[path] = count
        count += blocks[path[0]].mul
    columns, signs = [], []
    for i, j, k in layer.spec.paths:
        ir = layer.spec.blocks_out[k].ir
        begin = start[i, j, ir]
        columns.append(torch.arange(begin, begin + blocks[i].mul))
        signs.append(torch.full((blocks[i].mul,), coupling_sign((blocks[i].ir.l, irreps_sh[j].ir.l, ir.l), couplings, f"layer {n}")))
    return torch.cat(columns), torch.cat(signs)


def _load_readout(head: EnergyHead, config: _Config, state: Tensors, width: int) -> None:
    number = len(config.modalities)
    weight = head.readout.hidden[0]
    fan = weight.shape[0] - number
    has_modality = config.modal_parts[2]
    if width != fan + number * has_modality:
        raise InputError(f"the readout takes {width} numbers of each atom, expected {fan + number * has_modality}")
    flat = state.take("reduce_input_to_hidden.linear.weight", width, weight.shape[1])
    weight[:width] = flat
    if number and not has_modality:
        _without_modality(weight, fan)
    head.readout.last.copy_(state.take("reduce_hidden_to_energy.linear.weight", *head.readout.last.shape))
    for name, table in (("shift", head.table.reference), ("scale", head.table.scale)):
        values = state.take(f"rescale_atomic_energy.{name}").double()
        values = values.reshape(1) if values.dim() == 0 else values
        if values.shape[-1:] not in ((1,), (len(config.elements),)) or (values.dim() == 2 and len(values) != len(table)):
            raise InputError(f"the tensor 'rescale_atomic_energy.{name}' has the shape {tuple(values.shape)}")
        rows = values.expand(len(table), len(config.elements))
        table[:, torch.tensor(config.elements)] = rows
