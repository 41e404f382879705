"""FIRE with the rules of ASE's optimiser, on the device where a structure is replayed.

A step of the optimiser is recorded as a graph of its own, which follows that of the model; what depends on values is decided there, by
masks. So positions, velocities and the lattice stay on the GPU, and the host reads a few numbers a step.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from matfound.errors import InputError
from matfound.inference.replay import Program, Replay
from matfound.ops.recording import recorded
from matfound.structures.atomic_data import volumes

#: ASE's defaults: time step, its largest value, steps before it grows, factors, mixing and its factor, the longest step (Å).
DT, DT_MAX, N_MIN, F_INC, F_DEC, A_START, F_A, MAX_STEP = 0.1, 1.0, 5, 1.1, 0.5, 0.1, 0.99, 0.2
#: Terms and squarings of the matrix exponential: exact to 1e-16 for logarithms up to 1, which is more strain than a relaxation survives.
TERMS, SQUARINGS = 9, 4


class Progress(NamedTuple):
    """A step as the host sees it: energy (eV), fmax (eV/Å), largest stress (eV/Å³), volume (Å³)."""

    energy: float
    fmax: float
    max_stress: float
    volume: float


def exponential(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Of a small matrix, by its series; torch's own waits for the GPU."""
    one = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    scaled, out = matrix / 2**SQUARINGS, one
    for k in range(TERMS, 0, -1):
        out = torch.addmm(one, scaled, out, alpha=1 / k)
    for _ in range(SQUARINGS):
        out = out @ out
    return out


def exponential_adjoint(log: Float[Tensor, "3 3"], g: Float[Tensor, "3 3"]) -> Float[Tensor, "3 3"]:
    """The derivative of <g, exp(log)> with respect to log.

    It is a block of the exponential of a block matrix (Higham, Functions of Matrices, SIAM 2008, eq. 3.16).
    """
    top, bottom = torch.cat([log.T, g], dim=1), torch.cat([torch.zeros_like(g), log.T], dim=1)
    return exponential(torch.cat([top, bottom]))[:3, 3:]


class ReplayedFIRE:
    """Relaxes the structure that a `Replay` holds (Bitzek et al., Phys. Rev. Lett. 97, 170201 (2006), as in `ase.optimize.FIRE`).

    With the cell, unknowns and forces are those of `ase.filters.FrechetCellFilter`: positions before the deformation since the start,
    and its logarithm times the number of atoms.

    Args:
        replay: prepared.
        fixed: atoms that stay where they are (with the cell: keep their fractional coordinates).
        cell: relax the lattice, too.
        fmax: converged when no force is larger, eV/Å.
        max_steps: no more than these.
        ahead: launch every step before the one before it has been read; then `evaluated` is right after the last one only.
    """

    def __init__(
        self, replay: Replay, fixed: Bool[Tensor, " atoms"] | None, *, cell: bool, fmax: float, max_steps: int, ahead: bool = True
    ) -> None:
        assert replay.program is not None
        self.ahead = ahead
        self.replay, self.cell, self.fmax, self.max_steps = replay, cell, fmax, max_steps
        program = replay.program
        device = program.inputs.device
        self.atoms = program.atoms
        self.free = None if fixed is None else (~fixed).double().unsqueeze(1).to(device)
        self.start = program.frame[:3].clone()
        extra = [torch.zeros(3, 3, dtype=torch.float64, device=device)] if cell else []
        self.x = torch.cat([program.pos, *extra])
        self.deformation = torch.eye(3, dtype=torch.float64, device=device)
        self.velocity = torch.zeros_like(self.x)
        #: Time step, mixing, steps downhill, steps so far.
        self.state = torch.tensor([DT, A_START, 0.0, 0.0], dtype=torch.float64, device=device)
        #: Where the last step was evaluated, as `Program.inputs`.
        self.place = program.inputs.clone()
        self.shown: Tensor | None = None
        self._program: Program | None = None
        self._run: Callable[[], None]

    def __iter__(self) -> Iterator[Progress]:
        """Steps, from the start to the last one.

        Raises:
            InputError: as `Replay.settle`.
        """
        done = 0
        waiting = self._launched()
        while True:
            # The next step is launched before this one is read, so that the GPU does not wait for the host. Where there is none, because it
            # has converged or pairs are missing, the launch finds the same place again and changes nothing.
            following = self._launched() if self.ahead else None
            shown = waiting()
            if not self.replay.is_settled(*shown[4:]):
                waiting = self._launched()
                continue
            yield Progress(*shown[:4])
            if shown[1] < self.fmax or done >= self.max_steps:
                return
            waiting = following or self._launched()
            done += 1

    def evaluated(self) -> tuple[np.ndarray, np.ndarray, dict[str, Tensor]]:
        """Positions (atoms, 3), lattice vectors (3, 3) and predictions of the present step."""
        assert self._program is not None
        place, results = self.place.cpu(), self._program.read()
        pos, frame = place[: 3 * self.atoms].view(-1, 3), place[3 * self.atoms :].view(4, 3)
        return pos.numpy().copy(), frame[:3].numpy().copy(), self._program.outputs(results)

    def _launched(self) -> Callable[[], list[float]]:
        """Evaluate where the atoms are, and move them on; what comes back waits for the numbers of the step."""
        program = self.replay.program
        if program is None:
            raise InputError("the structure has changed so much that it cannot be replayed", remedy="Calculator(..., replay=False)")
        with self.replay.on_device(), torch.no_grad():
            if program is not self._program:
                self._record(program)
            program.run()
            self._run()
            assert self.shown is not None
            if self.shown.device.type != "cuda":
                return self.shown.clone().tolist
            there = torch.empty(len(self.shown), dtype=torch.float64, pin_memory=True)
            there.copy_(self.shown, non_blocking=True)
            event = torch.cuda.Event()
            event.record()

        def wait() -> list[float]:
            event.synchronize()
            found: list[float] = there.tolist()
            return found

        return wait

    def _record(self, program: Program) -> None:
        if program.results is None:
            program.run()
        steps = self.state[3].clone()
        self.state[3] = torch.inf  # so that calls before the recording change nothing
        (self._run,) = recorded([lambda: self._follow(program)], program.inputs.device)
        self.state[3] = steps
        self._program = program

    def _follow(self, program: Program) -> None:
        """What follows an evaluation; nothing here may wait for the GPU, or depend on values."""
        assert program.results is not None
        out, cell = program.outputs(program.results), program.frame[:3]
        forces = out["forces"] if self.free is None else out["forces"] * self.free
        zero = torch.zeros_like(self.state[0])
        volume, stress = volumes(cell.unsqueeze(0))[0], out["stress"][0] if "stress" in out else zero
        f = torch.cat(self._with_cell(forces, stress, volume)) if self.cell else forces
        fmax = torch.linalg.vector_norm(f, dim=1).amax()
        checks = program.results[-2:]
        shown = torch.cat([torch.stack([out["energy"][0], fmax, stress.abs().amax(), volume]), checks])
        self.shown = shown if self.shown is None else self.shown.copy_(shown)
        self.place.copy_(program.inputs)
        going = (checks[0] >= 0) & (fmax >= self.fmax) & (self.state[3] < self.max_steps)
        for old, new in zip((self.x, self.velocity, self.state), self._advanced(f), strict=True):
            old.copy_(torch.where(going, new, old))
        if self.cell:
            self.deformation.copy_(exponential(self.x[self.atoms :] / self.atoms))
            torch.mm(self.x[: self.atoms], self.deformation.T, out=program.pos)
            torch.mm(self.start, self.deformation.T, out=cell)
        else:
            program.pos.copy_(self.x)

    def _with_cell(self, forces: Tensor, stress: Tensor, volume: Tensor) -> tuple[Tensor, Tensor]:
        """Forces on the positions before the deformation, and on its logarithm."""
        now = self.deformation
        cofactors = torch.linalg.cross(now.roll(-1, 0), now.roll(-2, 0))
        inverse = cofactors / (now[0] * cofactors[0]).sum()  # of the transpose
        log = self.x[self.atoms :] / self.atoms
        return forces @ now, exponential_adjoint(log, -volume * stress @ inverse) / self.atoms

    def _advanced(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unknowns, velocities and numbers after a step."""
        v, (dt, a, downhill_steps, steps) = self.velocity, self.state.unbind()
        zero = torch.zeros_like(dt)
        f2, v2 = f.square().sum(), v.square().sum()
        downhill = (f * v).sum() > 0
        uphill = ~downhill & (steps > 0)  # the first step has no velocity yet
        mixed = torch.where(downhill, a * (v2 / f2).sqrt(), zero)
        kept = torch.where(downhill, 1 - a, zero)
        grows = downhill & (downhill_steps > N_MIN)
        new_dt = torch.where(grows, (dt * F_INC).clamp(max=DT_MAX), torch.where(uphill, dt * F_DEC, dt))
        new_a = torch.where(grows, a * F_A, torch.where(uphill, zero + A_START, a))
        v = kept * v + (mixed + new_dt) * f
        move = new_dt * v
        length = move.square().sum().sqrt()
        x = self.x + move * (MAX_STEP / length).clamp(max=1.0)
        return x, v, torch.stack([new_dt, new_a, torch.where(downhill, downhill_steps + 1, zero), steps + 1])
