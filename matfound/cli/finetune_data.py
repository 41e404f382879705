"""The frames of `matfound finetune`: what trains, validates and tests, and what is an isolated atom."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matfound.cli.options import label_keys
from matfound.errors import InputError

if TYPE_CHECKING:
    from matfound.data.dataset import Dataset
    from matfound.models.base import Potential

#: Share of the frames that validate where no file for that is given.
HELD_OUT = 0.1


class Data:
    """The user's frames: which train, validate and test, and which are isolated atoms.

    Raises:
        InputError: files that cannot be read, are given twice, hold labels that some of their frames lack, or nothing but atoms.
    """

    def __init__(self, args: argparse.Namespace, isolated: dict[str, float]) -> None:
        from matfound.data.isolated import energies, is_isolated, merged, read

        self.keys = label_keys(args.key, args.unit)
        self.groups: dict[str, Dataset] = {"train": self._open(args.files, args.index)}
        self.groups |= {part: self._open(files) for part, files in (("val", args.val), ("test", args.test)) if files}
        self.name = args.name or Path(args.files[0]).name.partition(".")[0]
        self.chosen: dict[str, list[int]] = {}
        atoms: dict[str, list[int]] = {}
        self.labels: set[str] = set()
        self.elements: set[int] = set()
        self.periodic: set[bool] = set()
        for part, dataset in self.groups.items():
            samples = [dataset.get(i) for i in range(len(dataset))]
            atoms[part] = [i for i, sample in enumerate(samples) if is_isolated(sample)]
            self.chosen[part] = sorted(set(range(len(dataset))) - set(atoms[part]))
            if not self.chosen[part]:
                raise InputError("nothing but isolated atoms", remedy="give structures to learn from", file=dataset.place(0)[0])
            if not args.allow_missing:
                dataset.check_labels(self.chosen[part])
            if part == "train":
                self._survey([samples[i] for i in self.chosen[part]])
        self._check_twice()
        self.num_isolated = {part: len(found) for part, found in atoms.items()}
        sources = [("the training files", energies(self.groups["train"], atoms["train"])), ("the recipe", isolated)]
        if args.isolated_atoms:
            only = {field: spec for field, spec in self.keys.items() if field == "energy"}
            sources.append(("--isolated-atoms", read(args.isolated_atoms, **({"keys": only} if only else {}))))
        self.isolated = merged(*sources)
        self._remarks()
        if "val" not in self.chosen:
            self._hold_out(args.seed or 0)

    def _remarks(self) -> None:
        """Say what is not used."""
        from ase.data import chemical_symbols

        for part in ("val", "test"):
            if self.num_isolated.get(part):
                say(f"isolated atoms among the {part} frames are left out ({self.num_isolated[part]})")
        if unused := sorted(set(self.isolated) - {chemical_symbols[z] for z in self.elements}):
            say(f"no training frame has {', '.join(unused)}: their isolated-atom energies are not used")

    def _open(self, files: list[str], index: str | None = None) -> "Dataset":
        from matfound.data.open import open_dataset

        options: dict[str, Any] = {"allow_missing": True}  # isolated atoms need not have forces
        if self.keys:
            options["keys"] = self.keys
        return open_dataset(files[0] if len(files) == 1 else files, **options, **({} if index is None else {"index": index}))

    def _survey(self, samples: list[Any]) -> None:
        from matfound.data.labels import labels

        for sample in samples:
            self.labels |= labels(sample)
            self.elements |= set(sample.numbers.tolist())
            self.periodic.add(bool(sample.pbc.any()))

    def _check_twice(self) -> None:
        seen: dict[Path, str] = {}
        for part, dataset in self.groups.items():
            for source in dataset.sources:  # type: ignore[attr-defined]
                other = seen.setdefault(Path(source.file).resolve(), part)
                if other != part or sum(source.file == s.file for s in dataset.sources) > 1:  # type: ignore[attr-defined]
                    both = f"{other} and {part}" if other != part else f"{part}, twice"
                    raise InputError(f"the same file for {both}", remedy="name every file once", file=source.file)

    def _hold_out(self, seed: int) -> None:
        """Take the validation frames from those for training; a single frame is not divided."""
        from matfound.data.splits import random_split

        frames = self.chosen["train"]
        if len(frames) == 1:
            say("there is one frame: nothing is held out for validation")
        else:
            split = random_split(len(frames), {"train": 1 - HELD_OUT, "val": HELD_OUT}, seed)
            self.chosen |= {part: [frames[i] for i in split[part]] for part in ("train", "val")}

    @property
    def reader(self) -> dict[str, Any]:
        """Class and arguments of the reader of all files."""
        from matfound.data.files import FileDataset

        kinds = {type(dataset) for dataset in self.groups.values()}
        if len(kinds) > 1:
            raise InputError("training, validation and test data are of different kinds", remedy="convert them to extended XYZ")
        kind = kinds.pop()
        files = [source.file for dataset in self.groups.values() for source in dataset.sources]  # type: ignore[attr-defined]
        arguments: dict[str, Any] = {"paths" if kind is FileDataset else "path": files, "allow_missing": True}
        if self.keys:
            arguments["keys"] = self.keys
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}

    def targets(self, wanted: list[dict[str, Any]], model: "Potential") -> list[dict[str, Any]]:
        """Those of the recipe that the data have labels for and the model predicts; says which labels are not used."""
        found = [target for target in wanted if target["field"] in self.labels & set(model.outputs)]
        fields = {target["field"] for target in found}
        if not found:
            have = ", ".join(sorted(self.labels)) or "none"
            raise InputError(
                f"there is nothing to learn from: the model predicts {', '.join(model.outputs)}, the frames have the labels: {have}",
                remedy="say how labels are named: --key energy=REF_energy --key forces=REF_forces",
                file=self.groups["train"].place(0)[0],
            )
        if unused := sorted(self.labels - fields):
            say(f"not trained on: {', '.join(unused)} (no target of the recipe that the model predicts)")
        if "energy" in fields and "forces" not in fields and "forces" in model.outputs:
            say("the frames have energies and no forces: forces are worth far more of them")
        if "energy" not in fields:
            say("the frames have no energies: only " + ", ".join(sorted(fields)) + " are trained; energies keep the zero of the old head")
        return found

    def write(self, out: Path, recipe: dict[str, Any]) -> Path:
        """Write split and recipe into the folder; returns the recipe's file."""
        import yaml

        from matfound.data.splits import named
        from matfound.report.files import write_text

        parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
        for part, frames in self.chosen.items():
            source = "train" if part not in self.groups else part
            parts[part] = named({part: frames}, self.groups[source], "file_frame")[part]
        write_text(out / "split.json", json.dumps({self.name: parts}, indent=1, ensure_ascii=False) + "\n")
        recipe["data"]["split"] = {"file": str(out / "split.json"), "key": "file_frame"}
        text = f"# Written by matfound finetune; to run it again: matfound fit --config {out / 'finetune.yaml'}\n"
        write_text(out / "finetune.yaml", text + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
        return out / "finetune.yaml"

    def counts(self) -> dict[str, int]:
        """Frames of each part, and isolated atoms."""
        return {part: len(frames) for part, frames in self.chosen.items()} | {"isolated_atoms": sum(self.num_isolated.values())}

    def describe(self) -> str:
        """The counts in words."""
        counts = self.counts()
        words = {"train": "training", "val": "validation", "test": "test", "isolated_atoms": "isolated-atom"}
        return ", ".join(f"{counts[part]:,} {word}" for part, word in words.items() if counts.get(part)) + " frames"


def say(text: str) -> None:
    """A remark on stderr."""
    print(f"matfound: {text}", file=sys.stderr)
