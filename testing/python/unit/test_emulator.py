"""The emulator that runs CUDA texts on the CPU: what it computes, and that it catches what it is there to catch."""

import math
import os
import re
from fractions import Fraction

import emulator
import pytest
import torch

LAUNCHER = """
#include <cuda_runtime.h>
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/function.h>
extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_main(void*, void* given, int count, void*) {{
  TVM_FFI_SAFE_CALL_BEGIN();
  const TVMFFIAny* args = (const TVMFFIAny*)given;
  {arguments}
  cudaLaunchConfig_t config = {{}};
  config.gridDim = dim3({grid});
  config.blockDim = dim3({block});
  config.dynamicSmemBytes = {shared};
  if (config.dynamicSmemBytes > 49152 &&
      cudaFuncSetAttribute(test_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, {shared}) != cudaSuccess)
    return TVMFFIErrorSetRaisedFromCStr("CUDAError", cudaGetErrorString(cudaGetLastError())), -1;
  const cudaError_t error = cudaLaunchKernelEx(&config, test_kernel, {names});
  if (error != cudaSuccess) return TVMFFIErrorSetRaisedFromCStr("CUDAError", cudaGetErrorString(error)), -1;
  TVM_FFI_SAFE_CALL_END();
}}
"""
HEADERS = "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n#include <cuda_fp8.h>\n"


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """A function of (parameters, body of the kernel, before it) that builds a kernel with a launcher for tensors."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulator"
    directory.mkdir(exist_ok=True)

    def build(parameters, body, before="", grid="1", block="32", shared="0", arch="sm_80"):
        arguments, names = [], []
        for number, parameter in enumerate(parameters.split(",")):
            kind, name = re.fullmatch(r"\s*(.*?)(\w+)\s*", parameter).groups()
            value = f"args[{number}].v_int64"
            if "*" in kind:
                tensor = f"(args[{number}].type_index == 7 ? args[{number}].v_ptr : (char*)args[{number}].v_ptr + 24)"
                value = f"((DLTensor*){tensor})->data"
            arguments.append(f"{kind} {name} = ({kind}){value};")
            names.append(name)
        host = LAUNCHER.format(
            arguments="\n  ".join(arguments), names=", ".join(names), grid=grid, block=block, shared=shared
        )
        kernel = f'{HEADERS}{before}\nextern "C" __global__ void test_kernel({parameters}) {{\n{body}\n}}\n'
        return emulator.load(emulator.build(kernel + host, directory, arch))["main"]

    return build


# ---- matrix instructions ---------------------------------------------------------------------------------------------

_DTYPES = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "s8": torch.int8,
    "u8": torch.uint8,
}
_MMA = [
    *((16, 8, k, d, t, t) for k in (8, 16) for d, t in (("f32", "f16"), ("f32", "bf16"), ("f16", "f16"))),
    *((m, 8, k, "s32", a, b) for m, k in ((16, 32), (16, 16), (8, 16)) for a in ("s8", "u8") for b in ("s8", "u8")),
    *((16, 8, 32, "f32", a, b) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")),
]


def _random(shape, dtype):
    if dtype.is_floating_point:
        return (torch.randint(-16, 17, shape) / 8).to(dtype)
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max + 1, shape).to(dtype)


def _mma_kernel(m, n, k, d, a, b):
    bits = torch.zeros(0, dtype=_DTYPES[a]).element_size() * 8
    counts = {"d": m * n // 32 // (2 if d == "f16" else 1), "a": m * k * bits // 1024, "b": n * k * bits // 1024}
    letter = "f" if d == "f32" else "r"
    numbers = iter(range(20))
    groups = {
        name: "{" + ", ".join(f"%{next(numbers)}" for _ in range(counts[name[0]])) + "}"
        for name in ("d", "a", "b", "dc")
    }
    kind = {"f32": "float", "s32": "int", "f16": "unsigned"}[d]
    outputs = ", ".join(f'"={letter}"(d[{i}])' for i in range(counts["d"]))
    inputs = ", ".join(
        [*(f'"r"(a[{i}])' for i in range(counts["a"])), *(f'"r"(b[{i}])' for i in range(counts["b"]))]
        + [f'"{letter}"(c[{i}])' for i in range(counts["d"])]
    )
    body = f"""
  const int lane = threadIdx.x;
  unsigned a[{counts["a"]}], b[{counts["b"]}];
  {kind} c[{counts["d"]}], d[{counts["d"]}];
  for (int i = 0; i < {counts["a"]}; ++i) a[i] = A[lane * {counts["a"]} + i];
  for (int i = 0; i < {counts["b"]}; ++i) b[i] = B[lane * {counts["b"]} + i];
  for (int i = 0; i < {counts["d"]}; ++i) c[i] = C[lane * {counts["d"]} + i];
  asm volatile("mma.sync.aligned.m{m}n{n}k{k}.row.col.{d}.{a}.{b}.{d} "
               "{groups["d"]}, {groups["a"]}, {groups["b"]}, {groups["dc"]};\\n" : {outputs} : {inputs});
  for (int i = 0; i < {counts["d"]}; ++i) C[lane * {counts["d"]} + i] = d[i];"""
    return f"const unsigned* A, const unsigned* B, {kind}* C", body


def _fragment_a(matrix, per):
    """[m, k] to [32, elements]: in a register `per` neighbours in k, then rows 8 apart, then columns."""
    m, k = matrix.shape
    blocks = matrix.reshape(m // 8, 8, k // (4 * per), 4, per)  # half, group, part, place, element
    return blocks.permute(1, 3, 2, 0, 4).reshape(32, -1).contiguous()


def _fragment_b(matrix, per):
    """[k, n] to [32, elements]."""
    k, n = matrix.shape
    return matrix.reshape(k // (4 * per), 4, per, n).permute(3, 1, 0, 2).reshape(32, -1).contiguous()


def _fragment_c(matrix):
    m = matrix.shape[0]
    return matrix.reshape(m // 8, 8, 4, 2).permute(1, 2, 0, 3).reshape(32, -1).clone()


@pytest.mark.parametrize("kind", _MMA, ids=lambda kind: "m{}n{}k{}-{}-{}-{}".format(*kind))
def test_mma(program, kind):
    m, n, k, d, a, b = kind
    function = program(*_mma_kernel(*kind))
    left, right = _random((m, k), _DTYPES[a]), _random((k, n), _DTYPES[b])
    exact = {"f32": torch.float32, "f16": torch.float16, "s32": torch.int32}[d]
    start = torch.randint(-100, 100, (m, n)).to(exact)
    per = 4 // left.element_size()
    c = _fragment_c(start)
    emulator.run(function, _fragment_a(left, per).view(torch.int32), _fragment_b(right, per).view(torch.int32), c)
    expected = left.double() @ right.double() + start.double()  # exact: small multiples of 1/64
    assert torch.equal(c, _fragment_c(expected.to(exact)))


# ---- arithmetic of 16 and 8 bits -------------------------------------------------------------------------------------

EVERY = torch.arange(65536, dtype=torch.int32).to(torch.int16)
_FLOATS = {"half": torch.float16, "nv_bfloat16": torch.bfloat16}


def _rounded(exact, mantissa, least_exponent, greatest):
    """A Fraction rounded to nearest even among floats of `mantissa` bits after the point, as a Python float."""
    if exact == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(exact))), least_exponent)
    while abs(exact) < Fraction(2) ** exponent and exponent > least_exponent:
        exponent -= 1
    while abs(exact) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    quantum = Fraction(2) ** (exponent - mantissa)
    result = round(exact / quantum) * quantum  # Python rounds halves to even
    return math.copysign(math.inf, exact) if abs(result) > greatest else float(result)


@pytest.mark.parametrize("kind", _FLOATS)
def test_every_value_of_a_16_bit_float(program, kind):
    body = f"""
  const int i = blockIdx.x * 128 + threadIdx.x;
  const {kind} x = (({kind}*)given)[i];
  as_float[i] = (float)x;
  as_int[i] = (int)x;
  back[i] = ({kind})(float)x;
  negative[i] = -x;
  from_int[i] = ({kind})i;"""
    parameters = f"const short* given, float* as_float, int* as_int, {kind}* back, {kind}* negative, {kind}* from_int"
    function = program(parameters, body, grid="512", block="128")
    dtype = _FLOATS[kind]
    floats, ints = torch.zeros(65536), torch.zeros(65536, dtype=torch.int32)
    back, negative, from_int = (torch.zeros(65536, dtype=dtype) for _ in range(3))
    emulator.run(function, EVERY, floats, ints, back, negative, from_int, seeds=(0,))
    value = EVERY.view(dtype)
    assert torch.equal(floats.view(torch.int32)[~value.isnan()], value.float().view(torch.int32)[~value.isnan()])
    assert torch.equal(floats.isnan(), value.isnan())
    assert torch.equal(back.view(torch.int16)[~value.isnan()], EVERY[~value.isnan()])
    assert torch.equal(negative.view(torch.int16)[~value.isnan()], (-value).view(torch.int16)[~value.isnan()])
    assert torch.equal(from_int, torch.arange(65536).to(dtype))
    wide = value.double()
    expected = wide.nan_to_num(nan=0.0, posinf=2**31 - 1, neginf=-(2**31)).clamp(-(2**31), 2**31 - 1).trunc()
    assert torch.equal(ints, expected.to(torch.int64).to(torch.int32))


@pytest.mark.parametrize("kind", _FLOATS)
def test_operations_are_rounded_once(program, kind):
    names = ("__hadd", "__hsub", "__hmul", "__hmax", "__hmin")
    stores = "\n".join(f"  results[{n} * 16384 + i] = {name}(x, y);" for n, name in enumerate(names))
    body = f"""
  const int i = blockIdx.x * 128 + threadIdx.x;
  const {kind} x = a[i], y = b[i];
{stores}
  {kind}2 p, q;
  p.x = y, p.y = x, q.x = x, q.y = y;
  results[5 * 16384 + i] = x / y;
  results[6 * 16384 + i] = __hfma(x, y, c[i]);
  results[7 * 16384 + i] = __hadd2(p, q).y;
  unsigned fused;
  asm("fma.rn.{"" if kind == "half" else "b"}f16x2 %0, %1, %2, %3;" : "=r"(fused)
      : "r"(*(unsigned*)&p), "r"(*(unsigned*)&q), "r"((unsigned)*(unsigned short*)&c[i]));
  results[8 * 16384 + i] = *({kind}*)&fused;"""
    function = program(
        f"const {kind}* a, const {kind}* b, const {kind}* c, {kind}* results", body, grid="128", block="128"
    )
    dtype = _FLOATS[kind]
    a, b, c = (torch.randint(-32768, 32768, (16384,)).to(torch.int16).view(dtype) for _ in range(3))
    a[:8192] = torch.randn(8192).to(dtype)  # of one size: ties, cancellation
    b[:8192] = torch.randn(8192).to(dtype)
    c[:4096] = -(a[:4096].float() * b[:4096].float()).to(dtype)
    results = torch.zeros(9, 16384, dtype=dtype)
    emulator.run(function, a, b, c, results, seeds=(0,))
    assert torch.equal(results[6].nan_to_num(), results[8].nan_to_num())
    finite = a.isfinite() & b.isfinite() & c.isfinite()
    limits = (10, -14, torch.finfo(dtype).max) if kind == "half" else (7, -126, torch.finfo(dtype).max)
    both_zero = (a == 0) & (b == 0)
    for row, exact in (
        (0, lambda x, y, z: x + y),
        (1, lambda x, y, z: x - y),
        (2, lambda x, y, z: x * y),
        (3, lambda x, y, z: max(x, y)),
        (4, lambda x, y, z: min(x, y)),
        (5, lambda x, y, z: x / y),
        (6, lambda x, y, z: x * y + z),
        (7, lambda x, y, z: x + y),
    ):
        for i in range(row % 3, 16384, 5):
            if not finite[i] or both_zero[i] or (row == 5 and b[i] == 0):
                continue
            expected = _rounded(exact(*(Fraction(float(t[i])) for t in (a, b, c))), *limits)
            assert float(results[row, i]) == expected, (row, float(a[i]), float(b[i]), float(c[i]))


def test_eight_bit_floats(program):
    body = """
  const int i = threadIdx.x;
  for (int kind = 0; kind < 2; ++kind) {
    const unsigned short two = i | i << 8;
    unsigned decoded;
    if (kind == 0) {
      asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(decoded) : "h"(two));
      __nv_fp8_e4m3 x; x.__x = i; values[i] = (float)x;
      codes[i] = __nv_fp8_e4m3(given[i]).__x;
    } else {
      asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(decoded) : "h"(two));
      __nv_fp8_e5m2 x; x.__x = i; values[256 + i] = (float)x;
      codes[256 + i] = __nv_fp8_e5m2(given[i]).__x;
    }
    halves[256 * kind + i] = decoded;
  }"""
    function = program("const float* given, float* values, unsigned* halves, unsigned char* codes", body, block="256")
    given = torch.cat([torch.randn(200), torch.randn(56) * 1e-2])
    values, halves = torch.zeros(2, 256), torch.zeros(2, 256, dtype=torch.int32)
    codes = torch.zeros(2, 256, dtype=torch.uint8)
    emulator.run(function, given, values, halves, codes)
    for row, dtype in enumerate((torch.float8_e4m3fn, torch.float8_e5m2)):
        expected = torch.arange(256).to(torch.uint8).view(dtype).float()
        assert torch.equal(values[row].nan_to_num(7e7), expected.nan_to_num(7e7))
        both = halves[row].view(torch.float16).reshape(256, 2).float().nan_to_num(7e7)
        assert torch.equal(both, expected.half().float().nan_to_num(7e7)[:, None].expand(256, 2))
        assert torch.equal(codes[row], given.to(dtype).view(torch.uint8))


# ---- integers and bits -----------------------------------------------------------------------------------------------


def _bits32(count=512):
    return torch.randint(-(2**31), 2**31, (count,)).to(torch.int32)


def _unsigned(tensor):
    return tensor.to(torch.int64) & 0xFFFFFFFF


def test_bits(program):
    body = """
  const int i = blockIdx.x * 128 + threadIdx.x;
  const unsigned x = a[i], y = b[i], z = c[i];
  unsigned r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(x), "r"(y), "r"(z)); out[i] = r;
  asm("prmt.b32 %0, %1, %2, 0x7531;" : "=r"(r) : "r"(x), "r"(y)); out[512 + i] = r;
  out[1024 + i] = __byte_perm(x, y, 0x4620);
  out[1536 + i] = __funnelshift_r(x, y, z);
  out[2048 + i] = __popc(x);
  out[2560 + i] = __vsub4(x, y);
  out[3072 + i] = __dp4a((int)x, (int)y, (int)z);
  out[3584 + i] = __dp4a(x, y, z);
  asm("{ .reg .b32 t<2>; shr.u32 t0, %1, 4; and.b32 t1, t0, 0x0f0f0f0f; add.u32 %0, t1, 1; }" : "=r"(r) : "r"(x));
  out[4096 + i] = r;
  asm("bfe.s32 %0, %1, 5, 7;" : "=r"(r) : "r"(x)); out[4608 + i] = r;
  asm("lop3.b32 %0, %1, %2, %3, (0xf0 & 0xcc) | 0xaa;\\n" : "=r"(r) : "r"(x), "r"(y), "r"(z)); out[5120 + i] = r;"""
    function = program(
        "const unsigned* a, const unsigned* b, const unsigned* c, unsigned* out", body, grid="4", block="128"
    )
    a, b, c = _bits32(), _bits32(), _bits32()
    out = torch.zeros(11, 512, dtype=torch.int32)
    emulator.run(function, a, b, c, out)
    x, y, z = _unsigned(a), _unsigned(b), _unsigned(c)
    bytes_of = lambda t: t.view(torch.uint8).reshape(-1, 4).to(torch.int64)  # noqa: E731
    signed = lambda t: t.view(torch.int8).reshape(-1, 4).to(torch.int64)  # noqa: E731
    both = torch.cat([bytes_of(a), bytes_of(b)], dim=1)
    pick = lambda *order: sum(both[:, byte] << (8 * n) for n, byte in enumerate(order))  # noqa: E731
    lanes = (bytes_of(a) - bytes_of(b)) & 255
    expected = [
        (x & y) | z,
        pick(1, 3, 5, 7),
        pick(0, 2, 6, 4),
        ((y << (32 - (z & 31))) | (x >> (z & 31))) & 0xFFFFFFFF,
        sum((x >> n) & 1 for n in range(32)),
        sum(lanes[:, n] << (8 * n) for n in range(4)),
        (signed(a) * signed(b)).sum(1) + c,
        (bytes_of(a) * bytes_of(b)).sum(1) + z,
        ((x >> 4) & 0x0F0F0F0F) + 1,
        (a.to(torch.int64) << 52 >> 57),
        (x & y) | z,
    ]
    for row, one in enumerate(expected):
        assert torch.equal(_unsigned(out[row]), one & 0xFFFFFFFF), row


# ---- warps -----------------------------------------------------------------------------------------------------------


def _shuffled(mode, values, operand, width):
    """The CUDA C++ Programming Guide, "Warp Shuffle Functions", for 32 lanes."""
    result = []
    for lane in range(32):
        begin = lane // width * width
        source = {
            "": begin + operand % width,
            "_up": lane - operand,
            "_down": lane + operand,
            "_xor": lane ^ operand,
        }[mode]
        outside = source < begin or source >= begin + width
        if mode == "_xor" and source < begin:  # earlier groups may be read
            outside = False
        result.append(values[lane if outside else source])
    return result


def test_shuffles(program):
    cases = [
        (mode, operand, width)
        for mode in ("", "_up", "_down", "_xor")
        for operand in (1, 3, 8)
        for width in (32, 16, 8)
    ]
    lines = [
        f"  out[{32 * n} + lane] = __shfl{mode}_sync(0xffffffffu, x, {operand}, {width});"
        for n, (mode, operand, width) in enumerate(cases)
    ]
    function = program("const int* in, int* out", "const int lane = threadIdx.x, x = in[lane];\n" + "\n".join(lines))
    given, out = torch.randint(0, 1000, (32,)).to(torch.int32), torch.zeros(len(cases), 32, dtype=torch.int32)
    emulator.run(function, given, out)
    for row, case in zip(out.tolist(), cases, strict=True):
        mode, operand, width = case
        assert row == _shuffled(mode, given.tolist(), operand, width), case


def test_votes_and_reductions(program):
    body = """
  const int lane = threadIdx.x, warp = threadIdx.y, x = in[32 * warp + lane];
  const bool odd = x & 1;
  int* out = all + 12 * (32 * warp + lane);
  out[10] = __popc(__activemask());
  out[0] = __ballot_sync(0xffffffffu, odd);
  out[1] = __any_sync(0xffffffffu, x > 990);
  out[2] = __all_sync(0xffffffffu, x > 10);
  out[3] = __syncthreads_count(odd);
  out[4] = __syncthreads_or(x == 5);
  out[5] = __reduce_add_sync(0xffffffffu, x);
  double sum = x;
  for (int i = 16; i > 0; i >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, i);
  out[6] = (int)sum;
  asm("{ .reg .pred p, q; setp.gt.s32 p, %1, 10; vote.sync.all.pred q, p, 0xffffffff; selp.u32 %0, 1, 0, q; }"
      : "=r"(out[7]) : "r"(x));
  int got;
  asm volatile("{ .reg .pred p; shfl.sync.down.b32 %0|p, %1, 1, 0x1f, -1; @!p mov.b32 %0, 7; }" : "=r"(got) : "r"(x));
  out[8] = got;
  unsigned lane_again;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane_again));
  out[9] = lane_again;
  out[11] = lane < 16 ? __shfl_sync(0x0000ffffu, x, 3) : __shfl_sync(0xffff0000u, x, 20);"""
    function = program("const int* in, int* all", body, block="32, 2")
    given, out = torch.randint(0, 1000, (2, 32)).to(torch.int32), torch.zeros(2, 32, 12, dtype=torch.int32)
    emulator.run(function, given, out)
    odd = given & 1
    ballot = (odd.to(torch.int64) << torch.arange(32)).sum(1)
    everywhere = given.sum(1, keepdim=True).expand(2, 32)
    expected = [
        ballot[:, None].expand(2, 32),
        (given > 990).any(1, keepdim=True).expand(2, 32),
        (given > 10).all(1, keepdim=True).expand(2, 32),
        odd.sum().expand(2, 32),
        (given == 5).any().expand(2, 32),
        everywhere,
        everywhere,
        (given > 10).all(1, keepdim=True).expand(2, 32),
        torch.cat([given[:, 1:], torch.full((2, 1), 7)], dim=1),
        torch.arange(32).expand(2, 32),
        torch.full((2, 32), 32),
        torch.cat([given[:, 3:4].expand(2, 16), given[:, 20:21].expand(2, 16)], dim=1),
    ]
    for column, one in enumerate(expected):
        assert torch.equal(_unsigned(out[..., column]), one.to(torch.int64)), column


def test_atomics_of_many_blocks(program):
    body = """
  __shared__ unsigned total;
  __shared__ bool last;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  atomicAdd(&total, given[blockIdx.x * 64 + threadIdx.x]);
  atomicMax(greatest, (int)given[blockIdx.x * 64 + threadIdx.x]);
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" :: "l"(sum), "f"(0.5f) : "memory");
  __syncthreads();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = total;
    __threadfence();
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
    last = before == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {  // the block that comes last adds up what all have left
    unsigned all = 0;
    for (int i = 0; i < gridDim.x; ++i) all += partial[i];
    *result = all;
  }"""
    parameters = (
        "const unsigned* given, unsigned* partial, unsigned* arrived, unsigned* result, int* greatest, float* sum"
    )
    function = program(parameters, body, grid="5", block="64")
    given = torch.randint(0, 10000, (320,)).to(torch.int32)
    partial, arrived, result, greatest = (torch.zeros(n, dtype=torch.int32) for n in (5, 1, 1, 1))
    total = torch.zeros(1)
    emulator.run(function, given, partial, arrived, result, greatest, total, seeds=range(5))
    assert (int(result), int(greatest), float(total)) == (int(given.sum()), int(given.max()), 160.0)


# ---- memory ----------------------------------------------------------------------------------------------------------


def _ldmatrix(count, transposed, stride=64):
    """The text of a kernel that loads `count` matrices from rows of 16 bytes that lie `stride` bytes apart."""
    registers = ", ".join(f"%{n}" for n in range(count))
    outputs = ", ".join(f'"=r"(r[{n}])' for n in range(count))
    return f"""
  extern __shared__ __align__(128) char rows[];
  const int lane = threadIdx.x;
  *(uint4*)(rows + lane * {stride}) = ((const uint4*)given)[lane];
  __syncwarp();
  unsigned r[{count}], address = (unsigned)__cvta_generic_to_shared(rows + lane * {stride});
  asm volatile("ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 {{{registers}}}, [%{count}];\\n"
               : {outputs} : "r"(address));
  for (int i = 0; i < {count}; ++i) out[lane * {count} + i] = r[i];"""


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(program, count, transposed):
    function = program("const short* given, unsigned* out", _ldmatrix(count, transposed), shared="4096")
    given, out = torch.randint(-30000, 30000, (4, 8, 8)).to(torch.int16), torch.zeros(32, count, dtype=torch.int32)
    statistics = emulator.run(function, given, out)
    matrices = given.transpose(1, 2) if transposed else given
    expected = matrices.reshape(4, 32, 2)[:count].permute(1, 0, 2).reshape(32, 2 * count)
    assert torch.equal(out.view(torch.int16), expected)
    assert statistics.shared_passes == 4 + count


def test_bank_conflicts(program):
    """Rows of 64 bytes: 4 of 8 in one bank; of 80: none."""
    for stride, conflicts in ((64, 3), (80, 0), (128, 7), (16, 0)):
        function = program("const short* given, unsigned* out", _ldmatrix(4, False, stride), shared="4096")
        given, out = torch.zeros(4, 8, 8, dtype=torch.int16), torch.zeros(32, 4, dtype=torch.int32)
        statistics = emulator.run(function, given, out, seeds=(3,))
        assert (statistics.shared_passes, statistics.shared_conflicts) == (8, 8 * conflicts)
        assert emulator.bank_conflicts() == {9: (4, 4 * conflicts), 12: (4, 4 * conflicts)}


def test_bank_conflicts_of_words(program):
    body = """
  __shared__ int words[32 * 33];
  __shared__ unsigned char bytes[128];
  const int t = threadIdx.x;
  words[t] = 0;
  words[32 * t + 32] = 1;
  __syncwarp();
  int x = words[33 * t] + words[5];
  bytes[t % 4 * 32 + t / 4] = x;
  out[t] = t;"""
    emulator.run(program("int* out", body), torch.zeros(32, dtype=torch.int32))
    assert emulator.bank_conflicts() == {10: (1, 0), 11: (1, 31), 13: (2, 0), 14: (1, 0)}


def test_stmatrix_and_movmatrix(program):
    body = """
  __shared__ __align__(16) short rows[16 * 8];
  const int lane = threadIdx.x;
  const unsigned a = given[lane], b = given[32 + lane];
  const unsigned address = (unsigned)__cvta_generic_to_shared(rows + lane % 16 * 8);
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" :: "r"(address), "r"(a), "r"(b) : "memory");
  __syncwarp();
  out[lane] = ((unsigned*)rows)[lane], out[32 + lane] = ((unsigned*)rows)[32 + lane];
  unsigned moved;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(moved) : "r"(a));
  out[64 + lane] = moved;"""
    function = program("const unsigned* given, unsigned* out", body, arch="sm_90a")
    given, out = torch.randint(-30000, 30000, (2, 8, 8)).to(torch.int16), torch.zeros(3, 8, 8, dtype=torch.int16)
    emulator.run(function, given, out)
    assert torch.equal(out[:2], given)
    assert torch.equal(out[2], given[0].T)


_COPY = """
  __shared__ __align__(16) float tile[2][128];
  const int t = threadIdx.x;
  for (int stage = 0; stage < 2; ++stage) {
    const unsigned to = (unsigned)__cvta_generic_to_shared(&tile[stage][4 * t]);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(in + stage * 128 + 4 * t), "r"(bytes(t)));
    asm volatile("cp.async.commit_group;");
  }
  WAIT(1)
  BARRIER
  out[t] = tile[0][(t * 7 + 3) % 128];
  WAIT(0)
  BARRIER
  out[32 + t] = tile[1][(t * 7 + 3) % 128];"""
_COPY_BEFORE = """
#define WAIT(n) asm volatile("cp.async.wait_group %0;" :: "n"(n));
#define BARRIER __syncthreads();
__device__ __forceinline__ int bytes(int t) { return t == 31 ? 4 : 16; }
"""


def _copy(program, body=_COPY):
    function = program("const float* in, float* out", body, _COPY_BEFORE)
    given, out = torch.randn(2, 128), torch.zeros(2, 32)
    emulator.run(function, given, out, seeds=range(3))
    expected = given.clone()
    expected[:, 125:] = 0
    assert torch.equal(out, expected[:, [(t * 7 + 3) % 128 for t in range(32)]])


def test_cp_async(program):
    _copy(program)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("WAIT(1)", "", "before thread .* has waited"),
        ("WAIT(1)", "WAIT(2)", "before thread .* has waited"),
        ("WAIT(0)", "", "before thread .* has waited"),
        ("BARRIER", "", "shared memory race|before thread .* has waited"),
        ("cp.async.commit_group;", "// nothing", "before thread .* has waited"),
        ("[4 * t])", "[4 * t + 1])", "misaligned shared address"),
        ("stage * 128 + 4 * t", "stage * 128 + 4 * t + 4", "out of bounds"),
        ("stage * 128 + 4 * t", "stage * 128 + 4 * t + 1", "misaligned"),
    ],
)
def test_a_wrong_cp_async_is_caught(program, old, new, message):
    with pytest.raises(RuntimeError, match=message):
        _copy(program, _COPY.replace(old, new))


def test_predicated_instructions(program):
    """As people write loads at an edge, and as TVM writes predicated copies."""
    body = """
  __shared__ __align__(16) int tile[128];
  const int t = threadIdx.x;
  uint4 v = make_uint4(1, 2, 3, 4);
  asm volatile("{\\n  .reg .pred p;\\n  setp.ne.b32 p, %5, 0;\\n  mov.u32 %0, 9;\\n"
               "  @p ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\\n}\\n"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "l"(in + 4 * t), "r"((int)(t < n)));
  const unsigned to = (unsigned)__cvta_generic_to_shared(tile + 4 * t);
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" :: "r"(to), "r"(0), "r"(0), "r"(0), "r"(0));
  __asm__ __volatile__(
    "{\\n" "  .reg .pred p;\\n" "  setp.ne.b32 p, %0, 0;\\n"
    "  @p cp.async.ca.shared.global.L2::128B [%1], [%2], %3;\\n" "  @!p st.shared.v4.u32 [%1], {%4, %5, %6, %7};\\n" "}\\n"
    :: "r"((int)(t < n)), "r"(to), "l"(in + 4 * t), "n"(16), "r"(5), "r"(5), "r"(5), "r"(5));
  asm volatile("cp.async.wait_all;" ::: "memory");
  unsigned a, b;
  asm volatile("{ .reg .u64 address; cvta.to.shared.u64 address, %2; ld.shared.v2.u32 {%0, %1}, [address + 8]; }"
               : "=r"(a), "=r"(b) : "l"(tile + 4 * t));
  asm volatile("st.global.v4.s32 [%0], {%1, %2, %3, %4};" :: "l"(out + 8 * t), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w));
  ((int2*)(out + 8 * t + 4))[0] = make_int2(a, b);"""
    function = program("const int* in, int* out, int n", body)
    given, out = torch.randint(10, 1000, (20, 4)).to(torch.int32), torch.zeros(32, 8, dtype=torch.int32)
    emulator.run(function, given, out, 20)
    assert torch.equal(out[:20, :4], given)
    assert torch.equal(out[:20, 4:6], given[:, 2:])
    assert out[20:, :6].tolist() == [[9, 2, 3, 4, 5, 5]] * 12


# ---- faults ----------------------------------------------------------------------------------------------------------

_REVERSE = """
  __shared__ float tile[64];
  const int t = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    tile[t] = in[t] + round;
    __syncthreads();
    out[64 * round + t] = tile[63 - t];
    __syncthreads();
  }"""


def test_a_kernel_with_barriers_is_right(program):
    function = program("const float* in, float* out", _REVERSE, block="64")
    given, out = torch.randn(64), torch.zeros(2, 64)
    statistics = emulator.run(function, given, out)
    assert torch.equal(out, torch.stack([given, given + 1]).flip(1))
    assert (statistics.launches, statistics.blocks, statistics.threads, statistics.barriers) == (1, 1, 64, 4)


_NAMED = """
  __shared__ int tile[128];
  const int t = threadIdx.x, group = t / 64, number = group + 1;
  tile[t] = t;
  asm volatile("bar.sync %0, 64;" :: "r"(number) : "memory");
  out[t] = tile[t ^ XOR];
  if (t < 64) {
    tile[t ^ XOR] = 1000 + t;
    asm volatile("bar.arrive 3, 128;" ::: "memory");
  } else {
    asm volatile("bar.sync 3, 128;" ::: "memory");
    out[t] += tile[127 - t];
  }"""


def test_named_barriers(program):
    """Halves of a block that wait for themselves, then one that hands over to the other without waiting."""
    out = torch.zeros(128, dtype=torch.int32)
    emulator.run(program("int* out", _NAMED, "#define XOR 33", block="128"), out, seeds=range(3))
    t = torch.arange(128)
    assert torch.equal(out, ((t ^ 33) + torch.where(t < 64, 0, 1000 + ((127 - t) ^ 33))).to(torch.int32))


@pytest.mark.parametrize(
    ("old", "new"),
    [("XOR", "64"), ('asm volatile("bar.sync 3, 128;" ::: "memory");', 'asm volatile("bar.arrive 3, 128;");')],
)
def test_named_barriers_that_order_too_little(program, old, new):
    function = program("int* out", _NAMED.replace(old, new), "#define XOR 33", block="128")
    with pytest.raises(RuntimeError, match="shared memory race"):
        emulator.run(function, torch.zeros(128, dtype=torch.int32), seeds=range(3))


_RACE = "shared memory race: byte .* (read by .* in line 12 .* written by .* in line 10 |written by .* in line 10 .* read by)"
_FAULTS = {
    "no barrier after a write": (
        _REVERSE.replace("__syncthreads();", "", 1),
        _RACE,
    ),
    "no barrier after a read": (
        _REVERSE.replace("63 - t];\n    __syncthreads();", "63 - t];"),
        _RACE,
    ),
    "a barrier of a warp only": (_REVERSE.replace("__syncthreads", "__syncwarp"), "shared memory race"),
    "a barrier for half of a warp": (
        _REVERSE.replace("__syncthreads();", "if (t % 32 < 16) __syncthreads();"),
        "lane|exited",
    ),
    "a barrier for one warp": (
        _REVERSE.replace("__syncthreads();", "if (t < 32) __syncthreads();"),
        "deadlock.*exited|race",
    ),
    "two barriers that are not one": (
        _REVERSE.replace("__syncthreads();", "if (t & 1)\n__syncthreads();\nelse\n__syncthreads();"),
        "divergence in warp",
    ),
    "an early exit": ("  if (threadIdx.x == 40) return;\n" + _REVERSE, "deadlock|exited"),
    "a named barrier that never fills": ('if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;");', "deadlock|exited"),
    "barriers that wait for each other": (
        'if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;"); else asm volatile("bar.sync 2, 64;");',
        "deadlock: 64 threads wait",
    ),
    "a write beyond static shared memory": (
        _REVERSE.replace("tile[t] =", "tile[t + 1] ="),
        "index 64 is out of bounds",
    ),
    "a read before static shared memory": (
        _REVERSE.replace("tile[63 - t]", "tile[62 - t]"),
        "index -1 is out of bounds",
    ),
    "a write beyond static shared memory by a pointer": (
        "__shared__ float tile[64]; float* p = tile; p[threadIdx.x + (int)(in[0] * 0) + 1] = 0;",
        "4 bytes written in line 6 out of bounds at byte 256 of a static",
    ),
    "a write beyond dynamic shared memory": (
        "extern __shared__ float tile[]; tile[threadIdx.x + 65] = 0;",
        "4 bytes written in line 6 out of bounds at byte 512 of dynamic",
    ),
    "a read beyond a tensor": (
        "out[threadIdx.x] = in[threadIdx.x + 1];",
        r"4 bytes read in line 6 out of bounds, at offset 256 of argument 0 \(64,\)",
    ),
    "a write before a tensor": ("out[(int)threadIdx.x - 1] = in[threadIdx.x];", "written .* offset -4 of argument 1"),
    "a divergent shuffle": (
        "float x = in[threadIdx.x]; if (threadIdx.x & 1)\n x += __shfl_xor_sync(0xffffffffu, x, 1);\n out[threadIdx.x] = x;",
        "waits for lane|has exited",
    ),
    "two shuffles that are not one": (
        "float x = in[threadIdx.x]; if (threadIdx.x & 1)\n x += __shfl_xor_sync(~0u, x, 1);\nelse\n"
        " x += __shfl_xor_sync(~0u, x, 2);\n out[threadIdx.x] = x;",
        "divergence in warp",
    ),
    "a shuffle without its own lane": (
        "out[threadIdx.x] = __shfl_sync(1, in[threadIdx.x], 0);",
        "which its mask .* not name",
    ),
    "vectors in one place": (
        "__shared__ uint4 tile[64]; tile[threadIdx.x & 62] = make_uint4(1, 2, 3, threadIdx.x);",
        "race: byte .* written by .* in line 6 .* written by .* in line 6",
    ),
    "structs in one place": (
        "struct Big { int x[64]; }; __shared__ Big tile[2]; Big own; own.x[0] = 1; tile[threadIdx.x / 32] = own;",
        "race: byte .* written by .* in line 6 .* written by .* in line 6",
    ),
    "atomics and a plain write": (
        "__shared__ int n; n = 0; __syncthreads(); if (threadIdx.x == 40) n = 3; else atomicAdd(&n, 1);",
        "race: byte .* written by .* written by",
    ),
    "a misaligned vector": ("((float4*)out)[0] = *(const float4*)(in + 1);", "line 6: .* misaligned"),
    "a misaligned asm vector": (
        'float a, b; asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(a), "=f"(b) : "l"(in + 1)); *out = a + b;',
        "not a multiple",
    ),
    "a misaligned ldmatrix": (
        "extern __shared__ char tile[]; unsigned r, a = (unsigned)__cvta_generic_to_shared(tile) + 8;\n asm volatile("
        '"ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r) : "r"(a));',
        "no multiple of 16",
    ),
    "an index beyond a local array": (
        "float a[4]; for (int i = 0; i < 4; ++i) a[i] = in[i]; *out = a[(int)in[0] * 0 + threadIdx.x];",
        "index [0-9]+ is out of bounds of its array",
    ),
    "a shift too far": ("out[0] = 1 << (threadIdx.x + 1);", "a shift by [3-6][0-9]"),
    "a null pointer": ("*(volatile int*)(threadIdx.x * 0ll) = 1;", "misaligned|SIGSEGV|out of bounds"),
    "a full stack": (
        "volatile char big[1 << 20]; for (int i = 0; i < (1 << 20); i += 512) big[i] = 1; *out = big[5];",
        "SIGSEGV.*stack is full",
    ),
    "a division by zero": ("*out = 7 / (int)(in[0] * 0);", "SIGFPE"),
    "waiting for another block": ("volatile float* p = out; while (p[0] == 0) {}", "no progress"),
    "an assertion": ("assert(threadIdx.x < 64 && in[0] > 1e9f);", "assertion failed"),
    "a trap": ('asm volatile("trap;");', "trap"),
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_a_fault_is_an_error(program, fault):
    body, message = _FAULTS[fault]
    function = program("const float* in, float* out", body, block="64", shared="512")
    with pytest.raises(RuntimeError, match=message):
        emulator.run(function, torch.rand(64), torch.zeros(2, 64))
    good = program("const float* in, float* out", _REVERSE, block="64")  # the emulator goes on
    emulator.run(good, torch.rand(64), torch.zeros(2, 64))


_DEPENDENT = {
    "uninitialised shared memory": "__shared__ half tile[64]; if (threadIdx.x) tile[threadIdx.x] = 0; __syncwarp();"
    " out[threadIdx.x] = __half_as_ushort(tile[threadIdx.x & 32]);",
    "threads that write one place": "out[0] = threadIdx.x;",
    "blocks that write one place": "out[0] = blockIdx.x;",
    "tickets": "out[threadIdx.x] = atomicAdd(counter, 1);",
}


@pytest.mark.parametrize("case", _DEPENDENT)
def test_results_that_depend_on_the_order(program, case):
    function = program("int* out, int* counter", _DEPENDENT[case], block="64", grid="7")
    with pytest.raises(emulator.OrderError, match="argument 0 differs"):
        emulator.run(function, torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), seeds=range(4))


@pytest.mark.parametrize(
    ("launch", "arch", "message"),
    [
        ({"block": "1025"}, "sm_80", r"invalid launch: a block of \(1025, 1, 1\)"),
        ({"grid": "1, 65536"}, "sm_80", r"invalid launch: a grid of \(1, 65536, 1\)"),
        ({"shared": "65537"}, "sm_75", "65537 bytes of dynamic shared memory, 65536 are allowed on sm_75"),
        ({"shared": "166913"}, "sm_80", "166912 are allowed on sm_80"),
        ({"shared": "101377"}, "sm_89", "101376 are allowed on sm_89"),
        ({"shared": "232449"}, "sm_90", "232448 are allowed on sm_90"),
    ],
)
def test_launches_that_a_card_refuses(program, launch, arch, message):
    function = program("float* out", "out[0] = 1;", arch=arch, **launch)
    with pytest.raises(RuntimeError, match=message):
        emulator.run(function, torch.zeros(1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('asm volatile("wgmma.fence.sync.aligned;");', r"does not know: wgmma\.fence\.sync\.aligned"),
        (
            'asm("mma.sync.aligned.m16n8k8.row.col.s32.s8.s8.s32 {%0}, {%1}, {%1}, {%0};" : "+r"(a) : "r"(b));',
            "no such shape",
        ),
        ('asm("add.u32 %0, %1, %2;" : "=r"(a) : "r"(b));', "there is no operand %2"),
        ('asm("add.u32 %0, %1, x;" : "=r"(a) : "r"(b));', "an operand that is not known: x"),
        ('asm("cp.async.cg.shared.global [%0], [%1], 8;" :: "r"(a), "l"(p));', "copies 16 bytes, not 8"),
        ("void f() { __shared__ int a, b; }", "shared memory that the emulator does not know"),
        ("__shared__ int a[4];", "declare shared memory in a function"),
    ],
)
def test_texts_that_are_not_known(text, message):
    with pytest.raises(emulator.TranslationError, match=message):
        emulator.translate(text)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_instructions_that_another_architecture_has(program, arch):
    """What the preprocessor drops need not be known."""
    body = """
#if __CUDA_ARCH__ >= 900
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
  out[0] = 7;"""
    if arch == "sm_90a":
        with pytest.raises(emulator.TranslationError, match=r"does not know: wgmma\.fence\.sync\.aligned\nin: asm"):
            program("int* out", body, arch=arch)
        return
    out = torch.zeros(1, dtype=torch.int32)
    emulator.run(program("int* out", body, block="1", arch=arch), out)
    assert int(out) == 7


def test_translation_keeps_lines():
    text = (
        '// asm("no")\nint a;\nconst char* s = "asm(x)";\n#define M \\\n  asm("mov.u32 %0, 1;" \\\n : "=r"(a))\nint b;'
    )
    translated = emulator.translate(text)
    assert translated.splitlines()[-1] == "int b;"
    assert translated.count("\n") == text.count("\n")
    assert 'const char* s = "asm(x)";' in translated
