"""`matfound fit-scales`: scale factors of a GemNet-OC model from structures."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matfound.cli.options import add_index, positive
from matfound.errors import InputError

if TYPE_CHECKING:
    from matfound.models.base import Potential
    from matfound.structures.atomic_data import AtomicData


def add_parser(verbs: Any) -> None:
    """Add the verb to argparse's subparsers."""
    parser = verbs.add_parser(
        "fit-scales",
        help="GemNet-OC's scale factors",
        description="Fit the scale factors of a GemNet-OC model, one after the other, so that what each scales keeps its variance "
        "(Gasteiger et al., arXiv:2106.08903, section 6), and write the model with them. Labels are not needed; structures should be "
        "those to train on, with their tags. Factors that are known stay.",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, or a card that a new model is built of, e.g. gemnet_oc/base")
    parser.add_argument("files", nargs="+", metavar="FILE", help="structure files: anything ASE reads, also compressed extxyz")
    parser.add_argument("--out", required=True, metavar="DIR", help="checkpoint folder to write; must not exist, or be empty")
    parser.add_argument("--batches", type=positive, default=16, metavar="N", help="so many batches at most (default 16)")
    parser.add_argument("--batch-atoms", type=positive, default=1024, metavar="N", help="atoms per batch (default 1024)")
    parser.add_argument("--refit", action="store_true", help="fit factors that are known, too")
    parser.add_argument("--seed", type=int, default=0, help="of the weights of a new model (default 0)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, …")
    add_index(parser)
    parser.set_defaults(action=_fit_scales)


def run(args: argparse.Namespace) -> int:
    """Run the verb.

    Raises:
        InputError: the model is no GemNet-OC, a structure that it cannot take, or factors that cannot be fitted.
    """
    return int(args.action(args) or 0)


def _fit_scales(args: argparse.Namespace) -> int:
    from matfound.cli.models import new_folder
    from matfound.cli.verbs import ProgressBar
    from matfound.inference.predict import usable_device
    from matfound.models import checkpoint
    from matfound.models.gemnet_oc import GemNetOC
    from matfound.models.gemnet_oc_scales import fit_factors

    out = new_folder(args.out)
    potential = _model(args.model, args.seed).to(usable_device(args.device))
    if not isinstance(potential.backbone, GemNetOC):
        raise InputError(f"{type(potential.backbone).__name__} has no scale factors", remedy="fit-scales is for GemNet-OC")
    batches = _batches(potential, args)
    with ProgressBar("fitting") as advance:
        factors = fit_factors(potential.backbone, batches, refit=args.refit, progress=advance)
    for name, factor in factors.items():
        print(f"{factor:10.4f}  {name}")
    checkpoint.save(potential.cpu(), out)
    structures = sum(batch.num_systems for batch in batches)
    print(f"{len(factors)} scale factors from {structures:,} structures in {len(batches)} batches; the model is in {out}")
    return 0


def _model(name: str, seed: int) -> "Potential":
    """A checkpoint, or a new model of a card."""
    import torch

    from matfound import catalog
    from matfound.models import checkpoint
    from matfound.models.base import Potential, build

    if Path(name).exists() or name.startswith("hf://"):
        return checkpoint.load(name)
    card = catalog.model(name)
    torch.manual_seed(seed)
    backbone = build({"class_path": card.class_path, "init_args": card.init_args})
    return Potential(backbone, {key: build(head.model_dump()) for key, head in card.heads.items()}, list(card.levels_of_theory))


def _batches(potential: "Potential", args: argparse.Namespace) -> "list[AtomicData]":
    """Structures with the model's graphs, up to so many atoms at a time."""
    from matfound.cli.verbs import _structures
    from matfound.graphs.neighbors import add_graphs
    from matfound.structures.ase import from_atoms
    from matfound.structures.atomic_data import check, collate

    device = next(potential.parameters()).device
    batches: list[AtomicData] = []
    held: list[AtomicData] = []
    for file, frame, atoms in _structures(args.files, args.index):
        try:
            data = check(from_atoms(atoms, labels=False))
            unknown = sorted(set(data.numbers.tolist()) - potential.backbone.elements)
            if unknown:
                raise InputError(f"the model knows no element {unknown[0]}", remedy="leave the structure out")
            sample = add_graphs(data, potential.graphs)
        except InputError as error:
            raise error.at(file, frame) from None
        if held and sum(other.num_nodes for other in held) + sample.num_nodes > args.batch_atoms:
            batches.append(collate(held).to(device))
            held = []
            if len(batches) == args.batches:
                return batches
        held.append(sample)
    return [*batches, collate(held).to(device)] if held else batches
