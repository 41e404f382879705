"""Cards of datasets and models, and where the catalog is.

`datasets/`, `models/` and `recipes/` lie at the repository root, and inside the package (`_catalog`) in a wheel.
"""

import functools
import hashlib
import os
import re
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from matfound import fields, units
from matfound.errors import InputError, nearest

Kind = Literal["datasets", "models", "recipes"]
_PATTERNS: dict[Kind, str] = {"datasets": "*/manifest.yaml", "models": "*/*.yaml", "recipes": "**/*.yaml"}


class _Card(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LabelCard(_Card):
    """How a file names and scales one field of `matfound.fields.FIELDS`."""

    unit: str = Field(description="unit in the file; readers convert to matfound's")
    key: str = Field("", description="name in the file where it is not ASE's own")
    columns: dict[str, str] = Field(default_factory=dict, description="of a group: each column with its unit, in the file's order")
    note: str = ""


class DataFile(_Card):
    """One file of a dataset: what to check a copy against, and what its numbers mean."""

    path: str = Field(description="relative to the card")
    url: str = Field("", description="where upstream serves it; empty for files that come with matfound")
    bytes: int = Field(gt=0)
    sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    md5: str = Field("", pattern=r"^([0-9a-f]{32})?$", description="where upstream publishes no sha256")
    frames: int = Field(gt=0)
    level_of_theory: str = Field(description="a key of the card's levels_of_theory")
    fields: dict[str, LabelCard]

    @model_validator(mode="after")
    def _has_checksum(self) -> "DataFile":
        if not self.sha256 and not self.md5:
            raise ValueError("a file needs sha256 or md5")
        return self

    @field_validator("fields")
    @classmethod
    def _known_fields(cls, value: dict[str, LabelCard]) -> dict[str, LabelCard]:
        return _check_units(value)


def _check_units(labels: dict[str, LabelCard]) -> dict[str, LabelCard]:
    for name, label in labels.items():
        if not label.columns:  # a group keeps the units of its source
            units.factor(label.unit, fields.find(name).unit)
    return labels


class DownloadPart(_Card):
    """One file to fetch."""

    url: str = Field(pattern=r"^(https?|ftp)://")
    bytes: int | None = Field(None, gt=0, description="as published; none where upstream does not say")
    sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    md5: str = Field("", pattern=r"^([0-9a-f]{32})?$")


class DownloadCard(_Card):
    """What `matfound data fetch NAME --split S` gets: the files of one split, and what reads them."""

    parts: list[DownloadPart] = Field(min_length=1)
    unpack: Literal["", "tar", "zip", "gz"] = Field("", description="what to do with each file (tar: compressed or not)")
    reader: str = Field(description="kind of `matfound.data.open.READERS`")
    frames: int | None = Field(None, gt=0)
    bytes: int | None = Field(None, gt=0, description="of all parts, about, where theirs are not published")
    level_of_theory: str = ""
    note: str = ""


class SplitCard(_Card):
    """The committed split: a file of frame ids and the rule that made it."""

    path: str
    seed: int
    rule: str


class DatasetCard(_Card):
    """`datasets/<name>/manifest.yaml`: facts about a dataset.

    `datasets` names the sets that may be trained on as one: files of one level of theory, so that their energies share a reference.
    """

    name: str
    description: str
    licence: str
    origin: str = Field(description="who made it, from what, with which reference to cite")
    version: str
    levels_of_theory: dict[str, str] = Field(min_length=1)
    datasets: dict[str, list[str]] = Field(default_factory=dict)
    files: list[DataFile] = Field(default_factory=list, description="files that come with matfound")
    downloads: dict[str, DownloadCard] = Field(default_factory=dict, description="splits that upstream serves")
    fields: dict[str, LabelCard] = Field(default_factory=dict, description="labels of the downloads, with the files' units")
    splits: SplitCard | None = None
    leakage: str = Field(description="what the splits do not separate, and which benchmarks this data must not be compared on")
    known_weaknesses: list[str] = Field(min_length=1)

    @field_validator("fields")
    @classmethod
    def _known_fields(cls, value: dict[str, LabelCard]) -> dict[str, LabelCard]:
        return _check_units(value)

    @model_validator(mode="after")
    def _consistent(self) -> "DatasetCard":
        if not self.files and not self.downloads:
            raise ValueError("a dataset has files or downloads, or it is not one")
        for split, download in self.downloads.items():
            if download.level_of_theory and download.level_of_theory not in self.levels_of_theory:
                raise ValueError(
                    f"download '{split}' has the level_of_theory '{download.level_of_theory}', which is not described; "
                    + nearest(download.level_of_theory, self.levels_of_theory)
                )
        paths = {file.path: file for file in self.files}
        if len(paths) != len(self.files):
            raise ValueError("two files have the same path")
        for file in self.files:
            if file.level_of_theory not in self.levels_of_theory:
                raise ValueError(
                    f"file '{file.path}' has the level_of_theory '{file.level_of_theory}', which is not described; "
                    + nearest(file.level_of_theory, self.levels_of_theory)
                )
        for dataset, members in self.datasets.items():
            for member in members:
                if member not in paths:
                    raise ValueError(f"dataset '{dataset}' names the file '{member}', which is not listed; {nearest(member, paths)}")
            levels = {paths[member].level_of_theory for member in members}
            if len(levels) != 1:
                raise ValueError(f"dataset '{dataset}' must have one level of theory, it has {sorted(levels)}")
        return self

    def file(self, path: str) -> DataFile:
        """The entry of a file.

        Raises:
            InputError: the card has no such file.
        """
        for entry in self.files:
            if entry.path == path:
                return entry
        raise InputError(f"dataset '{self.name}' has no file '{path}'", remedy=nearest(path, [entry.path for entry in self.files]))

    def verify(self, folder: Path) -> None:
        """Compare the files in `folder` with the card.

        Raises:
            InputError: a file is missing, or its size or checksum is not the card's.
        """
        for entry in self.files:
            path = folder / entry.path
            if not path.is_file():
                raise InputError(f"the file is missing from dataset '{self.name}'", remedy="fetch it again", file=path)
            if path.stat().st_size != entry.bytes:
                raise InputError(f"{path.stat().st_size} bytes, expected {entry.bytes}", remedy="fetch it again", file=path)
            kind, expected = ("sha256", entry.sha256) if entry.sha256 else ("md5", entry.md5)
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, kind).hexdigest()
            if found != expected:
                raise InputError(f"{kind} is {found}, expected {expected}", remedy="fetch it again", file=path)


class WeightsCard(_Card):
    """Where published weights are: a file inside a PyPI package, whose code is never run."""

    format: Literal["sevennet"] = Field(description="adapter in matfound.models.convert")
    package: str = Field(description="PyPI package that holds the file")
    version: str
    file: str = Field(description="path inside the installed package's folder")
    bytes: int = Field(gt=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    download_bytes: int = Field(gt=0, description="of the package")
    licence: str
    datasets: list[str] = Field(default_factory=list, description="names for the vocabulary where the file has none")


class DownloadedWeightsCard(_Card):
    """Where published weights are that users download themselves: they are too large for a package, or their terms want a consent."""

    format: Literal["fairchem"] = Field(description="adapter in matfound.models.convert")
    url: str = Field(pattern=r"^https://")
    file: str = Field(pattern=r"^[^/]+$", description="name under which the file is looked for")
    bytes: int | None = Field(None, gt=0, description="where it is known")
    sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$", description="where it is published")
    licence: str
    page: str = Field("", pattern=r"^(https://.*)?$", description="where it is described")
    terms: str = Field("", description="what has to be done before the download, e.g. a consent, and where")
    datasets: list[str] = Field(default_factory=list, description="names for the vocabulary")


class HeadCard(_Card):
    """One head of a model."""

    class_path: str
    init_args: dict[str, Any] = Field(default_factory=dict)


class ModelCard(_Card):
    """`models/<family>/<size>.yaml`: what to build, and what is known about the result."""

    class_path: str
    init_args: dict[str, Any]
    heads: dict[str, HeadCard] = Field(default_factory=dict, description="of families that have heads of their own")
    description: str
    parameters: int | None = Field(None, gt=0, description="trainable parameters")
    licence: str = ""
    references: list[str] = Field(default_factory=list, description="papers, as DOI or arXiv number")
    trained_on: list[str] = Field(default_factory=list)
    levels_of_theory: dict[str, str] = Field(default_factory=dict, description="of each dataset in the vocabulary")
    published: WeightsCard | None = Field(None, description="published weights in a PyPI package, if matfound reads them")
    download: DownloadedWeightsCard | None = Field(None, description="published weights elsewhere, if matfound reads them")
    scores: dict[str, dict[str, float]] = Field(default_factory=dict, description="published scores: benchmark, metric, value")
    scores_source: str = Field("", description="where the scores are from, and when")
    known_weaknesses: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _scores_have_a_source(self) -> "ModelCard":
        if self.scores and not self.scores_source:
            raise ValueError("scores need a scores_source")
        return self

    @field_validator("class_path")
    @classmethod
    def _is_dotted(cls, value: str) -> str:
        if not all(part.isidentifier() for part in value.split(".")) or "." not in value:
            raise ValueError(f"'{value}' is not the dotted path of a class, e.g. matfound.models.nequip.NequIP")
        return value


def root() -> Path:
    """The folder that holds datasets/, models/ and recipes/: the package's `_catalog` in a wheel, else the repository root."""
    package = Path(__file__).resolve().parent
    return package / "_catalog" if (package / "_catalog").is_dir() else package.parent


def names(kind: Kind) -> list[str]:
    """What the catalog has: "minidft" (datasets), "nequip/small" (models), "overlays/wandb" (recipes)."""
    folder = root() / kind
    paths = (path.relative_to(folder) for path in folder.glob(_PATTERNS[kind]))
    return sorted(path.parent.as_posix() if kind == "datasets" else path.with_suffix("").as_posix() for path in paths)


def find(kind: Kind, name: str) -> Path:
    """The card (datasets, models) or recipe of a name.

    Raises:
        InputError: nothing has that name; the nearest is suggested.
    """
    if name not in names(kind):
        raise InputError(f"no {kind.rstrip('s')} is named '{name}'", remedy=nearest(name, names(kind)))
    return root() / kind / (f"{name}/manifest.yaml" if kind == "datasets" else f"{name}.yaml")


def dataset(name: str) -> DatasetCard:
    """The card of a dataset. Errors as for `find` and `read`."""
    return read(find("datasets", name), DatasetCard)


def model(name: str) -> ModelCard:
    """The card of a model, by "nequip/sevennet-0" or, as file names are unique, by "sevennet-0". Errors as for `find` and `read`."""
    return read(find("models", model_name(name)), ModelCard)


def model_name(name: str) -> str:
    """The full name of a model's card, e.g. "nequip/sevennet-0" of "SevenNet-0".

    Raises:
        InputError: there is no such card; the nearest is suggested.
    """
    known = {full.rpartition("/")[2]: full for full in names("models")} | {full: full for full in names("models")}
    if name.lower() not in known:
        raise InputError(f"no model is named '{name}'", remedy=nearest(name.lower(), known))
    return known[name.lower()]


def training_sets() -> dict[str, list[Path]]:
    """The files of every named set of one level of theory, e.g. "minidft-crystals"; names come from the cards' `datasets`."""
    found: dict[str, list[Path]] = {}
    for name in names("datasets"):
        card = dataset(name)
        for member, files in card.datasets.items():
            found[member] = [root() / "datasets" / name / file for file in files]
    return found


def _expand(path: str) -> str:
    def value(found: re.Match[str]) -> str:
        known = os.environ.get(found[1]) or found[3]
        if known is None:
            raise InputError(f"the environment variable {found[1]} is not set", remedy=f"export {found[1]}=FOLDER", file=path)
        return known

    return re.sub(r"\$\{(\w+)(:-([^}]*))?\}", value, path)


def resolve(path: str | os.PathLike[str]) -> Path:
    """A path as given if it exists, else below the catalog: "datasets/minidft/split.json" works from any folder.

    `${NAME}` stands for an environment variable, `${NAME:-default}` for one that need not be set.

    Raises:
        InputError: neither exists; the nearest names next to it are suggested. Or a variable is not set.
    """
    given = Path(_expand(os.fspath(path))).expanduser()
    if given.exists():
        return given
    if not given.is_absolute() and (root() / given).exists():
        return root() / given
    neighbours = [folder for folder in (given.parent, root() / given.parent) if folder.is_dir()]
    if not neighbours:
        raise InputError(f"no such file: the folder '{given.parent}' does not exist", file=given)
    near = [entry.name for folder in neighbours for entry in folder.iterdir() if not entry.name.startswith(".")]
    raise InputError("no such file or folder", remedy=nearest(given.name, near), file=given)


C = TypeVar("C", bound=_Card)


@functools.cache
def _keys(card: type[BaseModel]) -> set[str]:
    known: set[str] = set(card.model_fields)
    of_datasets = (LabelCard, DataFile, SplitCard, DownloadPart, DownloadCard)
    for nested in of_datasets if card is DatasetCard else (WeightsCard, DownloadedWeightsCard, HeadCard):
        known |= set(nested.model_fields)
    return known


def read(file: str | os.PathLike[str], card: type[C]) -> C:
    """Read and validate a card.

    Raises:
        InputError: no YAML, or a key is unknown, missing or wrong: names the file, the key and the reason.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the card: {error.strerror}", file=file) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError("not YAML: " + " ".join(str(error).split()), file=file) from error
    if not isinstance(content, dict):
        raise InputError(f"a card is a mapping of keys, received {type(content).__name__}", file=file)
    try:
        return card.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = str(first["msg"]).removeprefix("Value error, ")
        remedy = ""
        if first["type"] == "extra_forbidden":
            reason, remedy = "unknown key", nearest(str(first["loc"][-1]), _keys(card))
        elif first["type"] == "missing":
            reason = "the key is missing"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise InputError((f"'{key}': " if key else "") + reason + more, remedy=remedy, file=file) from error
