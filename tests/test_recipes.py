"""Every recipe in the repository, and every overlay on top of one, is understood as it stands."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from matfound.cli.main import main

REPO = Path(__file__).resolve().parent.parent
RECIPES = sorted((REPO / "recipes").glob("*.yaml"))
OVERLAYS = sorted((REPO / "recipes/overlays").glob("*.yaml"))


def name(path: Path) -> str:
    return path.stem


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


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert within(content, parsed(capsys, recipe))
    vocabulary = content["model"]["potential"]["init_args"]["datasets"]
    assert set(content["data"]["datasets"]) <= set(vocabulary)
    assert content["trainer"]["default_root_dir"] == f"runs/{recipe.stem}"
    assert "matfound fit --config recipes/" + recipe.name in recipe.read_text(encoding="utf-8")


@pytest.mark.parametrize("overlay", OVERLAYS, ids=name)
def test_overlay(overlay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(overlay.read_text(encoding="utf-8"))
    assert within(content, parsed(capsys, RECIPES[0], overlay))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("trainer:", "trainr:", "did you mean 'trainer'?"),
        ("batch_size: 8", "batchsize: 8", "did you mean 'batch_size'?"),
        ("num_layers: 3", "num_layer: 3", "did you mean 'num_layers'?"),
        ("weight: 5.0", "wieght: 5.0", "did you mean 'weight'?"),
        ("matfound.nn.heads.NodeHead", "matfound.nn.heads.NodesHead", "did you mean 'NodeHead'?"),
        ("field: charges,", "field: charge_s,", "did you mean 'charges'?"),
    ],
)
def test_typing_error(old: str, new: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (REPO / "recipes/minidft.yaml").read_text(encoding="utf-8")
    assert old in text
    recipe = tmp_path / "typo.yaml"
    recipe.write_text(text.replace(old, new), encoding="utf-8")
    assert main(["fit", "--config", str(recipe), "--print_config"]) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert error.startswith("matfound: error: ")
    assert error.count("\n") == 0
