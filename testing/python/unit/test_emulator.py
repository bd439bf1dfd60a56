"""The emulator that runs CUDA texts on the CPU: what it computes, and that it catches what it is there to catch."""

import re
from pathlib import Path

import emulator
import numpy as np
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
    directory = tmp_path_factory.mktemp("emulator")

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
        return emulator.load(emulator.build(kernel + host, Path(directory), arch))["main"]

    return build


# ---- matrix instructions ---------------------------------------------------------------------------------------------------

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
    m, n = matrix.shape
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
