"""A potential is a backbone with heads."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from matfound.errors import InputError, nearest
from matfound.graphs.spec import GraphSpec
from matfound.models import compiled, recorded
from matfound.nn.base import Backbone, Configurable, Head, NodeFeatures, Statistics, Symmetry, build
from matfound.structures.atomic_data import AtomicData, collate

__all__ = ["Backbone", "Configurable", "Head", "NodeFeatures", "Potential", "Statistics", "Symmetry", "build"]

log = logging.getLogger(__name__)


class Potential(Configurable):
    """A backbone with heads.

    Args:
        backbone: structure to features.
        heads: name to head; no two predict the same field.
        datasets: vocabulary of `batch.dataset`: the levels of theory (and label sets) that the heads know apart.
        default_dataset: which of them a calculator takes when none is named: {"periodic": name, "molecular": name}, chosen by
            `pbc.any()`. With a single dataset it is that one.
        licence: of the weights.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: dict[str, Head],
        datasets: Sequence[str] = ("default",),
        default_dataset: dict[str, str] | None = None,
        licence: str = "",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        self.datasets = list(datasets)
        self.default_dataset = dict(default_dataset or {})
        self.licence = licence
        self._forward: compiled.CompiledForward | recorded.RecordedForward | None = None
        for kind, name in self.default_dataset.items():
            if kind not in ("periodic", "molecular"):
                raise InputError(f"default_dataset has the key '{kind}'", remedy="known: molecular, periodic")
            self.dataset_index(name)
        seen: dict[str, str] = {}
        for name, head in heads.items():
            for output in head.outputs:
                if output in seen:
                    raise InputError(f"heads '{seen[output]}' and '{name}' both predict '{output}'")
                seen[output] = name
            head.attach(backbone, len(self.datasets))
        backbone.differentiated = self.conservative

    @property
    def graphs(self) -> dict[str, GraphSpec]:
        """The graphs that a batch must carry."""
        return self.backbone.graphs

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of all predicted fields."""
        return tuple(output for head in self.heads.values() for output in head.outputs)  # type: ignore[union-attr]

    @property
    def conservative(self) -> bool:
        """Whether forces are the gradient of the energy."""
        return any(head.conservative for head in self.heads.values())

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.backbone.parameters()).dtype

    def forward(self, batch: AtomicData) -> dict[str, Tensor]:
        """Predictions by field name; see each head for shapes. With forces, gradients are enabled inside `torch.no_grad` too."""
        if torch.is_inference_mode_enabled() and self.conservative:
            # Tensors made in inference mode can never take part in a gradient; clones made outside it can.
            with torch.inference_mode(False):
                return self.forward(batch.clone())
        if not batch.is_batch:
            batch = collate([batch])
        with torch.set_grad_enabled(torch.is_grad_enabled() or self.conservative):
            return self.predict(batch) if self._forward is None else self._forward(self, batch)

    def predict(self, batch: AtomicData) -> dict[str, Tensor]:
        """As `forward`, of a batch, where gradients are enabled already."""
        features = self.backbone(batch)
        predictions: dict[str, Tensor] = {}
        for head in self.heads.values():
            predictions |= head(features, batch)
        if not self.training:
            predictions = {name: value.detach() for name, value in predictions.items()}
        return predictions

    def compile(self, backend: str = "inductor") -> bool:  # type: ignore[override]
        """Compile the forward pass from now on, forces and stress inside, for inference and training; weights stay as they are.

        Compiling takes up to minutes when a batch first comes (once for training and once for inference); see
        `matfound.models.compiled` for which batches are not compiled.

        Args:
            backend: of torch.compile.

        Returns:
            Whether it can be done: where torch cannot trace derivatives, a warning is logged, and everything stays as it was.
        """
        if not compiled.is_possible():
            log.warning("matfound: torch %s cannot compile derivatives; the model runs without", torch.__version__)
            return False
        self._forward = compiled.CompiledForward(backend)
        return True

    def record(self) -> None:
        """From now on, record forward and backward pass of training steps on a GPU as CUDA graphs, which are replayed in further steps:
        several times faster for small batches.

        Weights, results and what autograd sees stay as they are, but for rounding. Results have first derivatives only, which must be taken
        once, before the next batch is computed.
        See `matfound.models.recorded`. Where a model cannot be recorded, a warning says so, and it runs as it is.
        """
        self._forward = recorded.RecordedForward()

    def elements(self, dataset: int) -> set[int]:
        """Atomic numbers that the backbone and every head can judge in a dataset of the vocabulary."""
        known = [found for head in self.heads.values() if (found := head.elements(dataset)) is not None]  # type: ignore[operator]
        return set(self.backbone.elements).intersection(*known)

    def dataset_index(self, name: str) -> int:
        """Index of a dataset in the vocabulary; upper and lower case count only where two names differ in nothing else.

        Raises:
            InputError: unknown name.
        """
        if name in self.datasets:
            return self.datasets.index(name)
        alike = [index for index, known in enumerate(self.datasets) if known.lower() == name.lower()]
        if len(alike) != 1:
            raise InputError(f"the model has no level of theory '{name}'", remedy=nearest(name, self.datasets))
        return alike[0]

    def choose_dataset(self, name: str | None, *, periodic: bool) -> int:
        """Index of the level of theory to use for a structure; see `default_dataset`.

        Raises:
            InputError: none was named and the model has several with no default for this kind of structure.
        """
        if name is not None:
            return self.dataset_index(name)
        if len(self.datasets) == 1:
            return 0
        kind = "periodic" if periodic else "molecular"
        if kind not in self.default_dataset:
            raise InputError(
                f"the model knows several levels of theory and has no default for {kind} structures",
                remedy="name one with head=: " + ", ".join(self.datasets),
            )
        return self.datasets.index(self.default_dataset[kind])

    def fit_scales(self, statistics: Statistics) -> None:
        """Hand statistics of the training data to the backbone and the heads."""
        self.backbone.fit_scales(statistics)
        for head in self.heads.values():
            head.fit_scales(statistics)  # type: ignore[operator]
