"""Every recipe in the repository, and every overlay on top of one, is understood as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from matfound import catalog
from matfound.cli.main import main
from matfound.models.base import Potential, build

REPO = Path(__file__).resolve().parent.parent
RECIPES = sorted((REPO / "recipes").glob("*.yaml"))
OVERLAYS = sorted((REPO / "recipes/overlays").glob("*.yaml"))


def example(overlay: Path) -> Path:
    """The recipe that the command in an overlay's text is for."""
    found = re.search(r"matfound fit --config recipes/(\w+\.yaml)", overlay.read_text(encoding="utf-8"))
    assert found is not None
    return REPO / "recipes" / found[1]


def named(recipe: Path) -> list[Path]:
    """The overlays that a recipe's text puts on top of it, in that order."""
    return [REPO / name for name in re.findall(r"--config (recipes/overlays/\w+\.yaml)", recipe.read_text(encoding="utf-8"))]


#: Each recipe by itself, or those of IS2RE with the overlays that they share with S2EF; each other overlay on top of its recipe.
CHOICES = [(recipe, *(named(recipe) if recipe.stem.endswith("is2re") else ())) for recipe in RECIPES]
CHOICES += [(example(overlay), overlay) for overlay in OVERLAYS if not any(overlay in files for files in CHOICES)]


def parsed(capsys: pytest.CaptureFixture[str], *configs: Path) -> dict[str, Any]:
    """The merged configuration with all defaults, as `--print_config` shows it."""
    arguments = [argument for config in configs for argument in ("--config", str(config))]
    assert main(["fit", *arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def within(small: Any, large: Any) -> bool:
    """Whether everything in `small` is found in `large`."""
    if isinstance(small, dict):
        return isinstance(large, dict) and all(key in large and within(value, large[key]) for key, value in small.items())
    if isinstance(small, list):
        return isinstance(large, list) and len(small) == len(large) and all(map(within, small, large))
    return small == large


@pytest.mark.parametrize("files", CHOICES, ids=lambda files: "+".join(file.stem for file in files))
def test_parses(files: tuple[Path, ...], capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(files[-1].read_text(encoding="utf-8"))
    assert within(content, parsed(capsys, *files))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_conventions(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    arguments = content["model"]["potential"]["init_args"]
    vocabulary = [arguments["dataset"]] if "dataset" in arguments else arguments["datasets"]  # a fine-tuned model grows by one
    assert set(content["data"]["datasets"]) <= set(vocabulary)
    assert content["trainer"]["default_root_dir"] == f"runs/{recipe.stem}"
    assert f"matfound fit --config recipes/{recipe.name}" in text


@pytest.mark.parametrize(
    ("model", "card"),
    [
        ("gemnet_oc", "gemnet_oc/base"),
        ("schnet", "schnet-oc20"),
        ("dimenetplusplus", "dimenetplusplus-oc20"),
        ("painn", "painn-oc20"),
        ("cgcnn", "cgcnn-oc20"),
    ],
)
def test_oc20_recipes_have_the_published_sizes(model: str, card: str) -> None:
    content = yaml.safe_load((REPO / f"recipes/{model}_oc20_s2ef.yaml").read_text(encoding="utf-8"))
    arguments = content["model"]["potential"]["init_args"]
    with torch.device("meta"):
        heads = {name: build({"init_args": {}} | head) for name, head in arguments["heads"].items()}
        potential = Potential(build(arguments["backbone"]), heads, arguments["datasets"])
    assert sum(parameter.numel() for parameter in potential.parameters()) == catalog.model(card).parameters


@pytest.mark.parametrize(
    ("model", "task", "index"),
    [("gemnet_oc", "s2ef", "::4"), ("painn", "is2re", ":")],
)
def test_oc20_recipes_run(model: str, task: str, index: str, tmp_path: Path, shared_data: Path) -> None:
    """One structure to train on and one to validate, with scale factors and a plateau."""
    recipe, small = f"{model}_oc20_{task}", f"{model}_small"
    files = [REPO / f"recipes/{name}.yaml" for name in (recipe, "overlays/smoke", f"overlays/{small}")]
    configs = [argument for path in files for argument in ("--config", str(path))]
    data = [f"--data.datasets.oc20.path={shared_data}/data/oc20/{task}_ref.lmdb", f"--data.datasets.oc20.index={index}"]
    assert main(["fit", *configs, *data, "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path}"]) == 0
    assert (tmp_path / "model/config.json").is_file()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("trainer:", "trainr:", "did you mean 'trainer'?"),
        ("batch_size: 8", "batchsize: 8", "did you mean 'batch_size'?"),
        ("num_layers: 3", "num_layer: 3", "did you mean 'num_layers'?"),
        ("field: forces, loss:", "field: forces, los:", "did you mean 'loss'?"),
        ("matfound.nn.heads.NodeHead", "matfound.nn.heads.NodesHead", "did you mean 'NodeHead'?"),
        ("field: charges,", "field: charge_s,", "did you mean 'charges'?"),
    ],
)
def test_typing_error(old: str, new: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (REPO / "recipes/minidft.yaml").read_text(encoding="utf-8")
    assert old in text
    recipe = tmp_path / "typo.yaml"
    recipe.write_text(text.replace(old, new), encoding="utf-8")
    assert main(["fit", "--config", str(recipe), "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path}"]) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert error.startswith("matfound: error: ")
    assert error.count("\n") == 0
