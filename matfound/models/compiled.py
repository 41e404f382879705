"""A potential's forward pass compiled as one function: energy, and its derivatives inside.

Forces are derivatives, and training on forces differentiates them again. Compiling the energy alone, and differentiating the compiled
function twice, fails, or gives wrong gradients of the parameters without a word, depending on torch's version. So the compiled function
takes the edge vectors as inputs that require gradients and calls `torch.autograd.grad` itself; only the loss's backward pass stays outside.
"""

from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from matfound.errors import InputError
from matfound.fields import FIELDS, graph_key
from matfound.nn.gradients import leaf_vectors
from matfound.structures.atomic_data import AtomicData

if TYPE_CHECKING:
    from matfound.models.base import Potential

#: Sizes of which torch.compile makes constants: not worth a function of their own.
SPECIAL_SIZES = (0, 1)
#: What torch may compile anew for one model: for training and not, one structure and many, other devices and types.
RECOMPILATIONS = 32
#: Sums of fewer terms are written out: those over x, y, z and over radial functions.
UNROLLED = 33


def is_possible() -> bool:
    """Whether this torch can trace derivatives."""
    return hasattr(torch._dynamo.config, "trace_autograd_ops")


class CompiledForward:
    """`Potential.predict` through torch.compile, for batches of all sizes.

    The first batch of each device and type is not compiled, so that operations have their constants, nor is one without atoms or edges,
    or with one.

    Args:
        backend: of torch.compile.
    """

    def __init__(self, backend: str = "inductor") -> None:
        # torch counts recompilations of a code object, whoever it was compiled for: each model has one of its own.
        own = FunctionType(_predict.__code__.replace(), _predict.__globals__, closure=_predict.__closure__)
        # Triton 3.6 cannot compile sums over a few columns that are fused with sums over three: written out, there are none.
        options: dict[str, Any] | None = {"unroll_reductions_threshold": UNROLLED} if backend == "inductor" else None
        self.function = torch.compile(own, fullgraph=True, dynamic=True, backend=backend, options=options)
        self.backend = backend
        self.known: set[tuple[torch.device, torch.dtype, bool]] = set()

    def __reduce__(self) -> tuple[type["CompiledForward"], tuple[str]]:
        # A copy of a model compiles for itself.
        return CompiledForward, (self.backend,)

    def __call__(self, potential: "Potential", batch: AtomicData) -> dict[str, Tensor]:
        """Predictions of a batch.

        Raises:
            InputError: the model cannot be compiled.
        """
        kind = (batch.numbers.device, potential.dtype, torch.is_autocast_enabled(batch.numbers.device.type))
        sizes = [batch.num_nodes, *(batch[graph_key("edge_index", name)].shape[1] for name in potential.graphs)]
        if kind not in self.known or any(size in SPECIAL_SIZES for size in sizes):
            self.known.add(kind)
            return potential.predict(batch)
        with torch._dynamo.config.patch({"trace_autograd_ops": True, "recompile_limit": RECOMPILATIONS}):
            try:
                return self.function(potential, inputs(potential, batch))
            except torch._dynamo.exc.TorchDynamoException as error:
                reason = str(error).strip().partition("\n")[0]
                raise InputError(f"the model cannot be compiled: {reason}", remedy="use it without compile") from error


def inputs(potential: "Potential", batch: AtomicData) -> dict[str, Tensor]:
    """What a model reads of a batch: everything but labels; and the edge vectors, which require gradients."""
    found = {
        name: value
        for name, value in batch
        if isinstance(value, Tensor) and not getattr(FIELDS.get(name.partition("@")[0]), "label", False)
    }
    return found | {graph_key("edge_vectors", name): leaf_vectors(batch, name) for name in potential.graphs}


def _predict(potential, tensors):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    return potential.predict(AtomicData(**tensors))
