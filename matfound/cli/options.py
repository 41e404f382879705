"""Options that several verbs share. No heavy imports: these run for `--help`, too."""

import argparse
from collections.abc import Sequence
from typing import Any

from matfound.errors import InputError, nearest
from matfound.fields import FIELDS


def add_reading(parser: argparse.ArgumentParser) -> None:
    """--key, --unit, --allow-missing, --index: how labels are named and which frames count. `reading` understands them."""
    group = parser.add_argument_group("reading")
    group.add_argument(
        "--key", action="append", default=[], metavar="FIELD=NAME",
        help="the name of a label in the file, e.g. energy=REF_energy (repeatable); -NAME turns the sign; "
        "virial=NAME reads stress from a virial",
    )  # fmt: skip
    group.add_argument(
        "--unit",
        action="append",
        default=[],
        metavar="FIELD=UNIT",
        help="the unit of a label in the file, e.g. energy=kcal/mol (repeatable)",
    )
    group.add_argument("--allow-missing", action="store_true", help="accept that only some frames of a file have a label")
    add_index(group)


def add_index(parser: Any) -> None:
    """--index alone, where labels do not matter."""
    parser.add_argument("--index", metavar="SLICE", help="only these frames of each file, as ASE writes them: 0, -1, :100, ::10")


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--model, --head, --device, --dtype."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", required=required, metavar="M", help="checkpoint folder, or the name of a published model (see `matfound models ls`)"
    )
    group.add_argument(
        "--head",
        metavar="NAME",
        help="level of theory, where the model has several (default: each frame's info 'head', else the model's default)",
    )
    group.add_argument(
        "--import", action="append", default=[], dest="imports", metavar="MODULE",
        help="import this first: a checkpoint with classes of your own needs their module",
    )  # fmt: skip
    group.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, …")
    group.add_argument("--dtype", choices=("float32", "float64"), help="default: the type of the weights")


def add_batch(parser: argparse.ArgumentParser) -> None:
    """--batch-atoms."""
    parser.add_argument("--batch-atoms", type=positive, default=1024, metavar="N", help="atoms per batch (default 1024)")


def positive(text: str) -> int:
    """A whole number from 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, received '{text}'")
    return number


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """Options of `matfound.data.open.open_dataset` from those of `add_reading`.

    Raises:
        InputError: a malformed or unknown field.
    """
    keys = label_keys(args.key, args.unit)
    options: dict[str, Any] = {"allow_missing": args.allow_missing}
    if keys:
        options["keys"] = keys
    if args.index is not None:
        options["index"] = args.index
    return options


def label_keys(keys: Sequence[str], units: Sequence[str]) -> dict[str, dict[str, Any]]:
    """FIELD=NAME and FIELD=UNIT as `matfound.structures.keys.key_map` takes them.

    Raises:
        InputError: a malformed or unknown field.
    """
    spec: dict[str, dict[str, Any]] = {}
    for text in keys:
        field, name = _pair(text, "--key", "FIELD=NAME")
        source = spec.setdefault("stress" if field == "virial" else field, {})
        source["key"] = name.removeprefix("-")
        if name.startswith("-"):
            source["sign"] = -1.0
        if field == "virial":
            source["virial"] = True
    for text in units:
        field, unit = _pair(text, "--unit", "FIELD=UNIT")
        field = "stress" if field == "virial" else field
        spec.setdefault(field, {"key": FIELDS[field].ase_key or field})["unit"] = unit
    return spec


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    field, equals, value = text.partition("=")
    if not equals or not field or not value.strip("-"):
        raise InputError(f"{option} {text}: expected {form}", remedy="e.g. --key energy=REF_energy --unit energy=kcal/mol")
    labels = [name for name, known in FIELDS.items() if known.label]
    if field not in [*labels, "virial"]:
        raise InputError(f"{option} {text}: unknown label '{field}'", remedy=nearest(field, [*labels, "virial"]))
    return field, value
