"""What a user of one community's datasets looks for first: tags and systems of OC20, subsets of OMat24, formulas of ABX3."""

import collections
from pathlib import Path
from typing import Any

import numpy as np

from matfound.data.info_survey import Survey

#: Name and text of a line of the page.
Fact = tuple[str, str]
_TAGS = {0: "subsurface", 1: "surface", 2: "adsorbate"}
#: OMat24's subsets, by what their names begin with (Barroso-Luque et al., arXiv:2410.12771).
_SUBSETS = ("rattled", "aimd", "salex", "sAlex", "mptrj")
#: Inputs whose names say that they come from the calculation that gives the label.
_LEAKS = ("hull", "stability", "e_form", "formation", "energy_per_atom", "band_gap", "bandgap", "density", "magnet")


def counts(values: dict[str, int] | collections.Counter[Any], limit: int = 8) -> str:
    """Words and how often they are there: `cubic 1,477, orthorhombic 1,156, and 3 more`."""
    ordered = sorted(values.items(), key=lambda item: -item[1])
    text = ", ".join(f"{value} {count:,}" for value, count in ordered[:limit])
    return text + (f", and {len(ordered) - limit:,} more" if len(ordered) > limit else "")


def family_facts(survey: Survey) -> list[Fact]:
    """The lines that a dataset's own kind calls for, found from what its frames have."""
    facts: list[Fact] = []
    if survey.tagged:
        named = {_TAGS.get(tag, f"tag {tag}"): count for tag, count in sorted(survey.tags.items())}
        facts.append(("tags", ", ".join(f"{name} {count:,}" for name, count in named.items()) + " atoms"))
        if survey.adsorbates or "sid" in survey.info:
            facts.append(("adsorbates", f"in {survey.adsorbates:,} of {survey.tagged:,} frames"))
    if survey.held:
        facts.append(("fixed", f"{survey.held_atoms:,} atoms in {survey.held:,} frames"))
    if survey.charged:
        facts.append(("charged", f"{survey.charged:,} frames"))
    facts += _systems(survey)
    facts += _subsets(survey)
    facts += _formulas(survey)
    facts += _stores(survey.dataset)
    return facts


def _stores(dataset: Any) -> list[Fact]:
    """What the headers of stores say of themselves and of where they come from."""
    facts: list[Fact] = []
    for manifest in getattr(dataset, "manifests", ()):
        shards = f"{len(manifest.shards):,} shard{'s' * (len(manifest.shards) != 1)}"
        left_out = f", {len(manifest.problems):,} rows left out" if manifest.problems else ""
        facts.append(("store", f"{manifest.rows:,} rows in {shards}, {manifest.bytes:,} bytes{left_out}; matfound {manifest.matfound}"))
        origin = manifest.provenance
        sources = [f"{entry['name']} ({entry['bytes']:,} bytes, sha256 {entry['sha256'][:12]}…)" for entry in origin.get("sources", ())]
        more = f", and {len(sources) - 3:,} more" if len(sources) > 3 else ""
        options = ", ".join(f"{name} {value!r}" for name, value in origin.get("options", {}).items())
        made = f" by {origin.get('reader', '?')}" + (f" with {options}" if options else "")
        facts.append(("made from", ", ".join(sources[:3]) + more + made))
    return facts


def _systems(survey: Survey) -> list[Fact]:
    if "sid" not in survey.info:
        return []
    sizes = np.array(list(collections.Counter(map(str, survey.info["sid"])).values()))
    spread = f"{sizes.min()}" if sizes.min() == sizes.max() else f"{sizes.min()} to {sizes.max()}, median {np.median(sizes):g}"
    frames = "frame" if sizes.max() == 1 else "frames"
    return [("systems", f"{len(sizes):,} (sid), each with {spread} {frames}{' (fid)' if 'fid' in survey.info else ''}")]


def _subsets(survey: Survey) -> list[Fact]:
    """Subsets of OMat24, by the folders of the files."""
    sources = getattr(survey.dataset, "sources", ())
    found: collections.Counter[str] = collections.Counter()
    for source in sources:
        if source.file.endswith(".aselmdb"):
            folder = Path(source.file).resolve().parent.name
            found[folder if folder.startswith(_SUBSETS) else ""] += source.size
    named = {name: count for name, count in found.items() if name}
    return [("subsets", counts(named))] if named else []


def _formulas(survey: Survey) -> list[Fact]:
    """How many compositions there are, where it is no set of one or two systems."""
    table, _ = survey.compositions()
    frames = np.bincount(survey.kinds, minlength=len(table))
    if len(table) < 3 or survey.pbc["FFF"] > len(survey.natoms) / 2:  # molecules are told by more than their formulas
        return []
    divisor = np.maximum(np.gcd.reduce(table, axis=1), 1) if table.shape[1] else np.ones(len(table), np.int64)
    reduced, inverse = np.unique(table // divisor[:, None], axis=0, return_inverse=True)
    sizes = np.bincount(inverse.ravel(), weights=frames, minlength=len(reduced)).astype(int)
    if len(reduced) < 3:
        return []
    text = f"{len(reduced):,} different, reduced"
    repeated = int(sizes.sum() - len(sizes))
    if repeated and len(reduced) > frames.sum() / 5:  # a set of materials, not of runs of a few
        text += f"; {repeated:,} frames repeat one: split by reduced_formula, or the same material is in two parts"
    facts = [("formulas", text)]
    if np.median((reduced > 0).sum(1)) <= 5:
        facts.append(("stoichiometry", counts(_stoichiometries(reduced, sizes), 6)))
    return facts


def _stoichiometries(reduced: np.ndarray, frames: np.ndarray) -> dict[str, int]:
    """Frames of each anonymous formula: "ABC3"."""
    ordered = np.sort(reduced, axis=1)[:, ::-1]
    patterns, inverse = np.unique(ordered, axis=0, return_inverse=True)
    totals = np.bincount(inverse.ravel(), weights=frames).astype(int)
    found: dict[str, int] = {}
    for pattern, total in zip(patterns, totals, strict=True):
        numbers = sorted(int(count) for count in pattern if count)
        letters = "".join(f"{chr(65 + k)}{count if count > 1 else ''}" for k, count in enumerate(numbers[:26]))
        found[letters] = found.get(letters, 0) + int(total)
    return found


def family_warnings(survey: Survey) -> list[str]:
    """What the communities' users have fallen for."""
    found = []
    if survey.tagged and not survey.adsorbates and "sid" in survey.info:
        found.append(
            "no atom is tagged as adsorbate (2): models that tell adsorbates by their tags (GemNet-OC's quadruplets) have none here"
        )
    inputs = [name for group in survey.groups.values() if not group.field.label for name in group.field.columns]
    leaking = [name for name in inputs if any(word in name.lower() for word in _LEAKS)]
    if leaking:
        found.append(
            f"{len(leaking)} of the {len(inputs)} inputs look like results of the calculation that gave the labels "
            f"({', '.join(leaking[:4])}{', …' if len(leaking) > 4 else ''}): what is learned with them is no prediction"
        )
    if {"formation_energy", "hull_distance"} <= survey.columns.keys():
        found.append(
            "hull_distance is formation_energy minus the hull's energy: as an input it gives formation_energy (and much of the gap) away"
        )
    return found
