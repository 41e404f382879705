"""What looks wrong with many structures at once: atoms that overlap, energies far from others."""

from collections.abc import Sequence

import numpy as np

from matfound.errors import InputError
from matfound.structures.atomic_data import AtomicData

#: Atoms nearer than this overlap: H2, the shortest bond, has 0.74 Å.
OVERLAP = 0.5
#: An energy is an outlier when it is so many median absolute deviations off what its kind has, and ...
OUTLIER_MADS = 30.0
#: ... at least this many eV/atom off the median of its own formula, or off fitted element references. Bonds are worth a few eV/atom;
#: hartrees taken for electronvolts, or totals for energies per atom, are far beyond both.
OUTLIER_FORMULA, OUTLIER_ELEMENTS = 2.0, 20.0
#: Formulas with fewer frames than this have no median to compare with.
_FEW = 8
#: Up to so many atoms, comparing all pairs is faster than a neighbour search.
_ALL_PAIRS = 300
#: Pairs that are looked at together.
_TOGETHER = 1 << 20


def overlapping(samples: Sequence[AtomicData]) -> np.ndarray:
    """Mask (samples,) of the structures in which two atoms, or an atom and an image of itself, are nearer than `OVERLAP`."""
    found = np.zeros(len(samples), bool)
    if not samples:
        return found
    sizes = np.array([sample.num_nodes for sample in samples])
    pbc = np.concatenate([sample.pbc.numpy() for sample in samples])
    vectors = np.concatenate([sample.cell.numpy() for sample in samples]) * pbc[:, :, None]
    inverse = np.linalg.pinv(vectors)
    length = np.linalg.norm(inverse, axis=1)
    spacing = np.divide(1, length, out=np.full_like(length, np.inf), where=length > 0)  # of the lattice planes
    search = np.asarray((sizes > _ALL_PAIRS) | (spacing < 2 * OVERLAP).any(1))
    for i in np.flatnonzero(np.logical_and(search, sizes > 0)).tolist():
        found[i] = _has_near_pair(samples[i])
    rest = np.flatnonzero(np.logical_not(search))
    for size in np.unique(sizes[rest]).tolist():
        alike = rest[sizes[rest] == size]
        step = max(1, _TOGETHER // max(size * size, 1))
        for rows in np.split(alike, range(step, len(alike), step)) if size > 1 else ():
            pos = np.stack([samples[i].pos.numpy() for i in rows.tolist()])
            found[rows] = _near_pairs(pos, pbc[rows], vectors[rows], inverse[rows], spacing[rows])
    return found


def _has_near_pair(sample: AtomicData) -> bool:
    from matfound.graphs.neighbors import radius_graph
    from matfound.graphs.spec import GraphSpec

    try:
        return radius_graph(sample.pos, sample.cell[0], sample.pbc[0], GraphSpec(cutoff=OVERLAP)).edge_index.shape[1] > 0
    except InputError:  # two atoms in one place
        return True


def _near_pairs(pos: np.ndarray, pbc: np.ndarray, vectors: np.ndarray, inverse: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """For structures (systems, atoms, 3) of one size, whose lattice planes are at least 2 `OVERLAP` apart: which have a near pair."""
    systems = np.arange(len(pos))
    periodic = np.asarray(pbc.any(1))
    axis = np.where(periodic, pbc.argmax(1), 0)
    # Near atoms are near along one axis: this leaves few pairs.
    along = np.where(periodic[:, None], np.einsum("sai,si->sa", pos, inverse[systems, :, axis]), pos[:, :, 0])
    between = along[:, :, None] - along[:, None, :]
    between -= np.where(periodic[:, None, None], np.rint(between), 0)
    scale = np.where(periodic, spacing[systems, axis], 1.0)
    system, source, target = np.nonzero(np.abs(between) < (OVERLAP / scale)[:, None, None])
    once = source < target
    system, source, target = system[once], source[once], target[once]
    away = pos[system, source] - pos[system, target]
    # With lattice planes this far apart, the nearest image of a near pair is the one that rounding finds.
    away -= np.einsum("pi,pij->pj", np.rint(np.einsum("pi,pij->pj", away, inverse[system])), vectors[system])
    near = (away**2).sum(1) < OVERLAP**2
    return np.bincount(system[near], minlength=len(pos)) > 0


def energy_outliers(frames: np.ndarray, energies: np.ndarray, kinds: np.ndarray, compositions: np.ndarray) -> dict[int, float]:
    """Frames whose energy is far from what frames of the same formula, or fitted element references, say; and how far (eV/atom).

    References are fitted by iteratively reweighted least squares (absolute deviations), so that outliers do not draw the fit.

    Args:
        frames: (frames,) their numbers.
        energies: (frames,) eV.
        kinds: (frames,) the row of each in `compositions`.
        compositions: (kinds, elements) atoms of each element.
    """
    if not len(frames):
        return {}
    natoms = compositions.sum(1)
    fractions = compositions / np.maximum(natoms, 1)[:, None]
    present = np.unique(kinds)
    elements = int((compositions[present] > 0).any(0).sum())
    target = energies / natoms[kinds]
    found: dict[int, float] = {}
    if len(frames) >= max(20, 2 * elements):
        rows = fractions[kinds]
        weight = np.ones(len(frames))
        for _ in range(10):
            solution = np.linalg.lstsq(rows * weight[:, None], target * weight, rcond=None)[0]
            residual = target - rows @ solution
            weight = 1 / np.sqrt(np.maximum(np.abs(residual), 1e-3))
        found |= _far(frames, residual, OUTLIER_ELEMENTS)
    _, formulas = np.unique(fractions, axis=0, return_inverse=True)
    formula = formulas.ravel()[kinds]
    order = np.argsort(formula, kind="stable")
    counts = np.bincount(formula)
    ends = np.cumsum(counts)
    for kind in np.flatnonzero(counts >= _FEW).tolist():
        rows = order[ends[kind] - counts[kind] : ends[kind]]
        found |= _far(frames[rows], target[rows], OUTLIER_FORMULA)
    return dict(sorted(found.items(), key=lambda item: -abs(item[1])))


def _far(frames: np.ndarray, values: np.ndarray, least: float) -> dict[int, float]:
    off = values - np.median(values)
    limit = max(least, OUTLIER_MADS * float(np.median(np.abs(off))))
    return {int(frames[k]): float(off[k]) for k in np.flatnonzero(np.abs(off) > limit)}
