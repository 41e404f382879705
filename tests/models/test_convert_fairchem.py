"""Checkpoints of fairchem 1.x: layouts, prefixes, normalizers, references, averaged weights, mistakes, and the way to the command line."""

import json
import logging
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk

import matfound
from matfound import catalog, unpickle
from matfound.cli.main import main
from matfound.errors import InputError
from matfound.models import checkpoint, downloaded
from matfound.models.convert import convert, equiformer_v2, fairchem
from matfound.nn.so3.grid import GridWarning
from matfound.testing import evaluate, random_crystal

OPTIONS: dict[str, Any] = {
    "use_pbc": True, "regress_forces": True, "otf_graph": True, "max_neighbors": 20, "max_radius": 4.0, "max_num_elements": 24,
    "num_layers": 1, "sphere_channels": 4, "attn_hidden_channels": 3, "num_heads": 2, "attn_alpha_channels": 2, "attn_value_channels": 2,
    "ffn_hidden_channels": 5, "norm_type": "layer_norm_sh", "lmax_list": [2], "mmax_list": [1], "grid_resolution": 12, "edge_channels": 3,
    "use_grid_mlp": True, "avg_num_nodes": 2.0, "num_distance_basis": 512, "proj_drop": 0.0, "weight_init": "uniform",
}  # fmt: skip
HYDRA = {
    "name": "hydra",
    "backbone": {"model": "equiformer_v2_backbone", **OPTIONS},
    "heads": {
        "energy": {"module": "equiformer_v2_energy_head"},
        "forces": {"module": "equiformer_v2_force_head"},
        "stress": {"module": "rank2_symmetric_head", "output_name": "stress", "use_source_target_embedding": True, "decompose": True},
    },
}
CRYSTAL = random_crystal(0, 5, (8, 12, 22))

#: Our names back to those of the files, each as often as it occurs.
_BACK = [
    (r"heads\.energy\.references$", "energy_lin_ref"),
    (r"\bembedding$", "sphere_embedding.weight"),
    (r"edge_degree\.radial\.layers\.", "edge_degree_embedding.rad_func.net."),
    (r"edge_degree\.", "edge_degree_embedding."),
    (r"pair\.(source|target)$", r"\1_embedding.weight"),
    (r"radial\.layers\.", "so2_conv_1.rad_func.net."),
    (r"linear_(\d)\.weights\.0$", r"so2_conv_\1.fc_m0.weight"),
    (r"linear_(\d)\.weights\.1$", r"so2_conv_\1.so2_m_conv.0.fc.weight"),
    (r"((?:attention|forces\.network)\.)linear_(\d)\.bias$", r"\1so2_conv_\2.fc_m0.bias"),
    (r"linear_(\d)\.(weight|bias)$", r"so3_linear_\1.\2"),
    (r"((?:feed_forward|energy\.network)\.)scalar\.", r"\1scalar_mlp.0."),
    (r"(norm(?:_\d)?)\.scalar\.", r"\1.norm_l0."),
    (r"((?:harmonics_|\.)norm(?:_\d)?)\.weight$", r"\1.affine_weight"),
    (r"harmonics_norm", "sphharm_norm"),
    (r"message_norm", "xedge_layer_norm"),
    (r"anisotropic\.", "block.irrep2_MLP."),
    (r"isotropic\.", "block.scalar_MLP."),
    (r"\.attention\.", ".ga."),
    (r"\.feed_forward\.", ".ffn."),
    (r"project\.", "proj."),
]


def foreign(model: dict[str, Any], prefix: str = "module.module.", **more: Any) -> dict[str, Any]:
    """A checkpoint as fairchem writes it, with random weights and some of its buffers."""
    torch.manual_seed(0)
    backbone, heads = equiformer_v2.build(model.get("backbone", model) if "heads" in model else strip(model), model.get("heads", {}))
    for head in heads.values():
        head.attach(backbone, 1)
    state: dict[str, torch.Tensor] = {}
    named = [(f"backbone.{name}", p) for name, p in backbone.named_parameters()]
    named += [(f"heads.{head}.{name}", p) for head, module in heads.items() for name, p in module.named_parameters()]
    for name, parameter in named:
        key = name
        for pattern, old in _BACK:
            key = re.sub(pattern, old, key)
        hydra = "heads" in model
        for head, block in (("energy", "energy_block"), ("forces", "force_block")):
            key = key.replace(f"heads.{head}.network.", f"output_heads.{head}.{block}." if hydra else f"{block}.")
        key = key.replace("heads.stress.", "output_heads.stress.")
        key = key if hydra else key.removeprefix("backbone.")
        assert equiformer_v2.rename(key) == name, (key, name)
        state[prefix + key] = parameter.detach() + (0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0.0)
    for buffer in ("blocks.0.ga.SO3_grid.2.1.to_grid_mat", "SO3_rotation.0.mapping.to_m", "distance_expansion.offset",
                   "norm.balance_degree_weight", "blocks.0.ffn.so3_linear_1.expand_index"):  # fmt: skip
        state[prefix + buffer] = torch.zeros(2)
    return {"state_dict": state, "config": {"model": model, "trainer": "ocp"}, "epoch": 3, **more}


def strip(model: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if key not in ("name", "model")}


PLAIN = {"name": "equiformer_v2", **OPTIONS}


def raw(content: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    return evaluate(fairchem.convert(content, **options).double().eval(), CRYSTAL)


@pytest.mark.parametrize("prefix", ["", "module.", "module.module.module.", "_orig_mod.module."])
def test_prefixes(prefix):
    found, expected = raw(foreign(PLAIN, prefix)), raw(foreign(PLAIN))
    assert all(torch.equal(found[key], expected[key]) for key in ("energy", "forces"))


def test_older_configuration_and_both_layouts_are_the_same_network():
    expected = raw(foreign(PLAIN))
    older = foreign(PLAIN)
    older["config"] = {"model": "equiformer_v2", "model_attributes": OPTIONS}
    assert torch.equal(raw(older)["forces"], expected["forces"])
    hydra = foreign(HYDRA)
    for key in list(hydra["state_dict"]):
        plain = re.sub(r"^(module\.module\.)(?:backbone\.|output_heads\.\w+\.(?=energy_block|force_block))", r"\1", key)
        if plain != key and plain in foreign(PLAIN)["state_dict"]:
            hydra["state_dict"][key] = foreign(PLAIN)["state_dict"][plain]
    found = raw(hydra)
    assert torch.equal(found["forces"], expected["forces"])
    assert found["stress"].shape == (1, 3, 3)
    by_class = {**HYDRA, "backbone": {**OPTIONS, "model": "fairchem.core.models.equiformer_v2.equiformer_v2.EquiformerV2Backbone"}}
    by_class["heads"] = {**HYDRA["heads"], "energy": {"module": "fairchem.core.models.equiformer_v2.equiformer_v2.EquiformerV2EnergyHead"}}
    hydra["config"] = {"model": by_class}
    assert torch.equal(raw(hydra)["forces"], expected["forces"])


def test_normalizers_and_references():
    references = torch.zeros(119)
    references[[8, 12, 22]] = torch.tensor([-4.0, -1.5, -7.8])
    references[3] = 6e12  # nothing had this element
    plain = raw(foreign(PLAIN))
    old = {"target": {"mean": torch.tensor(0.3), "std": torch.tensor(2.5)}, "grad_target": {"mean": 0.0, "std": torch.tensor(3.0)}}
    new = {
        "energy": {"mean": torch.tensor([0.3]), "rmsd": torch.tensor([2.5])},
        "forces": {"mean": torch.zeros(1), "rmsd": torch.tensor(3.0)},
    }
    for normalizers in (old, new):
        content = foreign(PLAIN, normalizers=normalizers, elementrefs={"energy": {"element_references": references}})
        potential = fairchem.convert(content)
        assert potential.elements(0) == set(range(1, 24)) - {3}
        found = evaluate(potential.double().eval(), CRYSTAL)
        expected = 2.5 * plain["energy"] + 0.3 + references[torch.tensor(CRYSTAL.numbers)].double().sum()
        assert torch.allclose(found["energy"], expected, rtol=1e-6)
        assert torch.allclose(found["forces"], 3.0 * plain["forces"], rtol=1e-6)


def test_stress_is_put_together_after_its_parts_are_scaled():
    scales = {"stress_isotropic": {"mean": 0.5, "rmsd": 2.0}, "stress_anisotropic": {"mean": 0.0, "rmsd": 3.0}}
    plain = raw(foreign(HYDRA))["stress"][0]
    found = raw(foreign(HYDRA, normalizers=scales))["stress"][0]
    eye = torch.eye(3, dtype=torch.float64)
    pressure = plain.trace() / 3 * eye
    assert torch.allclose(found, 2 * pressure + 0.5 / 3**0.5 * eye + 3 * (plain - pressure))
    with pytest.raises(InputError, match="'stress_anisotropic' has the mean 0.1, expected 0"):
        fairchem.convert(foreign(HYDRA, normalizers={"stress_anisotropic": {"mean": 0.1, "rmsd": 1.0}}))
    with pytest.raises(InputError, match="normalizers that no head takes: magmom"):
        fairchem.convert(foreign(HYDRA, normalizers={"magmom": {"mean": 0.1, "rmsd": 1.0}}))
    with pytest.raises(InputError, match="a normalizer with mean"):
        fairchem.convert(foreign(HYDRA, normalizers={"energy": {"mean": 0.1}}))


def test_a_gradient_model_has_one_scale(shared_data):
    """EquiformerV3: energy, forces and stress are divided by one number, and only that one is kept."""
    folder = shared_data / "golden/eqv3_mptrj_grad_l4"
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    content = {"config": {"model": {"name": described["registry_name"], **described["config"]}}}
    content["state_dict"] = torch.load(folder / "state_dict.pt", weights_only=True)
    plain = raw(content)
    content["normalizers"] = {name: {"mean": 0.0, "rmsd": 2.5} for name in ("energy", "forces", "stress")}
    found = raw(content)
    for name in ("energy", "forces", "stress"):
        assert torch.allclose(found[name], 2.5 * plain[name])
    content["normalizers"]["forces"]["rmsd"] = 2.0
    with pytest.raises(InputError, match="the normalizer 'forces' is 0, 2 in a gradient model, expected 0 and the energy's scale, 2.5"):
        fairchem.convert(content)


def test_references_inside_of_the_model():
    content = foreign(
        {**PLAIN, "use_energy_lin_ref": True, "load_energy_lin_ref": True}, normalizers={"energy": {"mean": 0.0, "rmsd": 2.0}}
    )
    content["state_dict"]["module.energy_lin_ref"] = torch.arange(24.0)
    expected = 2 * (raw(foreign(PLAIN))["energy"] + float(CRYSTAL.numbers.sum()))
    assert torch.allclose(raw(content)["energy"], expected)
    content["state_dict"]["module.energy_lin_ref"][3] = 6e12  # nothing had this element
    potential = fairchem.convert(content)
    assert potential.elements(0) == set(range(1, 24)) - {3}
    assert sum(p.numel() for p in potential.parameters()) == sum(p.numel() for p in fairchem.convert(foreign(PLAIN)).parameters()) + 24
    content["config"]["model"]["use_energy_lin_ref"] = False
    assert torch.allclose(raw(content)["energy"], 2 * raw(foreign(PLAIN))["energy"])


def test_averaged_weights(caplog):
    content = foreign(PLAIN)
    names = [key for key in content["state_dict"] if not re.search(equiformer_v2.DERIVED, key)]
    # Buffers lie between the parameters; those without gradients are not averaged.
    content["state_dict"] = {**{f"module.SO3_grid.{n}.x": torch.zeros(1) for n in range(3)}, **content["state_dict"]}
    content["state_dict"]["module.energy_lin_ref"] = torch.zeros(24)
    content["ema"] = {"decay": 0.999, "num_updates": 5, "shadow_params": [content["state_dict"][name] + 0.01 for name in names]}
    averaged = foreign(PLAIN)
    for name in names:
        averaged["state_dict"][name] = averaged["state_dict"][name] + 0.01
    with caplog.at_level(logging.WARNING, "matfound"):
        assert torch.allclose(raw(content)["forces"], raw(averaged)["forces"])
        assert "the averaged weights (ema) are taken" in caplog.text
        assert torch.allclose(raw(content, ema=False)["forces"], raw(foreign(PLAIN))["forces"])
        assert "the last weights are taken" in caplog.text
    content["ema"]["shadow_params"].pop()
    with pytest.raises(InputError, match=r"are not those of the model's tensors \(convert the last weights: --no-ema\)"):
        fairchem.convert(content)


def mistake(change) -> str:
    content = foreign(PLAIN)
    change(content)
    with pytest.raises(InputError) as error:
        fairchem.convert(content)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_mistakes():
    def options(**more):
        return lambda content: content["config"].update(model={**PLAIN, **more})

    def tensors(**more):
        return lambda content: content["state_dict"].update(more)

    text = mistake(tensors(**{"module.module.blocks.0.extra.weight": torch.zeros(1), "module.what": torch.zeros(1)}))
    assert "tensors that this version of matfound does not know: blocks.0.extra.weight, what" in text
    assert "'backbone.norm.weight' is missing" in mistake(lambda c: c["state_dict"].pop("module.module.norm.affine_weight"))
    assert "has shape (1,), expected 8 numbers" in mistake(tensors(**{"module.module.norm.affine_weight": torch.zeros(1)}))
    assert "values that are not finite" in mistake(tensors(**{"module.module.norm.affine_weight": torch.full((2, 4), torch.nan)}))
    assert "option use_s2_act_attn = True is not known here, expected False" in mistake(options(use_s2_act_attn=True))
    assert "options sphere_chanels are not known here (did you mean 'sphere_channels'?)" in mistake(options(sphere_chanels=4))
    assert "several resolutions" in mistake(options(lmax_list=[2, 1]))
    assert "the model 'scn' of the file is not read" in mistake(lambda c: c["config"].update(model={"name": "scn"}))
    assert "the options of the model cannot be read" in mistake(options(lmax_list=3))
    with pytest.raises(InputError, match="received names for 2"):
        fairchem.convert(foreign(PLAIN), ["a", "b"])
    hydra = {**HYDRA, "heads": {"energy": {"module": "equiformer_v2_energy_head", "reduce": "mean"}}}
    with pytest.raises(InputError, match="the head 'energy', .* is not known here"):
        fairchem.convert({**foreign(HYDRA), "config": {"model": hydra}})


def test_a_coarse_grid_is_measured(tmp_path):
    with pytest.warns(GridWarning, match=r"changes its forces by up to \d+\.\d% of the largest, as in the original"):
        potential = fairchem.convert({**foreign(PLAIN), "config": {"model": {**PLAIN, "grid_resolution": None}}})
    error = potential.backbone.config["init_args"]["grid_error"]
    assert 1e-4 < error < 1
    assert error == fairchem.rotation_error(potential)
    checkpoint.save(potential, tmp_path / "model")
    with pytest.warns(GridWarning, match=f"up to {error:.1%} of the largest"):
        checkpoint.load(tmp_path / "model")
    assert fairchem.rotation_error(fairchem.convert(foreign(PLAIN)).double()) < error


def test_file_to_relaxed_structure(tmp_path, monkeypatch, capsys):
    """The whole way: a file, the command, the Calculator, and `matfound relax`."""
    monkeypatch.chdir(tmp_path)
    content = foreign(HYDRA)
    torch.save(content, "old.pt")
    assert main(["convert", "old.pt", "out", "--datasets", "omat24"]) == 0
    assert "EquiformerV2" in capsys.readouterr().out
    atoms = bulk("Mg", "fcc", a=4.2, cubic=True)
    atoms.rattle(0.05, seed=1)
    atoms.calc = matfound.Calculator("out", dtype="float64")
    expected = evaluate(fairchem.convert(content).double().eval(), atoms)
    assert np.allclose(atoms.get_forces(), expected["forces"], atol=1e-12)
    assert atoms.get_stress(voigt=False) == pytest.approx(expected["stress"][0].numpy(), abs=1e-12)
    ase.io.write("in.cif", bulk("Mg", "hcp"))
    assert main(["relax", "in.cif", "--model", "out", "--cell", "--steps", "2"]) == 3  # it does not converge in two steps
    assert ase.io.read("in-relaxed.extxyz").get_forces().shape == (2, 3)


def test_a_file_that_a_card_describes_gets_its_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(foreign(PLAIN), "eq2_31M_ec4_allmd.pt")
    assert main(["convert", "eq2_31M_ec4_allmd.pt", "out"]) == 0
    potential = checkpoint.load("out")
    assert potential.datasets == ["oc20"]
    assert potential.licence == "CC-BY-4.0"


def test_averaged_weights_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = foreign(PLAIN)
    names = [key for key in content["state_dict"] if not re.search(equiformer_v2.DERIVED, key)]
    content["ema"] = {"shadow_params": [content["state_dict"][name] + 0.01 for name in names]}
    torch.save(content, "run.pt")
    assert main(["convert", "run.pt", "ema"]) == main(["convert", "run.pt", "last", "--no-ema"]) == 0
    bias = [checkpoint.load(folder).backbone.norm.weight for folder in ("ema", "last")]
    assert torch.allclose(bias[0], bias[1] + 0.01, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- files that users get


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MATFOUND_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MATFOUND_WEIGHTS", raising=False)
    return tmp_path / "cache"


def test_names_say_what_to_download(cache):
    with pytest.raises(InputError) as error:
        matfound.load("equiformer-v2-31m-oc20")
    text = str(error.value)
    assert "https://dl.fbaipublicfiles.com/opencatalystproject/models/2023_06/oc20/s2ef/eq2_31M_ec4_allmd.pt" in text
    assert "CC-BY-4.0" in text
    assert str(cache / "weights") in text
    assert "\n" not in text
    with pytest.raises(InputError, match=r"licence of Meta.*consent to its terms"):
        matfound.load("EquiformerV2/equiformer-v2-86m-omat24".lower().replace("equiformerv2", "equiformer_v2"))


def test_a_file_that_was_downloaded(cache, monkeypatch, tmp_path):
    weights = catalog.model("equiformer-v2-31m-oc20").download
    folder = tmp_path / "files"
    folder.mkdir()
    torch.save(foreign(PLAIN), folder / weights.file)
    monkeypatch.setenv("MATFOUND_WEIGHTS", str(folder))
    first = matfound.load("equiformer-v2-31m-oc20")
    assert first.datasets == ["oc20"]
    assert first.licence == "CC-BY-4.0"
    assert len(list(cache.glob("equiformer-v2-31m-oc20-*"))) == 1
    monkeypatch.setattr(downloaded, "convert", None)  # the second time the cache serves
    assert torch.equal(matfound.load("equiformer-v2-31m-oc20").backbone.embedding, first.backbone.embedding)
    wrong = weights.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(InputError, match=r"the sha256 is .*, expected 0000"):
        downloaded.load("x", catalog.model("equiformer-v2-31m-oc20"), wrong)


def test_models_verb(cache, capsys):
    assert main(["models", "show", "equiformer-v2-31m-oc20"]) == 0
    assert "not here (to download)" in capsys.readouterr().out
    assert main(["models", "fetch", "equiformer-v2-31m-oc20", "--dry-run"]) == 0
    assert "eq2_31M_ec4_allmd.pt" in capsys.readouterr().out


def test_addresses_on_the_hub(cache, monkeypatch, tmp_path):
    torch.save(foreign(PLAIN), tmp_path / "m.pt")
    checkpoint.save(fairchem.convert(foreign(PLAIN)), tmp_path / "folder")
    calls = []

    def file(repo: str, name: str, revision: str | None) -> str:
        calls.append((repo, name, revision))
        if name == "gone.pt":
            raise OSError("404 Client Error\nmore")
        return str(tmp_path / "m.pt")

    def snapshot(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo, tuple(allow_patterns), revision))
        return str(tmp_path / "folder")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=file, snapshot_download=snapshot))
    by_file, by_folder = matfound.load("hf://who/what@v1/a/m.pt"), matfound.load("hf://who/what")
    assert calls == [("who/what", "a/m.pt", "v1"), ("who/what", ("config.json", "model.safetensors", "README.md"), None)]
    assert torch.equal(by_file.backbone.embedding, by_folder.backbone.embedding)
    with pytest.raises(InputError, match=r"cannot be downloaded: 404 Client Error \(check the connection"):
        matfound.load("hf://who/what/gone.pt")
    with pytest.raises(InputError, match="is no address on the Hub"):
        matfound.load("hf://who")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface-hub"):
        matfound.load("hf://who/what")


@pytest.mark.skipif("MATFOUND_WEIGHTS" not in os.environ, reason="MATFOUND_WEIGHTS does not name a folder of published files")
def test_published_weights(shared_data):
    """fairchem's own snapshot: the first block of the 31M model alone, in normalised units."""
    file = Path(os.environ["MATFOUND_WEIGHTS"]) / "eq2_31M_ec4_allmd.pt"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    whole = convert(file)
    assert sum(p.numel() for p in whole.parameters()) == 31_058_690
    content = unpickle.load(file)
    options = content["config"].get("model_attributes") or content["config"]["model"]
    options["num_layers"] = 1
    content["state_dict"] = {k: v for k, v in content["state_dict"].items() if not re.search(r"\bblocks\.[1-9]", k)}
    content.pop("normalizers", None)
    content.pop("ema", None)
    found = evaluate(
        fairchem.convert(content).eval(), ase.io.read(shared_data / "data/fairchem/tests_core_models_atoms.json", format="json")
    )
    snapshot = (shared_data / "data/fairchem/snapshots/test_equiformer_v2_deprecated.ambr").read_text(encoding="utf-8")
    energy, forces = (json.loads(text) for text in re.findall(r"array\((\[.*?\])", snapshot)[:2])
    assert found["energy"].numpy() == pytest.approx(energy, abs=1e-3, rel=1e-3)
    assert found["forces"].mean(0).numpy() == pytest.approx(forces, abs=1e-3, rel=1e-3)
