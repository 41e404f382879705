"""The fast parser of extended XYZ against ASE's: the same values in the same types, bit for bit, or nothing."""

import io
import lzma

import ase
import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.calculator import all_properties
from ase.io.extxyz import per_config_properties
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound.data.dataset import Frame, to_frame
from matfound.data.extxyz import read_frames, read_parts
from matfound.data.extxyz_frame import OF_FRAMES, parse_frame
from matfound.errors import InputError
from matfound.structures.ase import Parts


def same_value(a, b) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        same = type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
        return same and (a.tolist() == b.tolist() if a.dtype == object else a.tobytes() == b.tobytes())
    return type(a) is type(b) and (a == b or a != a)


def made(read) -> Frame | str:
    """The frame, or the words of the refusal."""
    try:
        return to_frame(read, None, "x.xyz", 3)
    except InputError as error:
        return str(error)


def same_frame(fast: Parts, atoms: ase.Atoms) -> None:
    """The frame that datasets make is the same, and so is everything that stands beside it, in the same order."""
    expected, found = made(atoms), made(fast)
    if isinstance(expected, str) or isinstance(found, str):
        assert found == expected
        return
    for kind in ("info", "arrays"):
        a, b = getattr(found, kind), getattr(expected, kind)
        assert list(a) == list(b)
        for name in b:
            assert same_value(a[name], b[name]), (name, a[name], b[name])
    assert found.data.keys() == expected.data.keys()
    for name, value in expected.data:
        other = found.data[name]
        assert torch.equal(value, other) and value.dtype == other.dtype if isinstance(value, torch.Tensor) else value == other


FILES = [
    "3bpa/iso_atoms.xyz", "3bpa/test_300K.extxyz.xz", "3bpa/train_300K.extxyz.xz", "3bpa/train_mixedT.extxyz.xz",
    "abx3/lcmgm_mp_perovskites.extxyz.xz", "acac/isolated_atoms.xyz", "acac/test_MD_300K.extxyz.xz", "acac/test_dihedral.extxyz.xz",
    "acac/train_300K.extxyz.xz", "acac/train_600K.extxyz.xz", "fairchem/tutorials_data_toy_c3h8_relax.extxyz",
    "mattersim_bench/alexandria-random-1k.extxyz.xz", "mattersim_bench/mptrj-random-1k.extxyz.xz", "mattersim_bench/random-TP.extxyz.xz",
    "minidft/crystals.extxyz", "minidft/isolated_atoms.extxyz", "minidft/molecules.extxyz", "minidft/surfaces.extxyz",
    *(f"mlearn/{name}_{part}.extxyz.xz" for name in ("Ge", "Li", "Mo", "Si") for part in ("test", "train")),
    "mlip_arena/benchmarks_combustion_H256O128.extxyz", "nbmotaw_snap/train.extxyz.xz", "oc20/0.extxyz", "oxides/oxides.extxyz.xz",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_real_file(shared_data, name: str) -> None:
    """Every frame of the short files, every so many of the long ones."""
    file = shared_data / "data" / name
    every = slice(None, None, 1 if file.stat().st_size < 100_000 else 17)
    count = 0
    for (i, fast), (j, atoms) in zip(read_parts(file, every), read_frames(file, every), strict=True):
        assert i == j
        same_frame(fast, atoms)
        count += 1
    assert count


def test_real_files_take_the_fast_way(shared_data) -> None:
    for name in ("abx3/lcmgm_mp_perovskites.extxyz.xz", "mattersim_bench/mptrj-random-1k.extxyz.xz", "oxides/oxides.extxyz.xz"):
        with lzma.open(shared_data / "data" / name, "rt") as stream:
            lines = stream.read(200_000).splitlines(keepends=True)
        size = int(lines[0])
        assert parse_frame(lines[: size + 2], [line.split() for line in lines[2 : size + 2]]) is not None


HEADERS = [
    "",
    "Properties=species:S:1:pos:R:3",
    'Lattice="4 0 0 0 5 0 0 0 6" Properties=species:S:1:pos:R:3',
    'Lattice="4.0 0 0 0.5 5 0 0 0 6" Properties=species:S:1:pos:R:3 pbc="T T F"',
    'Lattice="4 0 0 0 5 0 0 0 6" Properties=species:S:1:pos:R:3 pbc="1 1 0" energy=-3',
    'Lattice="4 0 0 0 5 0 0 0 6" Properties=species:S:1:pos:R:3 pbc=T stress="1 2 3 2 4 5 3 5 6" energy=-3.5 free_energy=-3.25',
    'Lattice="4 0 0 0 5 0 0 0 6" Properties=species:S:1:pos:R:3 virial="1 2 3 2 4 5 3 5 6" flag other=F list="T F T"',
    'Lattice="4 0 0 0 5 0 0 0 6" Properties=species:S:1:pos:R:3 stress="1 2 3 4 5 6"',
    'Lattice="4 0 0 0 5 0 0 0 6 7" Properties=species:S:1:pos:R:3',
    'Properties=species:S:1:pos:R:3 name="a b c" word=mp-123 uid=123 number=1e5 many="1,2,3" mixed="1 2.5 x" big=12345678901234567890',
    "Properties=species:S:1:pos:R:3 a=1_000 b=nan c=-inf d=Infinity e=.5 f=5. g=+3 h=0x10 i=1e400 j=T k=true l=TRUE m=t n=None",
    "Properties=species:S:1:pos:R:3 json=_JSON quoted='single quotes' braces={1 2 3} brackets=[4 5 6]",
    r'Properties=species:S:1:pos:R:3 escaped="say \"hi\"" path=a\b',
    'Properties=species:S:1:pos:R:3 json="_JSON [[1, 2], [3, 4]]" empty="" gap =3 spaces = 4 a=b=c ü=1 word=é',
    "Properties=species:S:1:pos:R:3 spacegroup=P6_3/mmc crystal_system=cubic id=0012 date=2020-01-02 e1=1e e2=-- e3=. e4=+",
    "Properties=species:S:1:pos:R:3 dipole=\"0 0 1\" magmom=2 magmom=3 comment",
    "Properties=species:S:1:pos:R:3 dipole=text",
    'Properties="species:S:1:pos:R:3" energy=abc',
    "Properties=species:S:1:pos:R:3:extra:Q:1",
    "Properties=species:S:1:pos:R:2",
    "Properties",
    "Properties=12",
]  # fmt: skip
ATOMS = ["H 0.0 0.0 0.0", "O 1.0 -1e-3 2.5"]


def compared(text: str) -> None:
    lines = text.splitlines(keepends=True)
    fast = parse_frame(lines, [line.split() for line in lines[2:]])
    try:
        atoms = next(iter(ase.io.read(io.StringIO(text), ":", format="extxyz")))
    except Exception:  # noqa: BLE001  # whatever ASE refuses is for ASE to refuse
        assert fast is None
        return
    if fast is not None:
        same_frame(fast, atoms)


@pytest.mark.parametrize("header", HEADERS)
def test_comment_lines(header: str) -> None:
    compared("2\n" + header + "\n" + "\n".join(ATOMS) + "\n")


COLUMNS = [
    ("pos:R:3:species:S:1", "0 0 0 H", "1 2 3 he"),
    ("Z:I:1:pos:R:3", "1 0 0 0", "2 1 2 3"),
    ("species:S:1:Z:I:1:pos:R:3", "H 6 0 0 0", "H 7 1 2 3"),
    ("species:S:1:pos:R:3:tags:I:1:forces:R:3", "H 0 0 0 1 .5 -.5 1e-3", "H 1 2 3 2 0 0 -0.0"),
    ("species:S:1:pos:R:3:flag:L:1:flags:L:2", "H 0 0 0 T F T", "H 1 2 3 False True x"),
    ("species:S:1:pos:R:3:name:S:1:names:S:2", "H 0 0 0 a b c", "H 1 2 3 dd ee ff"),
    ("species:S:1:pos:R:3:move_mask:L:1", "H 0 0 0 F", "H 1 2 3 T"),
    ("species:S:1:pos:R:3:move_mask:L:1", "H 0 0 0 T", "H 1 2 3 T"),
    ("species:S:1:pos:R:3:move_mask:I:1", "H 0 0 0 0", "H 1 2 3 1"),
    ("species:S:1:pos:R:3:move_mask:L:3", "H 0 0 0 F F T", "H 1 2 3 T T T"),
    ("species:S:1:pos:R:3:move_mask:L:2", "H 0 0 0 F F", "H 1 2 3 T T"),
    ("species:S:1:pos:R:3:charge:R:1:magmoms:R:1", "H 0 0 0 .1 1", "H 1 2 3 -.1 2"),
    ("species:S:1:pos:R:3:initial_charges:R:1:magmoms:I:1:energies:R:1", "H 0 0 0 .1 1 5", "H 1 2 3 -.1 2 6"),
    ("species:S:1:pos:R:3:big:I:1", "H 0 0 0 3000000000", "H 1 2 3 1"),
    ("species:S:1:pos:R:3:whole:I:1", "H 0 0 0 1.0", "H 1 2 3 1"),
    ("species:S:1:pos:R:3:a:R:1:a:R:1", "H 0 0 0 1 2", "H 1 2 3 1 2"),
    ("species:S:1:pos:R:3", "H 0 0 nan", "H 1 2 inf"),
    ("species:S:1:pos:R:3", "Xx 0 0 0", "H 1 2 3"),
    ("species:S:1:pos:R:3", "X 0 0 0", "H 1 2 3"),
    ("species:S:1:pos:R:3", "H 0 0 1_0", "H 1 2 x"),
    ("species:S:1:pos:I:3", "H 0 0 1", "H 1 2 3"),
    ("species:I:1:pos:R:3", "1 0 0 1", "1 1 2 3"),
    ("species:S:1", "H", "H"),
    ("pos:R:3", "0 0 0", "1 2 3"),
    ("species:S:2:pos:R:3", "H H 0 0 0", "H H 1 2 3"),
]  # fmt: skip


@pytest.mark.parametrize(("properties", "first", "second"), COLUMNS)
def test_columns(properties: str, first: str, second: str) -> None:
    compared(f'2\nLattice="4 0 0 0 5 0 0 0 6" Properties={properties} energy=1\n{first}\n{second}\n')


def test_vectors_below_the_atoms() -> None:
    text = "2\ncomment\nH 0 0 0\nH 0 0 1\nVEC1 4 0 0\nVEC2 0 5 0\n"
    lines = text.splitlines(keepends=True)
    assert parse_frame(lines, [line.split() for line in lines[2:4]]) is None


WORDS = st.one_of(
    st.integers(-(10**20), 10**20).map(str), st.floats().map(repr),
    st.sampled_from(["T", "F", "True", "x", "mp-1", "1e5", "-", "+.5", "5.", "1_0"]),
    st.text(st.characters(codec="ascii", exclude_characters="\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85"), min_size=1, max_size=6),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["energy", "a", "b_c", "uid", "stress", "note"]), st.lists(WORDS, max_size=4), st.booleans()), max_size=4
    )
)
def test_any_comment(pairs) -> None:
    words = [f'{key}="{" ".join(values)}"' if quoted else f"{key}={','.join(values)}" for key, values, quoted in pairs]
    compared("2\nProperties=species:S:1:pos:R:3 " + " ".join(words) + "\n" + "\n".join(ATOMS) + "\n")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=6, max_size=6))
def test_numbers_bit_for_bit(values) -> None:
    rows = [f"H {' '.join(map(repr, values[:3]))}", f"C {' '.join(map(repr, values[3:]))}"]
    compared(f"2\nProperties=species:S:1:pos:R:3 x={values[0]!r}\n{rows[0]}\n{rows[1]}\n")


def test_the_results_of_frames_are_ase_s() -> None:
    assert set(per_config_properties) == OF_FRAMES
    assert {"energy", "forces", "stress"} <= set(all_properties)
