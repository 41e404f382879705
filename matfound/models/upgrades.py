"""Old checkpoint formats to the present one: pure functions from version n to n + 1."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

#: Integer in `config.json`; raise it with every change of layout, and add the upgrade and a golden checkpoint.
FORMAT_VERSION = 1

Upgrade = Callable[[dict[str, Any], dict[str, Tensor]], tuple[dict[str, Any], dict[str, Tensor]]]

#: UPGRADES[n] turns config and tensors of version n into version n + 1.
UPGRADES: dict[int, Upgrade] = {}


def upgrade(config: dict[str, Any], state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors in the present format."""
    for version in range(int(config["format_version"]), FORMAT_VERSION):
        config, state = UPGRADES[version](config, state)
        config = {**config, "format_version": version + 1}
    return config, state
