"""Texts of TVM's CUDA code generator in the emulator: its preambles for every dtype, and an operator with its launcher."""

import emulator
import numpy as np
import pytest
import torch
import tvm
from tvm import s_tir, te, tirx
from tvm.backend.cuda.host import export_cuda_host
from tvm.script import tirx as T

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
FLOATS = ("float16", "bfloat16", "float32", "float64")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Functions by name, from prim_funcs by name; `before` goes before TVM's text, `edit` changes it."""
    directory = tmp_path_factory.mktemp("emulator")

    def build(functions, before="", arch="sm_90", edit=str):
        target = tvm.target.Target(
            {"kind": "cuda", "arch": arch, "max_threads_per_block": 1024, "thread_warp_size": 32}, host="cuda_host"
        )
        named = {name: function.with_attr("global_symbol", name) for name, function in functions.items()}
        with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
            module = tvm.compile(tvm.IRModule(named), target=target).mod
        return emulator.load(emulator.build(before + edit(export_cuda_host(module)), directory, arch))

    return build


def elementwise(dtypes, function, lanes):
    """The last of `dtypes` from the others: 256 elements, `lanes` a thread."""
    given = [te.placeholder((256,), dtype, name=f"A{n}") for n, dtype in enumerate(dtypes[:-1])]
    result = te.compute((256,), lambda i: function(*(one[i] for one in given)), name="B")
    schedule = s_tir.Schedule(te.create_prim_func([*given, result]))
    (loop,) = schedule.get_loops(schedule.get_sblock("B"))
    outer, lane = schedule.split(loop, [None, lanes])
    block, thread = schedule.split(outer, [None, 8])
    schedule.bind(block, "blockIdx.x")
    schedule.bind(thread, "threadIdx.x")
    if lanes > 1:
        schedule.vectorize(lane)
    return schedule.mod["main"]


def sample(dtype, low=1):
    steps = 4 if DTYPES[dtype].is_floating_point else 1
    return (torch.randint(low, 100, (256,)).double() / steps).to(DTYPES[dtype])


@pytest.mark.parametrize("source", DTYPES)
def test_casts(build, source):
    """Every cast of one element; of 2, 4 and 8 at once those for which TVM's text is right."""
    cases = {
        f"cast_{lanes}_{dtype}": (dtype, lanes)
        for dtype in DTYPES
        for lanes in (1, 2, 4, 8)
        if not (source != dtype and "float8" in source and "float8" in dtype)  # CUDA has no such conversion
        if lanes == 1
        or (dtype in (source, "float32", "float16") and "float8" not in source + dtype and "64" not in source)
    }
    functions = {
        name: elementwise((source, dtype), lambda x, dtype=dtype: x.astype(dtype), lanes)
        for name, (dtype, lanes) in cases.items()
    }
    module = build(functions)
    for name, (dtype, _) in cases.items():
        given, result = sample(source), torch.zeros(256, dtype=DTYPES[dtype])
        emulator.run(module[name], given, result, seeds=(0,))
        assert torch.equal(result.double(), given.to(DTYPES[dtype]).double()), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int32", "int64"])
def test_arithmetic(build, dtype):
    both = {
        "add": (lambda x, y: x + y, torch.add),
        "sub": (lambda x, y: x - y, torch.sub),
        "mul": (lambda x, y: x * y, torch.mul),
        "max": (tirx.max, torch.maximum),
        "min": (tirx.min, torch.minimum),
        "select": (lambda x, y: tirx.if_then_else(x < y, x, y), torch.minimum),
    }
    if dtype in FLOATS:
        both |= {
            "div": (lambda x, y: x / y, torch.div),
            "sqrt": (lambda x, y: tirx.sqrt(x), lambda x, y: torch.from_numpy(np.sqrt(x.double().numpy())).to(x)),
            "exp": (lambda x, y: tirx.exp(x / y), lambda x, y: (x / y).exp()),
        }
        if dtype != "bfloat16":  # which TVM refuses
            both |= {"isnan": (lambda x, y: tirx.Select(tirx.isnan(x), y, x), lambda x, y: x)}
    else:
        both |= {"bits": (lambda x, y: ((x >> 2) & y) | (x << 1), lambda x, y: ((x >> 2) & y) | (x << 1))}
    functions = {
        f"{name}_{lanes}": elementwise((dtype,) * 3, function, lanes)
        for name, (function, _) in both.items()
        for lanes in ((1, 2, 4) if name in ("add", "mul", "max") else (1,))
    }
    module = build(functions)
    for name in functions:
        x, y, result = sample(dtype), sample(dtype), torch.zeros(256, dtype=DTYPES[dtype])
        emulator.run(module[name], x, y, result, seeds=(0,))
        expected = both[name.split("_")[0]][1](x, y)
        close = (
            {"rtol": torch.finfo(DTYPES[dtype]).eps, "atol": 0.0} if name.startswith("exp") else {"rtol": 0, "atol": 0}
        )
        torch.testing.assert_close(result, expected, msg=name, **close)


STEP = """
#include <cuda_fp16.h>
// sums += tile @ weights[n0 : n0 + 8, k0 : k0 + 16].T, of 16 rows in shared memory; weights is [64, 64]
static __device__ __forceinline__ void emulated_step(float* sums, half* tile, half* weights) {
  const int lane = threadIdx.x;
  unsigned a[4], address = (unsigned)__cvta_generic_to_shared(tile + lane % 16 * 16 + lane / 16 * 8);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address));
  const unsigned* b = (const unsigned*)(weights + lane / 4 * 64 + lane % 4 * 2);
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[4]));
}
"""


@T.prim_func(s_tir=True)
def matmul(a: T.handle, W: T.Buffer((64, 64), "float16"), o: T.handle):
    T.func_attr({"tirx.noalias": True})
    m = T.int32()
    A = T.match_buffer(a, (m, 64), "float16")
    O = T.match_buffer(o, (m, 64), "float16")  # noqa: E741
    for by in T.thread_binding((m + 15) // 16, "blockIdx.y"):
        for bx in T.thread_binding(8, "blockIdx.x"):
            for tx in T.thread_binding(32, "threadIdx.x"):
                with T.sblock("all"):
                    T.reads()
                    T.writes()
                    tile = T.sblock_alloc_buffer((16, 16), "float16", scope="shared.dyn")
                    sums = T.sblock_alloc_buffer((4,), "float32", scope="local")
                    for i in T.unroll(4):
                        sums[i] = T.float32(0)
                    for k in T.serial(4):
                        for i in T.serial(8):
                            tile[i * 2 + tx // 16, tx % 16] = T.if_then_else(
                                by * 16 + i * 2 + tx // 16 < m,
                                A[by * 16 + i * 2 + tx // 16, k * 16 + tx % 16],
                                T.float16(0),
                            )
                        T.tvm_storage_sync("shared")
                        T.evaluate(
                            T.call_extern(
                                "void",
                                "emulated_step",
                                T.address_of(sums[0]),
                                T.address_of(tile[0, 0]),
                                T.address_of(W[bx * 8, k * 16]),
                            )
                        )
                        T.tvm_storage_sync("shared")
                    for i in T.serial(4):
                        if by * 16 + i // 2 * 8 + tx // 4 < m:
                            O[by * 16 + i // 2 * 8 + tx // 4, bx * 8 + tx % 4 * 2 + i % 2] = T.Cast("float16", sums[i])


@pytest.mark.parametrize("m", [1, 15, 16, 37])
def test_matmul_of_any_number_of_rows(build, m):
    function = build({"matmul": matmul}, STEP, "sm_80")["matmul"]
    a, w, out = torch.randn(m, 64).half(), torch.randn(64, 64).half(), torch.full((m, 64), torch.nan).half()
    statistics = emulator.run(function, a, w, out)
    torch.testing.assert_close(out, (a.double() @ w.double().T).half(), rtol=1e-3, atol=1e-3)
    assert statistics.blocks == 8 * ((m + 15) // 16)


@pytest.mark.parametrize("barrier", [0, 1])
def test_a_matmul_without_a_barrier_is_caught(build, barrier):
    def edit(text):
        parts = text.split("__syncthreads();")
        assert len(parts) == 3
        return ("__syncthreads();" * barrier).join(parts[:2]) + ("__syncthreads();" * (1 - barrier)) + parts[2]

    function = build({"matmul": matmul}, STEP, "sm_80", edit)["matmul"]
    with pytest.raises(RuntimeError, match="shared memory race"):
        emulator.run(function, torch.randn(16, 64).half(), torch.randn(64, 64).half(), torch.zeros(16, 64).half())


def test_wrong_shapes_are_refused(build):
    function = build({"matmul": matmul}, STEP, "sm_80")["matmul"]
    with pytest.raises(RuntimeError, match="out of bounds"):  # what TVM's launcher would check is off
        emulator.run(function, torch.zeros(5, 64).half(), torch.zeros(64, 60).half(), torch.zeros(5, 64).half())
