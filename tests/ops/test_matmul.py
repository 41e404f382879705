"""Matrix products on tensor cores: the operation anywhere, the kernel on a GPU."""

import pytest
import torch

from matfound.errors import InputError
from matfound.ops import backends, matmul
from matfound.ops.cuda import compiler
from matfound.testing import check_op

needs_nvrtc = pytest.mark.skipif(not compiler.is_available(), reason="NVRTC is not installed")


@needs_nvrtc
@pytest.mark.parametrize("kind", matmul.KINDS)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_sources_compile_without_a_gpu(kind, architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("MATFOUND_CACHE", str(tmp_path))
    assert compiler.compile_source(matmul.source(kind), architecture)[:4] == b"\x7fELF"


def factors(kind, m, n, k, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(m + n + k)
    sizes = {"nn": ((m, k), (k, n)), "nt": ((m, k), (n, k)), "tn": ((k, m), (k, n))}[kind]
    return [torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("kind", matmul.KINDS)
@pytest.mark.parametrize("sizes", [(3, 2, 4), (1, 1, 1), (0, 2, 3), (2, 3, 0)])
def test_derivatives(kind, sizes):
    a, b = factors(kind, *sizes)
    for function in (matmul._Product.apply, matmul.matmul_op):
        if 0 not in sizes:
            check_op(lambda x, y, function=function: function(x, y, kind), [a, b])
        assert torch.equal(function(a, b, kind), matmul._torch(a, b, kind))
    torch.library.opcheck(matmul.matmul_op, (a, b, kind))


def test_only_the_gradients_that_are_needed():
    a, b = factors("nn", 3, 2, 4)
    g = torch.autograd.grad(matmul._Product.apply(a, b.detach(), "nn").sum(), a)
    assert torch.equal(g[0], b.sum(1).expand(3, -1))


def test_backends():
    a, b = factors("nn", 3, 2, 4)
    for backend in ("auto", "reference", "cpu"):
        assert torch.equal(matmul.matmul(a, b, backend), a @ b)
    with pytest.raises(InputError, match="'matmul' has no backend 'grid'"):
        matmul.matmul(a, b, "grid")
    assert backends.get("matmul", "cuda") is matmul.cuda


SIZES = [(20_000, 960, 64), (20_001, 64, 960), (70_003, 224, 64), (64, 960, 50_001), (36, 100, 100_000), (40_000, 63, 36), (5_000, 128, 260)]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", matmul.KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_as_exact_as_float32(kind, sizes, monkeypatch):
    used = []
    monkeypatch.setattr(matmul, "_kernel", lambda *args, real=matmul._kernel: used.append(args) or real(*args))
    a, b = (x.detach() for x in factors(kind, *sizes, dtype=torch.float32, device="cuda"))
    exact = matmul._torch(a.double(), b.double(), kind)
    found = matmul._computed(a, b, kind)
    m, n, k = sizes
    assert bool(used) == (not any(size % 4 for size in {"nn": (k, n), "nt": (k,), "tn": (m, n)}[kind]))
    theirs = (matmul._torch(a, b, kind) - exact).abs().max()
    assert (found - exact).abs().max() <= 2 * theirs + 1e-7 * exact.abs().max()
    assert torch.equal(found, matmul._computed(a, b, kind))


@pytest.mark.gpu
def test_derivatives_on_a_gpu():
    a, b = factors("nn", 20_000, 96, 64, torch.float32, "cuda")
    twins = [x.detach().double().requires_grad_() for x in (a, b)]

    def derivatives(x, y, product):
        first = torch.autograd.grad(product(x, y).tanh().sum(), (x, y), create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, y))

    for found, expected in zip(derivatives(a, b, matmul.matmul), derivatives(*twins, torch.matmul), strict=True):
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.gpu
def test_views_and_misaligned_factors():
    a, b = (x.detach() for x in factors("nn", 20_000, 96, 64, torch.float32, "cuda"))
    wide = torch.zeros(20_000, 65, device="cuda")
    wide[:, 1:] = a
    flat = torch.zeros(a.numel() + 1, device="cuda")
    flat[1:] = a.flatten()
    expected = matmul.matmul(a, b)
    for view in (wide[:, 1:], a.T.contiguous().T):
        assert torch.equal(matmul.matmul(view, b), expected)
    assert torch.allclose(matmul.matmul(flat[1:].view_as(a), b), expected, atol=1e-4)
