"""pymatgen structures and molecules, to and fro. Labels do not travel."""

import torch
from pymatgen.core.lattice import Lattice
from pymatgen.core.periodic_table import DummySpecies, Element
from pymatgen.core.structure import IMolecule, IStructure, Molecule, Structure

from matfound.errors import InputError
from matfound.structures.atomic_data import AtomicData, check


def from_structure(structure: IStructure | IMolecule) -> AtomicData:
    """A structure from pymatgen: elements (oxidation states are dropped), positions, lattice, periodicity and charge.

    A molecule also gives `spin`, the number of unpaired electrons (spin multiplicity - 1); a crystal gives `charge` only where one was
    set.

    Raises:
        InputError: a site with partial occupancy, or one without an element; names the site.
    """
    numbers = []
    for i, site in enumerate(structure):
        if not site.is_ordered:
            raise InputError(
                f"site {i} is disordered: {site.species_string}",
                remedy="choose an ordered structure, e.g. with pymatgen's OrderDisorderedStructureTransformation",
            )
        if isinstance(site.specie, DummySpecies):
            raise InputError(f"site {i} has no element: {site.species_string}", remedy="replace or remove the dummy species")
        numbers.append(site.specie.Z)
    data = AtomicData()
    data.numbers = torch.tensor(numbers, dtype=torch.int64)
    data.pos = torch.tensor(structure.cart_coords, dtype=torch.float64).reshape(-1, 3)
    if isinstance(structure, IStructure):
        data.cell = torch.tensor(structure.lattice.matrix, dtype=torch.float64)[None]
        data.pbc = torch.tensor([structure.lattice.pbc])
        # The public `charge` falls back on oxidation states, which are often guesses and need not add up.
        charge = structure._charge
    else:
        data.cell = torch.zeros(1, 3, 3, dtype=torch.float64)
        data.pbc = torch.zeros(1, 3, dtype=torch.bool)
        charge = structure.charge
        data.spin = torch.tensor([structure.spin_multiplicity - 1.0], dtype=torch.float64)
    if charge is not None:
        data.charge = torch.tensor([charge], dtype=torch.float64)
    return check(data)


def to_structure(data: AtomicData) -> Structure | Molecule:
    """A pymatgen Structure where any direction is periodic, else a Molecule; with charge and, for a molecule, spin multiplicity.

    Raises:
        InputError: a batch, no positions, lattice vectors that span no volume, or a charge and spin that do not fit together.
    """
    if data.is_batch:
        raise InputError(f"a batch of {data.num_systems} structures is no Structure", remedy="split it with to_list()")
    if "pos" not in data:
        raise InputError("the structure has no positions", remedy="for SMILES: from_smiles(..., conformer_seed=0)")
    species = [Element.from_Z(number) for number in data.numbers.tolist()]
    coords = data.pos.detach().cpu().numpy()
    charge = float(data.charge[0]) if "charge" in data and not torch.isnan(data.charge[0]) else None
    if data.pbc.any():
        matrix = data.cell[0].detach().cpu().numpy()
        if abs(float(torch.linalg.det(data.cell[0].detach()))) < 1e-8:
            raise InputError(
                f"a pymatgen Structure needs three lattice vectors that span a volume: cell {matrix.tolist()}",
                remedy="give the directions that are not periodic a vector, as vacuum",
            )
        a, b, c = data.pbc[0].tolist()
        return Structure(Lattice(matrix, pbc=(a, b, c)), species, coords, charge=charge, coords_are_cartesian=True)
    multiplicity = int(data.spin[0]) + 1 if "spin" in data and not torch.isnan(data.spin[0]) else None
    try:
        return Molecule(species, coords, charge=charge or 0.0, spin_multiplicity=multiplicity)
    except ValueError as error:
        raise InputError(f"pymatgen refuses the molecule: {error}", remedy="repair charge or spin") from None
