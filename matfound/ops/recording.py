"""CUDA graphs: what functions do on a GPU, recorded once and replayed with one launch each."""

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """One for all recordings on a device: libraries keep working memory for every stream that they have ever seen."""
    return torch.cuda.Stream(device)


def recorded(functions: Sequence[Callable[[], None]], device: torch.device, *, warm_ups: int = 1) -> list[Callable[[], None]]:
    """What functions do to tensors on the device, each as a CUDA graph; on a CPU the functions themselves.

    All are called in their order `warm_ups` times first. Their graphs share memory: they must be replayed in that order. The present
    device must be this one.

    Raises:
        RuntimeError: something cannot be recorded, or the memory does not suffice.
    """
    if device.type != "cuda":
        return list(functions)
    outside, beside = torch.cuda.current_stream(), _stream(torch.cuda.current_device())
    graphs: list[torch.cuda.CUDAGraph] = []
    beside.wait_stream(outside)
    with torch.cuda.stream(beside):
        for _ in range(warm_ups):
            for function in functions:
                function()
        torch.cuda.synchronize()
        for function in functions:
            graph = torch.cuda.CUDAGraph()
            # Not `torch.cuda.graph`, which empties torch's cache of memory first: the structures of a run are recorded one after the other.
            graph.capture_begin(graphs[0].pool() if graphs else None)
            try:
                function()
            except BaseException:
                with suppress(RuntimeError):  # what it would say follows from the error that there is
                    graph.capture_end()
                raise
            graph.capture_end()
            graphs.append(graph)
    outside.wait_stream(beside)
    return [graph.replay for graph in graphs]
