"""Every recipe in the repository, and every overlay on top of one, is understood as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from matfound.cli.main import main

REPO = Path(__file__).resolve().parent.parent
RECIPES = sorted((REPO / "recipes").glob("*.yaml"))
OVERLAYS = sorted((REPO / "recipes/overlays").glob("*.yaml"))


def example(overlay: Path) -> Path:
    """The recipe that the command in an overlay's text is for."""
    found = re.search(r"matfound fit --config recipes/(\w+\.yaml)", overlay.read_text(encoding="utf-8"))
    assert found is not None
    return REPO / "recipes" / found[1]


#: Each recipe by itself, each overlay on top of the recipe that it names.
CHOICES = [(recipe,) for recipe in RECIPES] + [(example(overlay), overlay) for overlay in OVERLAYS]


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


@pytest.mark.parametrize("files", CHOICES, ids=lambda files: files[-1].stem)
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
