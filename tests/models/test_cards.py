"""Every card in models/ builds, has the published number of parameters, and describes the published file."""

import hashlib
import importlib.util

import pytest
import torch

from matfound import catalog
from matfound.models import downloaded, published
from matfound.models.base import Potential, build
from matfound.models.convert import convert
from matfound.nn.heads import EnergyHead

NAMES = catalog.names("models")
needs_weights = pytest.mark.skipif(importlib.util.find_spec("sevenn") is None, reason="sevenn is not installed")


#: Families without heads of their own: their published models have SevenNet's linear readout.
PACKAGED = [name for name in NAMES if catalog.model(name).published is not None]


@pytest.mark.parametrize("name", NAMES)
def test_published_sizes(name):
    card = catalog.model(name)
    # Nothing of the size of the large ones is ever allocated.
    with torch.device("meta" if card.heads else "cpu"):
        backbone = build({"class_path": card.class_path, "init_args": card.init_args})
        heads = {key: build(head.model_dump()) for key, head in card.heads.items()}
        if not heads:
            heads = {"energy": EnergyHead(hidden=[64], activation="none", shared="modalities" in card.init_args)}
        potential = Potential(backbone, heads, list(card.levels_of_theory))
    assert sum(p.numel() for p in potential.parameters()) == card.parameters


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_what_must_be_known(name):
    card = catalog.model(name)
    weights = card.published or card.download
    if weights is not None:
        assert list(card.levels_of_theory) == weights.datasets
        assert weights.licence == card.licence
    assert card.licence == "MIT" or card.published is None
    assert len(card.known_weaknesses) >= 4
    assert card.references
    assert card.trained_on
    assert "2026-" in card.scores_source or not card.scores
    assert all(value > 0 for scores in card.scores.values() for value in scores.values())


def test_short_names_are_unique():
    short = [name.rpartition("/")[2] for name in NAMES]
    assert len(set(short)) == len(short)
    assert published.names() == sorted(name.rpartition("/")[2] for name in PACKAGED)
    assert not set(published.names()) & set(downloaded.names())


def test_combined_score():
    """CPS = 0.5 F1 + 0.4 (1 - κ_SRME / 2) + 0.1 (1 - RMSD / 0.15), where a card has all four."""
    seen = 0
    for name in NAMES:
        scores = catalog.model(name).scores.get("Matbench Discovery", {})
        if "CPS" in scores:
            seen += 1
            expected = 0.5 * scores["F1"] + 0.4 * (1 - scores["κ_SRME"] / 2) + 0.1 * min(1, max(0, 1 - scores["RMSD"] / 0.15))
            assert scores["CPS"] == pytest.approx(expected, abs=1e-3)
    assert seen


def test_scores_against_the_leaderboard(shared_data):
    """κ_SRME of the cards is the mean over the 103 crystals of the leaderboard's own analysis."""
    import json

    file = shared_data / "data/matbench_discovery/kappa-103-analysis.jsonl"
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "srme" in entry:
            found[entry["key"]] = sum(entry["srme"]) / len(entry["srme"])
    common = [name for name in NAMES if name.rpartition("/")[2] in found]
    assert common
    for name in common:
        assert catalog.model(name).scores["Matbench Discovery"]["κ_SRME"] == pytest.approx(found[name.rpartition("/")[2]], abs=6e-4)


@needs_weights
@pytest.mark.parametrize("name", published.names())
def test_a_card_describes_its_file(name):
    _, card, weights = published.card(name)
    file = published.installed(weights)
    assert file is not None
    assert file.stat().st_size == weights.bytes
    assert hashlib.sha256(file.read_bytes()).hexdigest() == weights.sha256
    potential = convert(file, weights.datasets, weights.licence)
    assert potential.datasets == weights.datasets
    assert sum(p.numel() for p in potential.parameters()) == card.parameters
    built = potential.backbone.config
    assert built["class_path"] == card.class_path
    for key, value in card.init_args.items():
        if key == "elements":  # in another order of rows
            assert sorted(built["init_args"][key]) == value
        else:
            assert built["init_args"][key] == (pytest.approx(value) if isinstance(value, float) else value), key
