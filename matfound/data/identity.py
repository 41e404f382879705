"""Which structures are the same.

Two structures are the same here when they have the same elements, periodicity and lattice (lengths and angles of the vectors as given),
and their atoms are in the same places within a tolerance, whatever the order of the atoms, the lattice vectors added to some of them,
the choice of the origin (along periodic directions; for molecules, everywhere), and, for molecules and for crystals, a rotation of the
whole. Not the same: another choice of the lattice vectors or a supercell, a mirror image, a strained lattice.

Rounding decides nothing: structures are compared atom by atom where numbers that change little under a small change of the structure
are near each other.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from matfound.structures.atomic_data import AtomicData

#: Largest difference of a position or a lattice vector, Å.
TOLERANCE = 1e-4
#: The numbers of two structures that are the same differ by at most so many tolerances.
_SLACK = 3.0
#: Numbers that are nearer than this part of a tolerance are taken for one and the same at first.
_FINE = 1e-3
#: Groups with more structures than this are searched by a tree, over the numbers that tell most apart.
_LARGE, _TREE = 3000, 6
#: Up to so many atoms, all pairs are looked at for the nearest neighbours.
_PAIRED = 1000
#: Reflections whose amplitudes are compared.
_REFLECTIONS = np.array(
    [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1], [1, -1, 1], [2, 1, 0], [0, 2, 1]], dtype=float
)
#: Different for every element, between 1 and 2.
_WEIGHTS = 1 + np.modf(np.arange(256) * 0.6180339887498949)[0]
_AMPLITUDES = slice(6, 6 + len(_REFLECTIONS))
_NUMBERS = 6 + len(_REFLECTIONS) + 8
_MIX = np.uint64(0x9E3779B97F4A7C15)


def fingerprints(samples: Sequence[AtomicData]) -> tuple[np.ndarray, np.ndarray]:
    """What is alike for structures that are the same: a code (samples,) uint64 of elements and periodicity, and numbers (samples, 24).

    The numbers, all in Å: lengths of the periodic lattice vectors, their products by pairs over the longer one, amplitudes of ten
    reflections times the distance of their planes, and across the periodic directions the extents (roots of the eigenvalues of the
    gyration tensor, with two sets of weights), mean and largest distance from the centre. Atoms weigh by their element. Structures need
    positions.
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
        values[:, _AMPLITUDES] = _amplitudes(pos, weights, system, inverse, total)
    if not pbc.all():
        open_ = ~pbc.all(1)
        values[open_, _AMPLITUDES.stop :] = _extents(pos, weights, system, vectors, inverse, total)[open_]
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
    roots = []
    for weighted in (weights, 1 / weights**2):
        gyration = np.empty((count, 3, 3))
        for i in range(3):
            for j in range(3):
                gyration[:, i, j] = np.bincount(system, weighted * across[:, i] * across[:, j], count)
        sums = np.maximum(np.bincount(system, weighted, count), 1e-12)
        roots.append(np.sqrt(np.maximum(np.linalg.eigvalsh(gyration / sums[:, None, None]), 0)))
    distance = np.linalg.norm(across, axis=1)
    largest = np.zeros(count)
    np.maximum.at(largest, system, distance)
    return np.column_stack([*roots, np.bincount(system, weights * distance, count) / total, largest])


def first_of_each(codes: np.ndarray, values: np.ndarray, get: Callable[[int], AtomicData], tolerance: float = TOLERANCE) -> np.ndarray:
    """For each structure, the first one that is the same; itself where there is none before it. (structures,) int64.

    Args:
        codes: of `fingerprints`.
        values: of `fingerprints`.
        get: reads a structure again, to compare it atom by atom.
        tolerance: largest difference of a position or lattice vector, Å.
    """
    first = np.arange(len(codes))
    members = np.arange(len(codes))

    @functools.lru_cache(1 << 16)
    def around(k: int) -> np.ndarray:
        sample = get(k)
        found = surroundings(sample)
        return found[np.lexsort((found, sample.numbers.numpy()))]

    def alike(i: int, j: int) -> bool:
        a, b = get(i), get(j)
        found = _as_listed(a, b, tolerance)
        if found is None:
            found = bool(np.abs(around(i) - around(j)).max() <= _SLACK * tolerance) and _reordered(a, b, tolerance)
        return found

    # Copies, of which there may be thousands, are compared with the first of them alone.
    key = codes
    for axis in range(values.shape[1]):
        key = _mixed(key ^ np.rint(values[:, axis] / (_FINE * tolerance)).astype(np.int64).view(np.uint64))
    _, place, inverse = np.unique(key, return_index=True, return_inverse=True)
    for j in np.flatnonzero(place[inverse] != members).tolist():
        earlier = int(place[inverse[j]])
        if alike(earlier, j):
            first[j] = earlier
    members = np.flatnonzero(first == members)
    for i, j in _near(members, codes[members], values[members], _SLACK * tolerance):
        if first[j] == j and first[i] == i and alike(i, j):
            first[j] = i
    return first[first]


def _near(members: np.ndarray, codes: np.ndarray, values: np.ndarray, reach: float) -> list[tuple[int, int]]:
    """Pairs of members with one code whose numbers all differ by at most `reach`; by the later one, then the earlier one."""
    if not len(members):
        return []
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=codes[order[0]] + np.uint64(1)))
    spread = np.maximum.reduceat(values[order], starts) - np.minimum.reduceat(values[order], starts)
    sizes = np.diff(starts, append=len(order))
    pairs = [np.zeros((0, 2), np.int64)]
    for group in np.flatnonzero(sizes > _LARGE).tolist():
        mine = order[starts[group] : starts[group] + sizes[group]]
        pairs.append(members[mine[_tree_pairs(values[mine], reach)]])
    order = order[np.repeat(sizes <= _LARGE, sizes)]
    best = np.repeat(spread.argmax(1), sizes)[np.repeat(sizes <= _LARGE, sizes)]
    pairs.append(_window_pairs(members[order], codes[order], values[order], best, reach))
    listed = np.sort(np.concatenate(pairs), axis=1)
    listed = listed[np.lexsort((listed[:, 0], listed[:, 1]))]
    return [(int(i), int(j)) for i, j in listed]


def _tree_pairs(values: np.ndarray, reach: float) -> np.ndarray:
    """Places of pairs (pairs, 2) whose numbers all differ by at most `reach`."""
    from scipy.spatial import cKDTree

    best = np.argsort(values.min(0) - values.max(0))[:_TREE]
    pairs = cKDTree(values[:, best]).query_pairs(reach, p=np.inf, output_type="ndarray")
    for axis in range(values.shape[1]):
        pairs = pairs[np.abs(values[pairs[:, 0], axis] - values[pairs[:, 1], axis]) <= reach]
    return pairs


def _window_pairs(members: np.ndarray, codes: np.ndarray, values: np.ndarray, best: np.ndarray, reach: float) -> np.ndarray:
    """The same pairs, for small groups.

    Each group is sorted by the number that tells most apart; each member is compared with the one next to it, the
    one after that, and so on until none is near enough.
    """
    key = values[np.arange(len(values)), best]
    order = np.lexsort((key, codes))
    members, codes, values, key = members[order], codes[order], values[order], key[order]
    pairs = [np.zeros((0, 2), np.int64)]
    active = np.arange(len(members))
    step = 0
    while len(active):
        step += 1
        active = active[active < len(members) - step]
        active = active[(codes[active] == codes[active + step]) & (key[active + step] - key[active] <= reach)]
        found = active
        for axis in range(values.shape[1]):
            if not len(found):
                break
            found = found[np.abs(values[found, axis] - values[found + step, axis]) <= reach]
        pairs.append(np.column_stack([members[found], members[found + step]]))
    return np.concatenate(pairs)


def same(a: AtomicData, b: AtomicData, tolerance: float = TOLERANCE) -> bool:
    """Whether two structures with positions are the same (see the module), within `tolerance` in Å."""
    found = _as_listed(a, b, tolerance)
    return _reordered(a, b, tolerance) if found is None else found


def surroundings(data: AtomicData) -> np.ndarray:
    """A number (atoms,) in Å of each atom that changes little under a small change of the structure.

    Without periodicity, the distance from the centre. Else that of the nearest neighbour, as far as the lattice is wide enough to tell.
    """
    numbers, pos, pbc = data.numbers.numpy(), data.pos.numpy(), data.pbc[0].numpy()
    if not pbc.any():
        weights = _WEIGHTS[numbers]
        values = np.linalg.norm(pos - weights @ pos / max(float(weights.sum()), 1e-12), axis=1)
    elif len(numbers) > _PAIRED:
        values = np.zeros(len(numbers))
    else:
        vectors = data.cell[0].numpy() * pbc[:, None]
        inverse = _inverse(vectors[None])[0]
        # A neighbour nearer than half the distance of the lattice planes is the one that rounding finds.
        width = 0.49 / np.linalg.norm(inverse, axis=0)[pbc].max()
        between = pos[:, None] - pos[None]
        between -= np.rint(between @ inverse) @ vectors
        distance = np.sqrt((between**2).sum(2))
        np.fill_diagonal(distance, np.inf)
        values = np.minimum(distance.min(1), width)
    return values


def _as_listed(a: AtomicData, b: AtomicData, tolerance: float) -> bool | None:
    """Whether two structures are the same with their atoms in the order that they have; None where another order may do."""
    pbc = a.pbc[0].numpy()
    elements, others = a.numbers.numpy(), b.numbers.numpy()
    if len(elements) != len(others) or (pbc != b.pbc[0].numpy()).any() or (np.sort(elements) != np.sort(others)).any():
        return False
    if not len(elements):
        return True
    listed = bool((elements == others).all())
    if not pbc.any():
        return True if listed and _turned(_centred(a), _centred(b), tolerance) else None
    mine, theirs = a.cell[0].numpy() * pbc[:, None], b.cell[0].numpy() * pbc[:, None]
    if pbc.all():
        if np.abs(_metric(mine) - _metric(theirs)).max() > 2 * tolerance or np.linalg.det(mine) * np.linalg.det(theirs) < 0:
            return False
    elif np.abs(mine - theirs).max() > tolerance:
        return False
    return True if listed and _fits(_Crystal(a), _Crystal(b), np.arange(len(elements)), 0, 0, tolerance) else None


def _reordered(a: AtomicData, b: AtomicData, tolerance: float) -> bool:
    """Whether two structures of the same elements and lattice are the same with their atoms in some order."""
    elements, others = a.numbers.numpy(), b.numbers.numpy()
    if not a.pbc.any():
        return _same_molecule(_centred(a), _centred(b), elements, others, tolerance)
    kinds, other_kinds = surroundings(a), surroundings(b)
    reach = _SLACK * tolerance
    alike = ((elements[:, None] == elements) & (np.abs(kinds[:, None] - kinds) <= reach)).sum(1)
    anchor = int(alike.argmin())  # an atom with few like it has few partners to try
    partners = np.flatnonzero((others == elements[anchor]) & (np.abs(other_kinds - kinds[anchor]) <= reach))
    return _same_lattice(_Crystal(a), _Crystal(b), elements, others, anchor, partners, tolerance)


def _centred(data: AtomicData) -> np.ndarray:
    pos, weights = data.pos.numpy(), _WEIGHTS[data.numbers.numpy()]
    centred: np.ndarray = pos - weights @ pos / weights.sum()
    return centred


def _metric(cell: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(cell, axis=1)
    return np.concatenate([lengths, [cell[i] @ cell[j] / max(lengths[i], lengths[j]) for i, j in ((1, 2), (0, 2), (0, 1))]])


class _Crystal:
    """Fractional coordinates along the periodic vectors, and what is left across them."""

    def __init__(self, data: AtomicData) -> None:
        pos, vectors = data.pos.numpy(), data.cell[0].numpy() * data.pbc[0].numpy()[:, None]
        self.vectors = vectors
        self.inside = pos @ _inverse(vectors[None])[0]
        self.across = pos - self.inside @ vectors


def _same_lattice(
    a: _Crystal, b: _Crystal, elements: np.ndarray, others: np.ndarray, anchor: int, partners: np.ndarray, tolerance: float
) -> bool:
    for partner in _partners(a, b, elements, others, anchor, partners, 3 * tolerance).tolist():
        order = _matched(a, b, elements, others, anchor, partner, 3 * tolerance)
        if order is not None and _fits(a, b, order, anchor, int(partner), tolerance):
            return True
    return False


def _partners(
    a: _Crystal, b: _Crystal, elements: np.ndarray, others: np.ndarray, anchor: int, partners: np.ndarray, reach: float
) -> np.ndarray:
    """The partners in `b` from which a few further atoms are where they are from the anchor in `a`."""
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


def _same_molecule(a: np.ndarray, b: np.ndarray, elements: np.ndarray, others: np.ndarray, tolerance: float) -> bool:
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
