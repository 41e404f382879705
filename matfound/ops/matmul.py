"""Matrix products of float32 on the tensor cores of NVIDIA GPUs, as exact as float32 units make them.

A tensor core multiplies numbers of 11 bits ("TF32"). Here each factor is the sum of two such numbers, x = h + l with l = x - h exactly, and
a product is a_l b_h + a_h b_l + a_h b_h: what is left out is below 2⁻²¹ of it, as rounding to float32 is on the way of a sum of a few
products. Sums of 16 products are added up in float32. The setting for TF32 in torch changes nothing here, nor is it changed.
"""

import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from matfound.ops.cuda.compiler import Kernel, kernel

#: Which factor is transposed: A B, A Bᵀ, Aᵀ B. Derivatives of one are the others.
KINDS = ("nn", "nt", "tn")
#: Below so many multiplications torch's own products are as fast.
SMALL = 2**26
#: Blocks that fill a GPU: long sums are divided until there are as many.
_BLOCKS = 264
_THREADS, _DEPTH = 256, 16


def matmul(a: Float[Tensor, "rows k"], b: Float[Tensor, "k columns"], backend: str = "auto") -> Float[Tensor, "rows columns"]:
    """A B, with derivatives of every order.

    Args:
        a: the left factor.
        b: the right factor.
        backend: see `matfound.ops.backends`.

    Raises:
        InputError: no such backend.
    """
    from matfound.ops import backends

    found: Tensor = backends.get("matmul", backend, a.device)(a, b)
    return found


def reference(a: Float[Tensor, "rows k"], b: Float[Tensor, "k columns"]) -> Float[Tensor, "rows columns"]:
    """torch's product."""
    return a @ b


def cuda(a: Float[Tensor, "rows k"], b: Float[Tensor, "k columns"]) -> Float[Tensor, "rows columns"]:
    """See the module's docstring; torch's product for other types, under autocast, and for small matrices. Bitwise the same in every run."""
    if a.dtype != torch.float32 or b.dtype != torch.float32 or torch.is_autocast_enabled(a.device.type):
        return a @ b
    if torch.compiler.is_compiling():
        return matmul_op(a, b, "nn")
    found: Tensor = _Product.apply(a, b, "nn")
    return found


# ------------------------------------------------------------------------------------------------------------------ derivatives


def _left(g: Any, b: Any, kind: str) -> tuple[Any, Any, str]:
    """The factors, and the kind, of the gradient of A."""
    return {"nn": (g, b, "nt"), "nt": (g, b, "nn"), "tn": (b, g, "nt")}[kind]


def _right(g: Any, a: Any, kind: str) -> tuple[Any, Any, str]:
    """The same of B."""
    return {"nn": (a, g, "tn"), "nt": (g, a, "tn"), "tn": (a, g, "nn")}[kind]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.kind = kind
        return _computed(a, b, kind)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (a, b), kind = ctx.saved_tensors, ctx.kind
        left = _Product.apply(*_left(g, b, kind)) if ctx.needs_input_grad[0] else None
        right = _Product.apply(*_right(g, a, kind)) if ctx.needs_input_grad[1] else None
        return left, right, None


@torch.library.custom_op("matfound::matmul", mutates_args=())
def matmul_op(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """The product, as torch.compile sees it."""
    return _computed(a, b, kind)


@matmul_op.register_fake
def _(a: Tensor, b: Tensor, kind: str) -> Tensor:
    return a.new_empty(a.shape[kind == "tn"], b.shape[kind != "nt"])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:2])
    ctx.kind = inputs[2]


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    (a, b), kind = ctx.saved_tensors, ctx.kind
    left = matmul_op(*_left(g, b, kind)) if ctx.needs_input_grad[0] else None
    right = matmul_op(*_right(g, a, kind)) if ctx.needs_input_grad[1] else None
    return left, right, None


matmul_op.register_autograd(_backward, setup_context=_save)

# -------------------------------------------------------------------------------------------------------------------- computing


def _torch(a: Tensor, b: Tensor, kind: str) -> Tensor:
    return (a.T if kind == "tn" else a) @ (b.T if kind == "nt" else b)


def _computed(a: Tensor, b: Tensor, kind: str) -> Tensor:
    m, k = a.shape if kind != "tn" else a.shape[::-1]
    n = b.shape[kind != "nt"]
    # Rows are copied by fours.
    along = {"nn": (k, n), "nt": (k, k), "tn": (m, n)}[kind]
    if a.device.type != "cuda" or m * n * k < SMALL or any(size % 4 for size in along):
        return _torch(a, b, kind)
    a, b = a.contiguous(), b.contiguous()
    if a.data_ptr() % 16 or b.data_ptr() % 16:
        return _torch(a, b, kind)
    rows = 64 if kind == "tn" else 128
    tiles = -(-m // rows) * -(-n // 64)
    steps = -(-k // _DEPTH)
    parts = max(1, min(_BLOCKS // tiles, steps // 16))
    length = -(-steps // parts) * _DEPTH
    out = a.new_empty(parts, m, n)
    with torch.cuda.device(a.device):
        _kernel(kind, a.device.index)(tiles * parts, _THREADS, a, b, out, m, n, k, length)
    return out[0] if parts == 1 else out.sum(0)


@functools.cache
def _kernel(kind: str, device: int) -> Kernel:
    return kernel(source(kind), "matmul", device)


def source(kind: str) -> str:
    """CUDA source of `matmul(a, b, c, m, n, k, length)`: one block for each tile of C and each `length` of the k products of its sums."""
    rows, across = (64, 2) if kind == "tn" else (128, 4)
    return (
        f"constexpr int BM = {rows}, BN = 64, BK = {_DEPTH}, WM = {across}, WN = {8 // across};\n"
        f"constexpr bool TA = {str(kind == 'tn').lower()}, TB = {str(kind == 'nt').lower()};\n" + _SOURCE
    )


_SOURCE = """\
typedef long long I;
typedef unsigned U;
constexpr int STAGES = 3, THREADS = 256, MT = BM / WM / 16, NT = BN / WN / 8;
// In shared memory rows lie so that the reads of a warp fall into different banks.
constexpr int SA = TA ? BM + 8 : BK + 4, SB = TB ? BK + 4 : BN + 8, SIZE_A = TA ? BK * SA : BM * SA, SIZE_B = TB ? BN * SB : BK * SB;

__device__ __forceinline__ void copy(float* to, const float* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"((U)__cvta_generic_to_shared(to)), "l"(from), "r"(valid ? 16 : 0));
}
// x = high + low, both with 11 bits: rounded, and what is left (of which the tensor core reads no more).
__device__ __forceinline__ void split(float x, U& high, U& low) {
  high = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
  low = __float_as_uint(x - __uint_as_float(high)) + 0x1000u;
}
__device__ __forceinline__ void multiply(float (&d)[4], const U (&a)[4], const U (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
matmul(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ c, I m, I n, I k, I length) {
  __shared__ __align__(16) float shared_a[STAGES * SIZE_A], shared_b[STAGES * SIZE_B];
  const I tiles_n = (n + BN - 1) / BN, tiles_m = (m + BM - 1) / BM;
  const I tile = blockIdx.x % (tiles_m * tiles_n), part = blockIdx.x / (tiles_m * tiles_n);
  const I m0 = tile / tiles_n * BM, n0 = tile % tiles_n * BN;
  const I first = part * length, last = first + length < k ? first + length : k;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int wm = warp / WN * (BM / WM), wn = warp % WN * (BN / WN);

  auto fetch = [&](I k0, int stage) {
    float* to_a = shared_a + stage * SIZE_A;
    float* to_b = shared_b + stage * SIZE_B;
    constexpr int WIDE_A = (TA ? BM : BK) / 4, WIDE_B = (TB ? BK : BN) / 4;
#pragma unroll
    for (int i = threadIdx.x; i < BM * BK / 4; i += THREADS) {
      const int row = i / WIDE_A, column = i % WIDE_A * 4;
      const I at_m = m0 + (TA ? column : row), at_k = k0 + (TA ? row : column);
      const bool valid = at_m < m && at_k < last;
      copy(to_a + row * SA + column, a + (valid ? (TA ? at_k * m + at_m : at_m * k + at_k) : 0), valid);
    }
#pragma unroll
    for (int i = threadIdx.x; i < BN * BK / 4; i += THREADS) {
      const int row = i / WIDE_B, column = i % WIDE_B * 4;
      const I at_n = n0 + (TB ? row : column), at_k = k0 + (TB ? column : row);
      const bool valid = at_n < n && at_k < last;
      copy(to_b + row * SB + column, b + (valid ? (TB ? at_n * k + at_k : at_k * n + at_n) : 0), valid);
    }
  };
  auto commit = [] { asm volatile("cp.async.commit_group;" ::: "memory"); };

  float sum[MT][NT][4] = {};
  const I steps = (last - first + BK - 1) / BK;
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    if (stage < steps) fetch(first + stage * BK, stage);
    commit();
  }
  for (I step = 0; step < steps; ++step) {
    asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory");
    __syncthreads();
    const I ahead = step + STAGES - 1;
    if (ahead < steps) fetch(first + ahead * BK, (int)(ahead % STAGES));
    commit();
    const float* from_a = shared_a + (int)(step % STAGES) * SIZE_A;
    const float* from_b = shared_b + (int)(step % STAGES) * SIZE_B;
    float part_sum[MT][NT][4] = {};
#pragma unroll
    for (int kk = 0; kk < BK; kk += 8) {
      U high_a[MT][4], low_a[MT][4], high_b[NT][2], low_b[NT][2];
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int row = wm + i * 16 + g + r % 2 * 8, column = kk + t + r / 2 * 4;
          split(from_a[TA ? column * SA + row : row * SA + column], high_a[i][r], low_a[i][r]);
        }
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = kk + t + r * 4, column = wn + j * 8 + g;
          split(from_b[TB ? column * SB + row : row * SB + column], high_b[j][r], low_b[j][r]);
        }
      // The three products one after the other for all tiles: none waits for the one before.
#pragma unroll
      for (int term = 0; term < 3; ++term)
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
          for (int j = 0; j < NT; ++j)
            multiply(part_sum[i][j], term == 0 ? low_a[i] : high_a[i], term == 1 ? low_b[j] : high_b[j]);
    }
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) sum[i][j][r] += part_sum[i][j][r];
  }
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const I row = m0 + wm + i * 16 + g + r * 8, column = n0 + wn + j * 8 + t * 2;
        if (row >= m) continue;
        float* to = c + (part * m + row) * n + column;
        if (n % 2 == 0) {
          if (column < n) *reinterpret_cast<float2*>(to) = make_float2(sum[i][j][r * 2], sum[i][j][r * 2 + 1]);
        } else {
          if (column < n) to[0] = sum[i][j][r * 2];
          if (column + 1 < n) to[1] = sum[i][j][r * 2 + 1];
        }
      }
}
"""
