"""What the adapters share: the tensors of a foreign file, each taken once, and e3nn's flat weights."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from e3nn.o3 import Irrep, Irreps, wigner_3j
from torch import Tensor

from matfound.errors import InputError

_COUPLINGS = re.compile(r"_w3j_(\d)_(\d)_(\d)$")


class Tensors:
    """The tensors of a state dict.

    Args:
        content: the state dict.
        rename: old key to present key.
        constants: keys that need not be understood, because they hold no weights.
        known: what is read, for the error that lists unknown tensors.

    Raises:
        InputError: a value is no tensor.
    """

    def __init__(self, content: Mapping[str, Any], constants: re.Pattern[str], known: str, rename: Callable[[str], str] = str) -> None:
        self.left: dict[str, Tensor] = {}
        self._constants, self._known = constants, known
        for key, value in content.items():
            if not isinstance(value, Tensor):
                raise InputError(f"'{key}' is no tensor but {type(value).__name__}", remedy="get the file again")
            self.left[rename(key)] = value

    def peek(self, key: str) -> Tensor:
        """The tensor, which stays.

        Raises:
            InputError: it is missing.
        """
        if key not in self.left:
            raise InputError(f"the tensor '{key}' is missing", remedy="get the file again, or it is of an unknown kind")
        return self.left[key]

    def take(self, key: str, *shape: int) -> Tensor:
        """The tensor, which has to be of this shape.

        Raises:
            InputError: it is missing, of another shape, or not finite.
        """
        value = self.peek(key)
        expected = 1
        for size in shape:
            expected *= size
        if shape and value.numel() != expected:
            raise InputError(f"the tensor '{key}' has shape {tuple(value.shape)}, expected {expected} numbers, {shape}")
        if not torch.isfinite(value).all():
            raise InputError(f"the tensor '{key}' has values that are not finite", remedy="get the file again")
        del self.left[key]
        return value.reshape(shape) if shape else value

    def couplings(self, prefix: str) -> dict[tuple[int, int, int], Tensor]:
        """Clebsch-Gordan blocks that a tensor product was trained with."""
        found = {}
        for key, value in self.left.items():
            match = _COUPLINGS.search(key)
            if match and key.startswith(prefix):
                found[int(match[1]), int(match[2]), int(match[3])] = value
        return found

    def finish(self) -> None:
        """Refuse what was not understood.

        Raises:
            InputError: lists the unknown keys.
        """
        unknown = sorted(key for key in self.left if not self._constants.search(key))
        if unknown:
            listed = ", ".join(unknown[:10]) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
            raise InputError(
                f"the file has tensors that this version of matfound does not know: {listed}",
                remedy=f"it is of a newer or other kind; matfound reads {self._known}",
            )


def coupling_sign(path: tuple[int, int, int], couplings: Mapping[tuple[int, int, int], Tensor], where: str) -> float:
    """-1 where the file's coefficients are minus ours: e3nn changed some between 0.4 and 0.6.

    Raises:
        InputError: they are missing, or neither equal nor opposite.
    """
    if 0 in path:
        return 1.0  # a Kronecker delta, the same in every version, and not stored
    if path not in couplings:
        raise InputError(f"{where} does not store the Clebsch-Gordan coefficients of {path}", remedy="save it with e3nn's tensor product")
    stored, ours = couplings[path].double(), wigner_3j(*path, dtype=torch.float64)
    for sign in (1.0, -1.0):
        if stored.shape == ours.shape and torch.allclose(stored, sign * ours, atol=1e-5):
            return sign
    raise InputError(f"the Clebsch-Gordan coefficients of {path} in {where} are neither ours nor minus ours", remedy="get the file again")


def matrices(flat: Tensor, irreps_in: Irreps, irreps_out: Irreps, elements: int | None = None) -> dict[Irrep, Tensor]:
    """e3nn's flat weights as one matrix [(element,) in, out] for each irrep; here, blocks of one irrep are one.

    They lie input block by input block, and in these output block by output block; [in, (element,) out] each.
    """
    pairs = [(i, k) for i, (_, ir) in enumerate(irreps_in) for k, (_, other) in enumerate(irreps_out) if ir == other]
    middle = () if elements is None else (elements,)
    sizes = [irreps_in[i].mul * (elements or 1) * irreps_out[k].mul for i, k in pairs]
    pieces = dict(zip(pairs, flat.split(sizes), strict=True))
    found = {}
    for ir in dict.fromkeys(irreps_in[i].ir for i, _ in pairs):
        rows = []
        for i, (mul, other) in enumerate(irreps_in):
            if other == ir:
                columns = [pieces[i, k].reshape(mul, *middle, out) for k, (out, target) in enumerate(irreps_out) if target == ir]
                rows.append(torch.cat(columns, dim=-1))
        matrix = torch.cat(rows, dim=0)
        found[ir] = matrix if elements is None else matrix.transpose(0, 1)
    return found


def flat_size(irreps_in: Irreps, irreps_out: Irreps, elements: int = 1) -> int:
    """How many weights e3nn has for this map."""
    return elements * sum(mul * out for mul, ir in irreps_in for out, other in irreps_out if ir == other)
