"""Published weights by name: found in an installed package, converted once, and cached.

The package's own code is never imported: its files are read as they lie.
"""

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from matfound import catalog
from matfound.catalog import ModelCard, WeightsCard
from matfound.errors import InputError
from matfound.models import checkpoint
from matfound.models.base import Potential
from matfound.models.convert import CONVERTER_VERSION, convert
from matfound.models.upgrades import FORMAT_VERSION

log = logging.getLogger(__name__)


def names() -> list[str]:
    """Short names of the models with published weights, e.g. "sevennet-0"."""
    return [name.rpartition("/")[2] for name in catalog.names("models") if catalog.model(name).published is not None]


def card(name: str) -> tuple[str, ModelCard, WeightsCard]:
    """Short name, card and weights of a published model, in any case of letters.

    Raises:
        InputError: no such model, or one without published weights.
    """
    full = catalog.model_name(name)
    found = catalog.model(full)
    if found.published is None:
        raise InputError(f"the model '{name}' has no published weights", remedy="those that have: " + ", ".join(names()))
    return full.rpartition("/")[2], found, found.published


def cache_folder() -> Path:
    """Where converted copies are: $MATFOUND_CACHE, else $XDG_CACHE_HOME/matfound, else ~/.cache/matfound."""
    if given := os.environ.get("MATFOUND_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "matfound"


def installed(weights: WeightsCard) -> Path | None:
    """The weights' file in the installed package; None without the package, or without the file in it."""
    spec = importlib.util.find_spec(weights.package)  # of a top-level package: finds it, does not run it
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / weights.file).is_file():
            return path
    return None


def installed_version(weights: WeightsCard) -> str | None:
    """Version of the installed package."""
    try:
        return importlib.metadata.version(weights.package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cached(name: str, digest: str) -> Path:
    """Where the converted copy of a file is kept; it may not be there yet."""
    return cache_folder() / f"{name}-{digest[:12]}-v{FORMAT_VERSION}.{CONVERTER_VERSION}"


def how_to_get(weights: WeightsCard) -> str:
    """What to do for the weights: command, size, licence."""
    size = weights.download_bytes / 1e6
    return (
        f"pip install --no-deps {weights.package}=={weights.version} ({size:.0f} MB, licence of the weights: {weights.licence}); "
        "its code is not used, so it needs no dependencies"
    )


def load(name: str) -> Potential:
    """A published model: from the cache, else converted from the installed package, or from the file that was downloaded, and cached.

    Raises:
        InputError: no such model; the package is not installed (says how to get it, its size and licence), or its file cannot be read.
    """
    full = catalog.model_name(name)
    if (download := (found := catalog.model(full)).download) is not None:
        from matfound.models import downloaded  # which needs what is here

        return downloaded.load(full.rpartition("/")[2], found, download)
    short, model, weights = card(name)
    file = installed(weights)
    if file is None:
        folder = cached(short, weights.sha256)
        if (folder / checkpoint.CONFIG).is_file():
            return checkpoint.load(folder)
        version = installed_version(weights)
        problem = (
            f"the weights of '{short}' come with the PyPI package {weights.package} {weights.version}, which is not installed"
            if version is None
            else f"the installed {weights.package} {version} has no file {weights.file}, the weights of '{short}'"
        )
        raise InputError(problem, remedy=how_to_get(weights))
    return from_file(short, model, weights, file)


def from_file(short: str, model: ModelCard, weights: WeightsCard, file: Path) -> Potential:
    """The potential of an upstream file, converted unless the cache has it; a cache that cannot be written costs time only.

    Raises:
        InputError: the file cannot be read or converted.
    """
    digest = sha256(file)
    folder = cached(short, digest)
    if (folder / checkpoint.CONFIG).is_file():
        try:
            return checkpoint.load(folder)
        except InputError as error:
            log.warning("matfound: the cached copy is made anew: %s", error)
    try:
        potential = convert(file, weights.datasets, weights.licence)
    except InputError as error:
        if digest == weights.sha256:
            raise
        version = installed_version(weights)
        raise InputError(
            f"{error.problem} (this is not the file of {weights.package} {weights.version}"
            + (f"; installed is {weights.package} {version})" if version else ")"),
            remedy=how_to_get(weights), file=file,
        ) from None  # fmt: skip
    if digest != weights.sha256:
        log.warning("matfound: %s is not the file of %s %s that '%s' stands for", file, weights.package, weights.version, short)
    try:
        checkpoint.save(potential, folder, front_matter(short, model))
    except InputError as error:
        log.warning("matfound: the converted model is not cached: %s", error)
    return potential


def fetch(name: str, out: Path | None = None) -> Path:
    """Make the converted copy of a published model, downloading its package if it is not installed; the checkpoint folder.

    Args:
        name: of the model.
        out: folder to write; default: the cache.

    Raises:
        InputError: the download fails, or brings another file than the card's.
    """
    short, model, weights = card(name)
    folder = cached(short, weights.sha256)
    if not (folder / checkpoint.CONFIG).is_file():
        file = installed(weights)
        if file is not None and sha256(file) == weights.sha256:
            potential = convert(file, weights.datasets, weights.licence)
        else:
            potential = _download(weights)
        checkpoint.save(potential, folder, front_matter(short, model))
    if out is None:
        return folder
    return checkpoint.save(checkpoint.load(folder), out, front_matter(short, model))


def _download(weights: WeightsCard) -> Potential:
    """Through pip, so that its settings (index, proxy) hold; nothing of the package is installed or run."""
    requirement = f"{weights.package}=={weights.version}"
    with tempfile.TemporaryDirectory() as folder:
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["nothing came"])[-1].removeprefix("ERROR: ")
            raise InputError(f"{requirement} cannot be downloaded: {reason}", remedy="check the connection, or install it by hand")
        file = Path(folder) / Path(weights.file).name
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                file.write_bytes(archive.read(f"{weights.package}/{weights.file}"))
        except (KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"{wheels[0].name} does not hold {weights.file}: {error}", remedy="try again") from None
        digest = sha256(file)
        if digest != weights.sha256:
            raise InputError(f"{weights.file} of {wheels[0].name} has the sha256 {digest}, expected {weights.sha256}", remedy="try again")
        return convert(file, weights.datasets, weights.licence)


def front_matter(short: str, model: ModelCard) -> dict[str, object]:
    """Of the converted checkpoint's model card."""
    assert model.published is not None
    weights = model.published
    return {
        "model_name": short,
        "base_model": f"{weights.package} {weights.version}: {weights.file}",
        "license": weights.licence.lower(),
        "datasets": model.trained_on,
    }


def sha256(file: Path) -> str:
    """Checksum of a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", remedy="check its permissions", file=file) from error
