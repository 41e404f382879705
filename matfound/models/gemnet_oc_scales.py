"""Scale factors of GemNet-OC, fitted so that every scaled quantity keeps the variance of what it is made of (GemNet, arXiv:2106.08903,
section 6): factor = √(variance of the reference / variance of the quantity), one factor after the other in the order of the network.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from matfound.errors import InputError
from matfound.models.gemnet_oc import GemNetOC
from matfound.models.gemnet_oc_layers import Scale
from matfound.structures.atomic_data import AtomicData


class _Seen(Exception):  # noqa: N818 - no error
    """What was to be observed has been: the rest of the network need not run."""


class _Observer:
    """Sums of the variances of one factor's quantity and reference, weighted by rows."""

    def __init__(self) -> None:
        self.quantity, self.reference = 0.0, 0.0

    def __call__(self, scale: Scale, x: Tensor, reference: Tensor) -> None:
        if len(x) > 1 and len(reference) > 1:
            self.quantity += float(x.var(dim=0).mean()) * len(x)
            self.reference += float(reference.var(dim=0).mean()) * len(x)
        raise _Seen


def fit_factors(
    backbone: GemNetOC, batches: Sequence[AtomicData], *, refit: bool = False, progress: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Fit the scale factors that are not known (0), in place; needs no labels.

    Args:
        backbone: a new one, say.
        batches: structures with the backbone's graphs, on its device; 16 batches are usual.
        refit: fit all factors anew.
        progress: called after each factor.

    Returns:
        All factors, by the names of their modules.

    Raises:
        InputError: there are no structures, or something has no variance in them, e.g. since they have no quadruplets.
    """
    names = {module: name for name, module in backbone.named_modules() if isinstance(module, Scale)}
    if not batches:
        raise InputError("there are no structures to fit scale factors to")
    training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            if refit:
                for scale in names:
                    scale.factor.zero_()
            for scale in _in_order(backbone, list(names), batches[0]):
                if not float(scale.factor):
                    scale.factor.fill_(_fitted(backbone, scale, names[scale], batches))
                progress()
    finally:
        backbone.train(training)
    return {name: float(scale.factor) for scale, name in names.items()}


def _in_order(backbone: GemNetOC, scales: list[Scale], batch: AtomicData) -> list[Scale]:
    """The factors as the network comes to them."""
    order: list[Scale] = []
    try:
        for scale in scales:
            scale.observer = lambda found, _, __: order.append(found)
        backbone(batch)
    finally:
        for scale in scales:
            scale.observer = None
    return order


def _fitted(backbone: GemNetOC, scale: Scale, name: str, batches: Sequence[AtomicData]) -> float:
    observer = _Observer()
    scale.observer = observer
    try:
        for batch in batches:
            with contextlib.suppress(_Seen):
                backbone(batch)
    finally:
        scale.observer = None
    if not (observer.quantity > 0 and observer.reference > 0):
        raise InputError(
            f"the scale factor '{name}' cannot be fitted: what it scales is the same everywhere in these structures",
            remedy="take more structures, with neighbours, and as large and as tagged as those to train on",
        )
    return float((observer.reference / observer.quantity) ** 0.5)
