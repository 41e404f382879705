"""What graph a model was trained on."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class GraphSpec:
    """A radius graph over periodic images.

    Edges run from source to target; an edge exists where the distance is below `cutoff`; an atom is its own neighbour only through
    another lattice image.

    Args:
        cutoff: radius in Å.
        max_neighbors: keep at most so many nearest sources for each target; None keeps all.
        strict: with `max_neighbors`, True keeps exactly that many (ties broken by source, then shift), False keeps every source
            whose squared distance is at most `tie_tolerance` beyond that of the first one that would be cut off (number
            `max_neighbors` + 1, which is kept too), so that symmetry-equivalent neighbours stay together. This is fairchem's rule.
        tie_tolerance: width of a tie in Å^2, a difference of squared distances.
        tie_squared: False for a width in Å, a difference of distances: fairchem's rule for a graph that is a part of another.
    """

    cutoff: float
    max_neighbors: int | None = None
    strict: bool = True
    tie_tolerance: float = 0.01
    tie_squared: bool = True

    def __post_init__(self) -> None:
        if not self.cutoff > 0:
            raise ValueError(f"cutoff must be positive, received {self.cutoff}")
        if self.max_neighbors is not None and self.max_neighbors < 1:
            raise ValueError(f"max_neighbors must be at least 1 or None, received {self.max_neighbors}")
