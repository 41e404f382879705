"""Structures for every test of inference."""

import ase
import numpy as np
import pytest
from ase.build import bulk, molecule


@pytest.fixture
def structures() -> list[ase.Atoms]:
    """A molecule, crystals, a slab, a chain, an isolated atom, a skewed cell with atoms outside of it."""
    salt = bulk("NaCl", "rocksalt", a=5.0)
    slab = bulk("Cu", "fcc", a=3.3, cubic=True) * (1, 1, 2)
    slab.center(vacuum=6.0, axis=2)
    slab.pbc = [True, True, False]
    chain = ase.Atoms("CO", [[0, 0, 0], [1.4, 0.3, 0]], cell=[2.9, 0, 0], pbc=[True, False, False])
    skewed = ase.Atoms("SiOSi", [[0, 0, 0], [1.5, 7.2, -0.4], [-3.0, 1.2, 2.4]], cell=[[4, 0, 0], [2.5, 3.5, 0], [-1, 1.5, 4.2]], pbc=True)
    out = [molecule("CH3CH2OH"), salt, bulk("Si", cubic=True), slab, chain, ase.Atoms("H"), skewed]
    for i, atoms in enumerate(out):
        atoms.rattle(0.08, rng=np.random.default_rng(i))
    return out
