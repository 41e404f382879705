"""A SevenNet checkpoint of two layers and two elements (H, O), with random weights, and a package folder that holds it."""

import math
import zipfile
from pathlib import Path
from typing import Any

import torch

ELEMENTS = {1: 0, 8: 1}
FILE = "pretrained_potentials/SevenNet_0__11Jul2024/checkpoint_sevennet_0.pth"
MODAL_FILE = "pretrained_potentials/SevenNet_MF_0/checkpoint_sevennet_mf_0.pth"


def checkpoint(modalities: dict[str, int] | None = None, **options: Any) -> dict[str, Any]:
    """What `torch.save` would store; `options` change the training options."""
    extra = 4 * len(modalities or {})  # a row of four scalars for each modality
    gate = 6 * len(modalities or {})
    shapes = {
        "edge_embedding.basis_function.coeffs": [3],
        "onehot_to_feature_x.linear.weight": [2 * 4],
        "onehot_to_feature_x.linear.bias": [0],
        # 4x0e -> 6x0e + 2x1e: four scalars, and two that gate the two vectors
        "0_self_connection_intro.linear.weight": [4 * 6],
        "0_self_interaction_1.linear.weight": [4 * 4 + extra],
        "0_convolution.denominator": [1],
        "0_convolution.convolution.weight": [0],
        "0_convolution.weight_nn.layer0.weight": [3, 8],
        "0_convolution.weight_nn.layer1.weight": [8, 4 + 4],
        "0_self_interaction_2.linear.weight": [4 * 6 + 4 * 2 + gate],
        "0_self_interaction_2.linear.output_mask": [12],
        # 4x0e + 2x1e -> 4x0e
        "1_self_connection_intro.linear.weight": [4 * 4],
        "1_self_interaction_1.linear.weight": [4 * 4 + 2 * 2 + extra],
        "1_convolution.denominator": [1],
        "1_convolution.weight_nn.layer0.weight": [3, 8],
        "1_convolution.weight_nn.layer1.weight": [8, 4 + 2],
        "1_self_interaction_2.linear.weight": [(4 + 2) * 4 + extra],
        "reduce_input_to_hidden.linear.weight": [4 * 2 + extra // 2],
        "reduce_hidden_to_energy.linear.weight": [2],
        "rescale_atomic_energy.shift": [len(modalities), 2] if modalities else [2],
        "rescale_atomic_energy.scale": [2],
    }
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    state["edge_embedding.basis_function.coeffs"] = torch.arange(1, 4) * math.pi / 4.0
    config: dict[str, Any] = {
        "version": "0.11.0",
        "_type_map": ELEMENTS,
        "cutoff": 4.0,
        "num_convolution_layer": 2,
        "irreps_manual": ["4x0e", "4x0e+2x1e", "4x0e"],
        "lmax": 1,
        "is_parity": False,
        "radial_basis": {"radial_basis_name": "bessel", "bessel_basis_num": 3},
        "cutoff_function": {"cutoff_function_name": "poly_cut", "poly_cut_p_value": 6},
        "weight_nn_hidden_neurons": [8],
        "self_connection_type": "linear",
        "_normalize_sph": True,
    }
    if modalities:
        parts = ("use_modality", "use_modal_self_inter_intro", "use_modal_self_inter_outro", "use_modal_output_block")
        config |= {"_modal_map": modalities, **dict.fromkeys(parts, True)}
    return {"model_state_dict": state, "config": config | options, "epoch": 1, "optimizer_state_dict": {}}


def write(path: Path, content: Any = None) -> Path:
    """Save a checkpoint; default: without modalities."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint() if content is None else content, path)
    return path


def package(folder: Path, version: str = "0.13.0") -> Path:
    """An installed `sevenn` with SevenNet-0 and MF-0 in it; importing it fails. The folder for `sys.path`."""
    write(folder / "sevenn" / FILE)
    write(folder / "sevenn" / MODAL_FILE, checkpoint({"R2SCAN": 0, "PBE": 1}))
    (folder / "sevenn/__init__.py").write_text("raise RuntimeError('the package was imported')\n")
    info = folder / f"sevenn-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sevenn\nVersion: {version}\n")
    return folder


def wheel(path: Path, file: Path, name: str = FILE) -> Path:
    """A wheel with one checkpoint."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(file, f"sevenn/{name}")
    return path
