"""Every published size in models/ builds and has the published number of parameters."""

from pathlib import Path

import pytest
import yaml

from matfound import catalog
from matfound.models.base import Potential, build
from matfound.nn.heads import EnergyHead


@pytest.mark.parametrize("name", catalog.names("models"))
def test_published_sizes(name: str) -> None:
    card = yaml.safe_load(Path(catalog.find("models", name)).read_text())
    backbone = build({"class_path": card["class_path"], "init_args": card["init_args"]})
    potential = Potential(backbone, {"energy": EnergyHead(hidden=[64], activation="none")})
    assert sum(p.numel() for p in potential.parameters() if p.requires_grad) == card["parameters"]
