"""Published weights that users download themselves, and `hf://` addresses.

A file is looked for by its name in $MATFOUND_WEIGHTS, then in the folder `weights` of the cache; it is checked against the card's sum,
where one is known, converted once, and the copy is cached.
"""

import logging
import os
from pathlib import Path

from matfound import catalog
from matfound.catalog import DownloadedWeightsCard, ModelCard
from matfound.errors import InputError
from matfound.models import checkpoint
from matfound.models.base import Potential
from matfound.models.convert import convert
from matfound.models.published import cache_folder, cached, sha256

log = logging.getLogger(__name__)

HUB = "hf://"


def folders() -> list[Path]:
    """Where files are looked for."""
    given = os.environ.get("MATFOUND_WEIGHTS")
    return [*([Path(given)] if given else []), cache_folder() / "weights"]


def names() -> list[str]:
    """Short names of the models whose weights users download, e.g. "equiformer-v3-oam"."""
    return [name.rpartition("/")[2] for name in catalog.names("models") if catalog.model(name).download is not None]


def find(weights: DownloadedWeightsCard) -> Path | None:
    """The file of a card on this machine; None where it is not."""
    return next((path for folder in folders() if (path := folder / weights.file).is_file()), None)


def how_to_get(weights: DownloadedWeightsCard) -> str:
    """What to do for the weights: address, licence, terms, place."""
    size = f"{weights.bytes / 1e6:.0f} MB, " if weights.bytes else ""
    terms = f"; {weights.terms}" if weights.terms else ""
    place = f"put it in {folders()[0]}" + ("" if len(folders()) > 1 else ", or in the folder that $MATFOUND_WEIGHTS names")
    return f"download {weights.url} ({size}licence of the weights: {weights.licence}{terms}) and {place}"


def load(short: str, model: ModelCard, weights: DownloadedWeightsCard) -> Potential:
    """The potential of a card's file, converted unless the cache has it.

    Raises:
        InputError: the file is not on this machine (says where it is), or is another one than the card's.
    """
    file = find(weights)
    if file is None:
        raise InputError(f"the weights of '{short}' do not come with matfound and are not on this machine", remedy=how_to_get(weights))
    digest = sha256(file)
    if weights.sha256 and digest != weights.sha256:
        raise InputError(f"the sha256 is {digest}, expected {weights.sha256}", remedy=how_to_get(weights), file=file)
    return _converted(file, cached(short, digest), weights.datasets, weights.licence, front_matter(short, model, weights))


def front_matter(short: str, model: ModelCard, weights: DownloadedWeightsCard) -> dict[str, object]:
    """Of the converted checkpoint's model card."""
    licence = weights.licence.lower()
    return {"model_name": short, "base_model": weights.url, "license": licence, "datasets": model.trained_on}


def _converted(file: Path, folder: Path, datasets: list[str], licence: str, front: dict[str, object]) -> Potential:
    """From the cache, or converted and cached; a cache that cannot be written costs time only."""
    if (folder / checkpoint.CONFIG).is_file():
        try:
            return checkpoint.load(folder)
        except InputError as error:
            log.warning("matfound: the cached copy is made anew: %s", error)
    potential = convert(file, datasets, licence)
    try:
        checkpoint.save(potential, folder, front)
    except InputError as error:
        log.warning("matfound: the converted model is not cached: %s", error)
    return potential


def from_hub(address: str) -> Potential:
    """A model on the Hugging Face Hub: `hf://OWNER/NAME`, a checkpoint folder of matfound, or `hf://OWNER/NAME/FILE`, a file that
    `matfound convert` reads. `@REVISION` may follow the name.

    Raises:
        InputError: not such an address; huggingface-hub is not installed; or the download fails, e.g. without a network.
    """
    parts = address.removeprefix(HUB).split("/")
    if len(parts) < 2 or not all(parts):
        raise InputError(f"'{address}' is no address on the Hub", remedy="hf://OWNER/NAME, or hf://OWNER/NAME/FILE")
    try:
        import huggingface_hub  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise InputError(f"'{address}' needs huggingface-hub, which is not installed", remedy="pip install huggingface-hub") from None
    name, _, revision = parts[1].partition("@")
    repo, file = f"{parts[0]}/{name}", "/".join(parts[2:])
    try:
        if file:
            path = Path(huggingface_hub.hf_hub_download(repo, file, revision=revision or None))
        else:
            wanted = [checkpoint.CONFIG, checkpoint.WEIGHTS, checkpoint.CARD]
            path = Path(huggingface_hub.snapshot_download(repo, revision=revision or None, allow_patterns=wanted))
    except Exception as error:  # the Hub's own errors, those of the connection, and of the disk
        reason = str(error).strip().splitlines()[:1]
        remedy = "check the connection, the name, and that you may read it (huggingface-cli login)"
        raise InputError(f"'{address}' cannot be downloaded: {''.join(reason) or type(error).__name__}", remedy=remedy) from error
    if not file:
        return checkpoint.load(path)
    front: dict[str, object] = {"model_name": path.stem, "base_model": address}
    return _converted(path, cached(path.stem, sha256(path)), [], "", front)
