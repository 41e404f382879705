"""Which structures are the same.

Two structures are the same here when they have the same elements, periodicity and lattice (lengths and angles of the vectors as given),
and their atoms are in the same places within a tolerance, whatever the order of the atoms, the lattice vectors added to some of them,
the choice of the origin (along periodic directions; for molecules, everywhere), and, for molecules and for crystals, a rotation of the
whole. Not the same: another choice of the lattice vectors or a supercell, a mirror image, a strained lattice.

Rounding decides nothing: numbers that change by less than a known amount under a small change of the structure are sorted into
buckets much wider than that, neighbouring buckets are looked at where a number is near an edge, and what shares a bucket is compared
atom by atom.
"""

from collections.abc import Callable, Sequence

import numpy as np

from matfound.structures.atomic_data import AtomicData

#: Largest difference of a position or a lattice vector, Å.
TOLERANCE = 1e-4
#: The numbers of two structures that are the same differ by at most so many tolerances, and ...
_SLACK = 8.0
#: ... buckets are so many tolerances wide.
_WIDTH = 256.0
#: Reflections whose amplitudes are compared.
_REFLECTIONS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]], dtype=float)
#: Different for every element, between 1 and 2.
_WEIGHTS = 1 + np.modf(np.arange(256) * 0.6180339887498949)[0]
_NUMBERS = 15
#: Which of the numbers make the bucket.
_BUCKET = (0, 1, 2, 6, 7, 9, 10, 11, 13, 14)
_MIX = np.uint64(0x9E3779B97F4A7C15)


def fingerprints(samples: Sequence[AtomicData]) -> tuple[np.ndarray, np.ndarray]:
    """What is alike for structures that are the same: a code (samples,) uint64 of elements and periodicity, and numbers (samples, 15).

    The numbers, all in Å: lengths of the periodic lattice vectors, their products by pairs over the longer one, amplitudes of four
    reflections times the distance of their planes, and across the periodic directions the extents (roots of the eigenvalues of the
    gyration tensor), mean and largest distance from the centre. Atoms weigh by their element. Structures need positions.
    """
    if not samples:
        return np.zeros(0, np.uint64), np.zeros((0, _NUMBERS))
    sizes = np.array([sample.num_nodes for sample in samples])
    numbers = np.concatenate([sample.numbers.numpy() for sample in samples])
    pos = np.concatenate([sample.pos.numpy() for sample in samples])
    pbc = np.concatenate([sample.pbc.numpy() for sample in samples])
    vectors = np.concatenate([sample.cell.numpy() for sample in samples]) * pbc[:, :, None]
    system = np.repeat(np.arange(len(samples)), sizes)
    code = np.zeros(len(samples), np.uint64)
    np.add.at(code, system, _mixed(numbers.astype(np.uint64)))
    code = _mixed(code + pbc @ np.array([1, 2, 4], np.uint64))

    values = np.zeros((len(samples), _NUMBERS))
    lengths = np.linalg.norm(vectors, axis=2)
    values[:, :3] = lengths
    for place, (i, j) in enumerate(((1, 2), (0, 2), (0, 1)), start=3):
        longer = np.maximum(np.maximum(lengths[:, i], lengths[:, j]), 1e-12)
        values[:, place] = (vectors[:, i] * vectors[:, j]).sum(1) / longer
    weights = _WEIGHTS[numbers]
    total = np.maximum(np.bincount(system, weights, len(samples)), 1e-12)
    inverse = _inverse(vectors)
    periodic = pbc.any(1)
    if periodic.any():
        values[:, 6:10] = _amplitudes(pos, weights, system, inverse, total)
    if not pbc.all():
        open_ = ~pbc.all(1)
        values[open_, 10:] = _extents(pos, weights, system, vectors, inverse, total)[open_]
    return code, values


def _mixed(values: np.ndarray) -> np.ndarray:
    """Well mixed 64 bits of each number (the finaliser of SplitMix64: Steele, Lea and Flood, OOPSLA 2014)."""
    mixed = (values + np.uint64(1)) * _MIX
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _inverse(vectors: np.ndarray) -> np.ndarray:
    """What turns positions into fractional coordinates along the lattice vectors that are not zero."""
    inverse = np.zeros_like(vectors)
    full = (vectors != 0).any(2).all(1)
    if full.any():
        inverse[full] = np.linalg.inv(vectors[full])
    some = ~full & (vectors != 0).any((1, 2))
    if some.any():
        inverse[some] = np.linalg.pinv(vectors[some])
    return inverse


def _amplitudes(pos: np.ndarray, weights: np.ndarray, system: np.ndarray, inverse: np.ndarray, total: np.ndarray) -> np.ndarray:
    waves = np.einsum("sij,kj->ski", inverse, _REFLECTIONS)  # pos @ wave = k · fractional coordinates
    length = np.linalg.norm(waves, axis=2)
    spacing = np.divide(1, length, out=np.zeros_like(length), where=length > 1e-12)
    phases = 2 * np.pi * np.einsum("ai,aki->ak", pos, waves[system])
    found = np.empty_like(spacing)
    for k in range(len(_REFLECTIONS)):
        real = np.bincount(system, weights * np.cos(phases[:, k]), len(total))
        imaginary = np.bincount(system, weights * np.sin(phases[:, k]), len(total))
        found[:, k] = np.hypot(real, imaginary) / total
    return found * spacing / (2 * np.pi)


def _extents(
    pos: np.ndarray, weights: np.ndarray, system: np.ndarray, vectors: np.ndarray, inverse: np.ndarray, total: np.ndarray
) -> np.ndarray:
    count = len(total)
    across = pos - np.einsum("ai,aij->aj", pos, (inverse @ vectors)[system])
    centre = np.stack([np.bincount(system, weights * across[:, axis], count) for axis in range(3)], 1) / total[:, None]
    across -= centre[system]
    gyration = np.empty((count, 3, 3))
    for i in range(3):
        for j in range(3):
            gyration[:, i, j] = np.bincount(system, weights * across[:, i] * across[:, j], count) / total
    distance = np.linalg.norm(across, axis=1)
    largest = np.zeros(count)
    np.maximum.at(largest, system, distance)
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh(gyration), 0))
    return np.column_stack([roots, np.bincount(system, weights * distance, count) / total, largest])


def first_of_each(codes: np.ndarray, values: np.ndarray, get: Callable[[int], AtomicData], tolerance: float = TOLERANCE) -> np.ndarray:
    """For each structure, the first one that is the same; itself where there is none before it. (structures,) int64.

    Args:
        codes: of `fingerprints`.
        values: of `fingerprints`.
        get: reads a structure again, to compare it atom by atom.
        tolerance: largest difference of a position or lattice vector, Å.
    """
    first = np.arange(len(codes))
    own, rows, keys = _buckets(codes, values, tolerance)
    known, counts = np.unique(own, return_counts=True)
    place = np.minimum(np.searchsorted(known, keys), max(len(known) - 1, 0))
    shared = (known[place] == keys) & ((keys != own[rows]) | (counts[place] > 1)) if len(known) else np.zeros(0, bool)
    wanted: dict[int, list[int]] = {}
    for row, key in zip(rows[shared].tolist(), keys[shared].tolist(), strict=True):
        wanted.setdefault(row, []).append(key)
    touched = np.isin(own, keys[shared])
    firsts: dict[int, list[int]] = {}
    for i in np.flatnonzero(touched | np.isin(first, rows[shared])).tolist():
        candidates = [j for key in wanted.get(i, ()) for j in firsts.get(key, ())]
        if candidates:
            near = np.abs(values[candidates] - values[i]).max(1) <= _SLACK * tolerance
            mine = get(i) if near.any() else None
            for j in sorted({j for j, close in zip(candidates, near, strict=True) if close}):
                if codes[i] == codes[j] and mine is not None and same(get(j), mine, tolerance):
                    first[i] = j
                    break
        if first[i] == i:
            firsts.setdefault(int(own[i]), []).append(i)
    return first


def _buckets(codes: np.ndarray, values: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bucket of each structure; and structures with all buckets that a structure that is the same can be in."""
    scaled = values[:, _BUCKET] / (_WIDTH * tolerance) + 0.5
    cells = np.floor(scaled)
    inside = scaled - cells
    margin = _SLACK / _WIDTH
    rows, reached = np.arange(len(codes)), cells
    for axis in range(cells.shape[1]):
        below, above = inside[rows, axis] < margin, inside[rows, axis] > 1 - margin
        beside = np.where(below, -1.0, 1.0)[below | above]
        more = reached[below | above].copy()
        more[:, axis] += beside
        rows = np.concatenate([rows, rows[below | above]])
        reached = np.concatenate([reached, more])
    return _key(codes, cells), rows, _key(codes[rows], reached)


def _key(codes: np.ndarray, cells: np.ndarray) -> np.ndarray:
    key = codes.copy()
    for axis in range(cells.shape[1]):
        key = _mixed(key ^ cells[:, axis].astype(np.int64).view(np.uint64))
    return key


def same(a: AtomicData, b: AtomicData, tolerance: float = TOLERANCE) -> bool:
    """Whether two structures with positions are the same (see the module), within `tolerance` in Å."""
    pbc = a.pbc[0].numpy()
    elements, others = a.numbers.numpy(), b.numbers.numpy()
    if len(elements) != len(others) or (pbc != b.pbc[0].numpy()).any() or (np.sort(elements) != np.sort(others)).any():
        return False
    if not len(elements):
        return True
    if not pbc.any():
        return _same_molecule(a.pos.numpy(), b.pos.numpy(), elements, others, tolerance)
    mine, theirs = a.cell[0].numpy() * pbc[:, None], b.cell[0].numpy() * pbc[:, None]
    if pbc.all():
        edges, other_edges = _metric(mine), _metric(theirs)
        if np.abs(edges - other_edges).max() > _SLACK * tolerance or np.linalg.det(mine) * np.linalg.det(theirs) < 0:
            return False
    elif np.abs(mine - theirs).max() > tolerance:
        return False
    return _same_lattice(_Crystal(a.pos.numpy(), mine), _Crystal(b.pos.numpy(), theirs), elements, others, tolerance)


def _metric(cell: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(cell, axis=1)
    return np.concatenate([lengths, [cell[i] @ cell[j] / max(lengths[i], lengths[j]) for i, j in ((1, 2), (0, 2), (0, 1))]])


class _Crystal:
    """Fractional coordinates along the periodic vectors, and what is left across them."""

    def __init__(self, pos: np.ndarray, vectors: np.ndarray) -> None:
        inverse = _inverse(vectors[None])[0]
        self.vectors = vectors
        self.inside = pos @ inverse
        self.across = pos - self.inside @ vectors


def _same_lattice(a: _Crystal, b: _Crystal, elements: np.ndarray, others: np.ndarray, tolerance: float) -> bool:
    if (elements == others).all() and _fits(a, b, np.arange(len(elements)), 0, 0, tolerance):
        return True
    symbols, counts = np.unique(elements, return_counts=True)
    rarest = symbols[counts.argmin()]
    anchor = int(np.flatnonzero(elements == rarest)[0])
    for partner in _partners(a, b, elements, others, anchor, 3 * tolerance).tolist():
        order = _matched(a, b, elements, others, anchor, partner, 3 * tolerance)
        if order is not None and _fits(a, b, order, anchor, int(partner), tolerance):
            return True
    return False


def _partners(a: _Crystal, b: _Crystal, elements: np.ndarray, others: np.ndarray, anchor: int, reach: float) -> np.ndarray:
    """The atoms of `b` from which a few further atoms are where they are from the anchor in `a`."""
    partners = np.flatnonzero(others == elements[anchor])
    for probe in {len(elements) // 3, len(elements) // 2, len(elements) - 1}:
        theirs = np.flatnonzero(others == elements[probe])
        between = (a.inside[probe] - a.inside[anchor]) - (b.inside[theirs][None] - b.inside[partners][:, None])
        between -= np.rint(between)
        away = between @ b.vectors + (a.across[probe] - a.across[anchor]) - (b.across[theirs][None] - b.across[partners][:, None])
        partners = partners[(away**2).sum(2).min(1) <= reach**2]
    return partners


def _matched(
    a: _Crystal, b: _Crystal, elements: np.ndarray, others: np.ndarray, anchor: int, partner: int, reach: float
) -> np.ndarray | None:
    """The atom of `b` in the place of each atom of `a` when two atoms are put in one place; None where there is none."""
    order = np.full(len(elements), -1)
    for element in np.unique(elements):
        mine, theirs = np.flatnonzero(elements == element), np.flatnonzero(others == element)
        between = (a.inside[mine] - a.inside[anchor])[:, None] - (b.inside[theirs] - b.inside[partner])[None]
        between -= np.rint(between)
        away = between @ b.vectors + (a.across[mine] - a.across[anchor])[:, None] - (b.across[theirs] - b.across[partner])[None]
        squared = (away**2).sum(2)
        nearest = squared.argmin(1)
        if (squared[np.arange(len(mine)), nearest] > reach**2).any() or len(set(nearest.tolist())) < len(mine):
            return None
        order[mine] = theirs[nearest]
    return order


def _fits(a: _Crystal, b: _Crystal, order: np.ndarray, anchor: int, partner: int, tolerance: float) -> bool:
    """Whether atom i of `a` and atom order[i] of `b` are in one place for all i, for the best common shift."""
    between = (a.inside - a.inside[anchor]) - (b.inside[order] - b.inside[partner])
    between -= np.rint(between)
    away = between @ b.vectors + (a.across - a.across[anchor]) - (b.across[order] - b.across[partner])
    away -= away.mean(0)
    return bool((away**2).sum(1).max() <= tolerance**2)


def _same_molecule(pos: np.ndarray, other: np.ndarray, elements: np.ndarray, others: np.ndarray, tolerance: float) -> bool:
    weights, other_weights = _WEIGHTS[elements], _WEIGHTS[others]
    a = pos - weights @ pos / weights.sum()
    b = other - other_weights @ other / other_weights.sum()
    if (elements == others).all() and _turned(a, b, tolerance):
        return True
    first, second = _references(a, elements)
    radius, other_radius = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    reach = 4 * tolerance

    def alike(atom: int) -> list[int]:
        return np.flatnonzero((others == elements[atom]) & (np.abs(other_radius - radius[atom]) <= reach)).tolist()

    apart = np.linalg.norm(a[first] - a[second])
    for p in alike(first):
        for q in alike(second):
            if (p == q) != (first == second) or abs(np.linalg.norm(b[p] - b[q]) - apart) > reach:
                continue
            order = _nearest(a @ _frame(a[first], a[second]), b @ _frame(b[p], b[q]), elements, others)
            if order is not None and _turned(a, b[order], tolerance):
                return True
    return False


def _references(pos: np.ndarray, elements: np.ndarray) -> tuple[int, int]:
    """Two atoms that fix the orientation, out of line with the centre where there are such, and with few like them."""
    radius = np.linalg.norm(pos, axis=1)
    alike = ((elements[:, None] == elements) & (np.abs(radius[:, None] - radius) < 0.05)).sum(1)
    first = int(min(range(len(pos)), key=lambda atom: (radius[atom] < 0.1, alike[atom], -radius[atom])))
    off = np.linalg.norm(np.cross(pos, pos[first] / max(float(radius[first]), 1e-12)), axis=1)
    second = int(min(range(len(pos)), key=lambda atom: (off[atom] < 0.1, alike[atom], -off[atom])))
    return first, second if off[second] > 1e-3 else first


def _frame(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Columns: the direction of the first vector, the direction of the second across it, and the one across both."""
    x = first / max(float(np.linalg.norm(first)), 1e-12)
    y = second - (second @ x) * x
    if np.linalg.norm(y) < 1e-6:  # everything in one line: any direction across it
        y = np.eye(3)[np.abs(x).argmin()]
        y = y - (y @ x) * x
    y = y / np.linalg.norm(y)
    return np.stack([x, y, np.cross(x, y)], axis=1)


def _nearest(a: np.ndarray, b: np.ndarray, elements: np.ndarray, others: np.ndarray) -> np.ndarray | None:
    """The nearest atom of `b` of the same element, for each of `a`; None where two have the same."""
    squared = ((a[:, None] - b[None]) ** 2).sum(2)
    squared[elements[:, None] != others[None]] = np.inf
    order = squared.argmin(1)
    return order if len(set(order.tolist())) == len(order) else None


def _turned(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    """Whether a rotation puts every atom of `b` on the one of `a` (Kabsch, Acta Cryst. A 1976, 32, 922); both centred."""
    if (((a - b) ** 2).sum(1) <= tolerance**2).all():
        return True
    left, _, right = np.linalg.svd(b.T @ a)
    flip = np.diag([1.0, 1.0, np.sign(np.linalg.det(left @ right)) or 1.0])
    return bool((((a - b @ left @ flip @ right) ** 2).sum(1) <= tolerance**2).all())
