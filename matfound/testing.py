"""Checks that any model, layer or op can be put through in one line; they raise AssertionError and say what is off.

>>> from matfound.testing import check_model
>>> check_model(potential)  # doctest: +SKIP
"""

from collections.abc import Callable, Sequence

import ase
import numpy as np
import torch
from ase.data import covalent_radii
from e3nn.o3 import Irrep, Irreps, rand_matrix
from jaxtyping import Float
from torch import Tensor

from matfound.fields import FIELDS
from matfound.graphs.neighbors import add_graphs
from matfound.inference.replay import Replay, is_possible
from matfound.models.base import Potential
from matfound.nn.so3.harmonics import spherical_harmonics
from matfound.nn.so3.layout import from_e3nn, to_e3nn
from matfound.structures.ase import from_atoms
from matfound.structures.atomic_data import AtomicData, collate


def random_crystal(seed: int, natoms: int = 8, numbers: Sequence[int] = (8, 12, 22), *, pbc: bool | Sequence[bool] = True) -> ase.Atoms:
    """A random, skewed, densely filled cell whose atoms do not overlap: nothing in it is symmetric.

    Args:
        seed: of the random numbers.
        natoms: how many.
        numbers: elements to draw from; each occurs if there are enough atoms.
        pbc: periodic directions.
    """
    rng = np.random.default_rng(seed)
    species = np.array([*numbers, *rng.choice(numbers, max(0, natoms - len(numbers)))])[:natoms]
    volume = max(1.0, float((4 / 3 * np.pi * (1.2 * covalent_radii[species]) ** 3).sum()))
    cell = np.eye(3) + rng.uniform(-0.25, 0.25, (3, 3))
    cell *= (volume / abs(np.linalg.det(cell))) ** (1 / 3)
    positions = rng.uniform(size=(natoms, 3)) @ cell
    atoms = ase.Atoms(numbers=species, positions=positions, cell=cell, pbc=pbc)
    for _ in range(200):  # push overlapping atoms apart
        vectors = atoms.get_all_distances(mic=True, vector=True)
        r = np.linalg.norm(vectors, axis=-1) + 10 * np.eye(natoms)
        close = 0.8 * (covalent_radii[species][:, None] + covalent_radii[species][None])
        push = np.clip(close - r, 0, None)
        if not push.any():
            break
        atoms.positions -= 0.3 * (push[..., None] * vectors / r[..., None]).sum(axis=1)
    return atoms


def default_structures(potential: Potential) -> list[ase.Atoms]:
    """A crystal, a skewed cell smaller than the cutoff, a slab and a molecule of elements that the model knows."""
    known = sorted(potential.elements(0))
    numbers = known[:: max(1, len(known) // 3)][:3]
    molecule = random_crystal(3, 5, numbers, pbc=False)
    molecule.cell[:] = 0
    return [random_crystal(0, 8, numbers), random_crystal(1, 2, numbers), random_crystal(2, 6, numbers, pbc=(True, True, False)), molecule]


def check_model(potential: Potential, structures: Sequence[ase.Atoms] | None = None) -> None:
    """Everything that a model declares, no more and no less, in float64.

    Shapes and finite values; batch = single; translation, permutation and rotation (and reflection for "E3"); forces and stress against
    finite differences where it is conservative; a supercell's energy; continuity at the cutoff; structures with no edge and no atom; edges
    beyond the cutoff where it declares that they are nothing.

    Args:
        potential: is cast to float64 and put in eval mode for the checks, and put back afterwards. Element references that nothing has
            set yet are 0 meanwhile, so that an untrained model can be checked.
        structures: to try; default: `default_structures`.
    """
    dtype, training = potential.dtype, potential.training
    potential.double().eval()
    unfit = _without_references(potential)
    try:
        for table in unfit:
            table[:, sorted(potential.backbone.elements)] = 0.0
        for atoms in structures if structures is not None else default_structures(potential):
            check_outputs(potential, atoms)
            check_symmetry(potential, atoms)
            if potential.conservative:
                check_gradients(potential, atoms)
            if atoms.pbc.all() and "energy" in potential.outputs:
                check_supercell(potential, atoms)
        chosen = list(structures if structures is not None else default_structures(potential))
        check_batching(potential, chosen)
        if "energy" in potential.outputs:
            check_continuity(potential)
        check_sparse(potential)
        if is_possible(potential):
            check_padding(potential, chosen)
    finally:
        for table in unfit:
            table.fill_(torch.nan)
        potential.to(dtype).train(training)


def _without_references(potential: Potential) -> list[Tensor]:
    """Element references that nothing has set yet, of a model that has not been trained."""
    found = [getattr(getattr(head, "table", None), "reference", None) for head in potential.heads.values()]
    return [table for table in found if table is not None and table.isnan().all()]


def evaluate(potential: Potential, structures: ase.Atoms | Sequence[ase.Atoms]) -> dict[str, Tensor]:
    """Predictions for structures in one batch, by the model's first dataset, where the model is; on the CPU."""
    chosen = [structures] if isinstance(structures, ase.Atoms) else list(structures)
    batch = collate([prepare(potential, atoms) for atoms in chosen]).to(next(potential.parameters()).device)
    return {name: value.cpu() for name, value in potential(batch).items()}


def prepare(potential: Potential, atoms: ase.Atoms) -> AtomicData:
    """A structure with the model's graphs."""
    data = add_graphs(from_atoms(atoms, labels=False), potential.graphs)
    data.dataset = torch.zeros(1, dtype=torch.int64)
    return data


def check_outputs(potential: Potential, atoms: ase.Atoms) -> None:
    """Every declared output is there, has the shape of the field table and is finite (stress: with a lattice)."""
    out = evaluate(potential, atoms)
    for name in potential.outputs:
        field = FIELDS[name]
        rows = len(atoms) if field.level == "atom" else 1
        assert name in out, f"output '{name}' is declared and not predicted"
        shape = (rows, *field.shape)
        assert out[name].shape[: len(shape)] == shape, f"output '{name}' has shape {tuple(out[name].shape)}, expected {shape}"
        if name == "stress" and not atoms.pbc.any():
            assert out[name].isnan().all(), "stress of a structure without a lattice must be NaN"
        else:
            assert torch.isfinite(out[name]).all(), f"output '{name}' is not finite"


def _close(got: Tensor, expected: Tensor, what: str, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    got, expected = got.detach(), expected.detach()
    scale = float(torch.nan_to_num(expected).abs().max()) if expected.numel() else 0.0
    error = float((torch.nan_to_num(got) - torch.nan_to_num(expected)).abs().max()) if expected.numel() else 0.0
    assert error <= atol + rtol * scale, f"{what}: off by {error:.3g} where the values reach {scale:.3g}"


def rotate(value: Tensor, name: str, rotation: Float[Tensor, "3 3"]) -> Tensor:
    """A field's rows after a rotation or reflection of space, as the field table says that it transforms."""
    field = FIELDS[name]
    if not field.irreps or field.shape == ():
        return value
    if field.shape == (3, 3) and field.irreps != "1o":
        return rotation @ value @ rotation.T
    return value @ rotation.T


def check_symmetry(potential: Potential, atoms: ase.Atoms, seed: int = 0) -> None:
    """Translation, wrapping of atoms, permutation, and rotation; reflection where the backbone declares "E3"."""
    reference = evaluate(potential, atoms)
    moved = atoms.copy()
    moved.translate([0.3, -1.7, 2.9])
    if atoms.pbc.any():
        moved.positions[0] += atoms.cell[int(np.argmax(atoms.pbc))] * 2
    order = np.random.default_rng(seed).permutation(len(atoms))
    cases: list[tuple[str, ase.Atoms, Tensor | None]] = [("translation", moved, None), ("permutation", atoms[order], None)]
    if potential.backbone.symmetry in ("E3", "SE3"):
        matrix = _rotation(seed)
        cases.append(("rotation", _turned(atoms, matrix), matrix))
    if potential.backbone.symmetry == "E3":
        cases.append(("reflection", _turned(atoms, -_rotation(seed + 1)), -_rotation(seed + 1)))
    for what, changed, turn in cases:
        out = evaluate(potential, changed)
        for name in potential.outputs:
            expected = reference[name]
            if what == "permutation" and FIELDS[name].level == "atom":
                expected = expected[order]
            if turn is not None:
                expected = rotate(expected, name, turn)
            _close(out[name], expected, f"{what} changes '{name}'")


def _rotation(seed: int) -> Float[Tensor, "3 3"]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return rand_matrix(dtype=torch.float64)


def _turned(atoms: ase.Atoms, matrix: Tensor) -> ase.Atoms:
    turned = atoms.copy()
    turned.set_cell(atoms.cell.array @ matrix.numpy().T)
    turned.positions = atoms.positions @ matrix.numpy().T
    return turned


#: Five-point stencil: error of fourth order in the step.
_STENCIL = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))


def _derivative(energy: Callable[[float], float], step: float) -> float:
    return sum(weight * energy(k * step) for k, weight in _STENCIL) / step


def check_gradients(potential: Potential, atoms: ase.Atoms, step: float = 1e-3, components: int = 8, seed: int = 0) -> None:
    """Forces and stress against finite differences of the energy, within 1e-7 + 1e-6 · max.

    Args:
        potential: float64.
        atoms: not at a stationary point.
        step: Å, and for strains.
        components: so many random force components; all six of the stress.
        seed: of their choice.
    """
    out = evaluate(potential, atoms)
    rng = np.random.default_rng(seed)
    if "forces" in out:
        chosen = rng.choice(3 * len(atoms), min(components, 3 * len(atoms)), replace=False)
        for flat in chosen:
            i, axis = divmod(int(flat), 3)

            def moved(h: float, i: int = i, axis: int = axis) -> float:
                shifted = atoms.copy()
                shifted.positions[i, axis] += h
                return float(evaluate(potential, shifted)["energy"])

            expected = torch.tensor(-_derivative(moved, step), dtype=torch.float64)
            tolerance = 1e-7 + 1e-6 * float(out["forces"].abs().max())
            _close(out["forces"][i, axis], expected, f"force {'xyz'[axis]} of atom {i} is not -dE/dx", rtol=0.0, atol=tolerance)
    if "stress" in out and atoms.pbc.any():
        for a, b in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):

            def strained(h: float, a: int = a, b: int = b) -> float:
                deformation = np.eye(3)
                deformation[a, b] += h / 2
                deformation[b, a] += h / 2
                changed = atoms.copy()
                changed.set_cell(atoms.cell.array @ deformation)
                changed.positions = atoms.positions @ deformation
                return float(evaluate(potential, changed)["energy"])

            volume = abs(np.linalg.det(atoms.cell.array))
            expected = torch.tensor(_derivative(strained, step) / volume, dtype=torch.float64)
            tolerance = 1e-7 + 1e-6 * float(out["stress"].abs().max())
            _close(out["stress"][0, a, b], expected, f"stress {'xyz'[a]}{'xyz'[b]} is not dE/dstrain / V", rtol=0.0, atol=tolerance)


def check_supercell(potential: Potential, atoms: ase.Atoms) -> None:
    """A 2×2×2 supercell has 8 times the energy, the same forces and the same stress."""
    single, eightfold = evaluate(potential, atoms), evaluate(potential, atoms.repeat(2))
    _close(eightfold["energy"], 8 * single["energy"], "energy of a supercell")
    if "forces" in single:
        _close(eightfold["forces"], single["forces"].repeat(8, 1), "forces of a supercell")
    if "stress" in single:
        _close(eightfold["stress"], single["stress"], "stress of a supercell")


def check_batching(potential: Potential, structures: Sequence[ase.Atoms]) -> None:
    """Structures in one batch get what they get alone."""
    together = evaluate(potential, structures)
    alone = [evaluate(potential, atoms) for atoms in structures]
    for name in potential.outputs:
        _close(together[name], torch.cat([out[name] for out in alone]), f"'{name}' depends on the rest of the batch")


def check_continuity(potential: Potential) -> None:
    """Near the largest cutoff the pair energy falls off as (cutoff - r)^(continuity + 1) or faster, and beyond it is exactly constant.

    With continuity -1, it may jump.
    """
    cutoff = max(spec.cutoff for spec in potential.graphs.values())
    order = potential.backbone.continuity
    number = min(potential.elements(0))

    def energy(r: float) -> float:
        return float(evaluate(potential, ase.Atoms(numbers=[number, number], positions=[[0, 0, 0], [r, 0, 0]]))["energy"])

    beyond = energy(cutoff + 0.1)
    assert energy(cutoff + 1e-9) == beyond, "the energy still changes beyond the cutoff"
    if order < 0:
        return
    wide, narrow = (abs(energy(cutoff - h) - beyond) for h in (0.04, 0.02))
    floor = 1e-13 * max(1.0, abs(beyond))
    if narrow <= 10 * floor:
        return
    found = np.log2(wide / narrow)
    assert found >= order + 1 - 0.25, f"near the cutoff the energy goes as h^{found:.2f}; continuity {order} needs h^{order + 1}"


def check_sparse(potential: Potential) -> None:
    """One atom alone and no atom at all: finite outputs of the right shape, zero forces."""
    number = min(potential.elements(0))
    for atoms in (ase.Atoms(numbers=[number], positions=[[0.1, 0.2, 0.3]]), ase.Atoms()):
        out = evaluate(potential, atoms)
        for name in potential.outputs:
            rows = len(atoms) if FIELDS[name].level == "atom" else 1
            assert out[name].shape[0] == rows, f"'{name}' of {len(atoms)} atoms has {out[name].shape[0]} rows"
            assert name == "stress" or torch.isfinite(out[name]).all(), f"'{name}' of {len(atoms)} atoms is not finite"
        if "forces" in out:
            assert not out["forces"].any(), "a lone atom has a force"
        if "energy" in out and not len(atoms):
            assert float(out["energy"]) == 0.0, "no atoms must have no energy"


def check_padding(potential: Potential, structures: Sequence[ase.Atoms]) -> None:
    """Edges beyond the cutoff, those of padding among them, change no prediction."""
    for atoms in structures:
        if not len(atoms):
            continue
        data = from_atoms(atoms, labels=False)
        data.dataset = torch.zeros(1, dtype=torch.int64)
        padded = Replay(potential, skin=1.0, patience=0)(data)
        assert padded is not None, "the model cannot be replayed"
        for name, expected in evaluate(potential, atoms).items():
            _close(padded[name], expected, f"edges beyond the cutoff change '{name}'", rtol=1e-11, atol=1e-11)


def assert_equivariant(
    function: Callable[..., Tensor], irreps_in: Sequence[str], irreps_out: str, *, rows: int = 5, parity: bool = True, seed: int = 0
) -> None:
    """A function of features in matfound's layout commutes with rotations, and with inversion where `parity` is set.

    Args:
        function: takes one (rows, dim) float64 tensor for each entry of `irreps_in`.
        irreps_in: e3nn notation.
        irreps_out: of what the function returns.
        rows: of the random inputs.
        parity: test inversion too.
        seed: of inputs and rotation.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(rows, Irreps(irreps).dim, generator=generator, dtype=torch.float64) for irreps in irreps_in]
    reference = function(*inputs)
    for sign in (1, -1) if parity else (1,):
        matrix = sign * _rotation(seed)
        turned = [_transform(x, irreps, matrix) for x, irreps in zip(inputs, irreps_in, strict=True)]
        what = "rotation" if sign == 1 else "rotation with inversion"
        _close(function(*turned), _transform(reference, irreps_out, matrix), f"{what}: not equivariant", rtol=1e-10, atol=1e-10)


def _transform(x: Float[Tensor, "rows dim"], irreps: str, matrix: Float[Tensor, "3 3"]) -> Float[Tensor, "rows dim"]:
    blocks = [ir_block @ _wigner(ir, matrix).T for ir, ir_block in _components_last(to_e3nn(x, irreps), irreps)]
    return from_e3nn(torch.cat([block.flatten(1) for block in blocks], dim=1), irreps)


def _components_last(x: Float[Tensor, "rows dim"], irreps: str) -> list[tuple[Irrep, Float[Tensor, "rows channels component"]]]:
    blocks = Irreps(irreps)
    return [(ir, x[:, s].unflatten(1, (mul, ir.dim))) for (mul, ir), s in zip(blocks, blocks.slices(), strict=True)]


def _wigner(ir: Irrep, matrix: Float[Tensor, "3 3"]) -> Float[Tensor, "component component"]:
    """D with Y_l(R v) = D Y_l(v), times the parity for reflections; in full float64, which e3nn's own routine does not reach."""
    sign = torch.linalg.det(matrix).sign()
    directions = torch.randn(8 * ir.dim, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = spherical_harmonics(directions, ir.l)[:, ir.l**2 :]
    after = spherical_harmonics(directions @ (sign * matrix).T, ir.l)[:, ir.l**2 :]
    return torch.linalg.lstsq(before, after).solution.T * (1.0 if sign > 0 else float(ir.p))


def check_op(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """First and second derivatives against finite differences in float64; for a registered custom op also torch's `opcheck`."""
    arguments = [x.double().detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    assert torch.autograd.gradcheck(function, arguments), "first derivatives are off"
    assert torch.autograd.gradgradcheck(function, arguments), "second derivatives are off"
    if isinstance(function, torch._library.custom_ops.CustomOpDef):
        torch.library.opcheck(function, tuple(inputs))


__all__ = [
    "assert_equivariant", "check_batching", "check_continuity", "check_gradients", "check_model", "check_op", "check_outputs",
    "check_padding", "check_sparse", "check_supercell", "check_symmetry", "evaluate", "prepare", "random_crystal", "rotate",
]  # fmt: skip
