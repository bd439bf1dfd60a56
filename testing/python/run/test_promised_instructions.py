"""Each rule's kernels, as they lie in the store, hold the instruction that the rule is there for."""

import re
import shutil
import subprocess

import pytest

from bitblas import Matmul, MatmulConfig
from bitblas.schedule.cpu import CPU_RULES
from bitblas.target import host_features, resolve_target

#: The instruction, and a target, activations and weights that lead to the rule.
PROMISES = {
    "avx512_bf16": (r"vdpbf16ps .*%zmm", "llvm", "bfloat16", "uint4"),
    "avx512_vnni": (r"vpdpbusd .*%zmm", "llvm", "int8", "int2"),
    "avx_vnni": (r"vpdpbusd .*%ymm", "alderlake", "int8", "int2"),
    "avx512_maddubs": (r"vpmaddubsw .*%zmm", "skylake-avx512", "int8", "int2"),
    "avx2_maddubs": (r"vpmaddubsw .*%ymm", "haswell", "int8", "int2"),
    "avx512": (r"vfmadd\d+ps .*%zmm", "skylake-avx512", "float32", "nf4"),
    "avx2": (r"vfmadd\d+ps .*%ymm", "haswell", "float32", "nf4"),
    "generic": (r"mulps .*%xmm", "x86-64-v2", "float32", "nf4"),
}
#: Rules of other machines, whose assembly is looked at in compile/test_neon.py.
FOREIGN = {"neon_dot", "neon"}


def test_every_rule_promises_something():
    assert {rule.name for rule in CPU_RULES} == set(PROMISES) | FOREIGN


@pytest.mark.parametrize("m", [1, 8, 64])
@pytest.mark.parametrize("rule", PROMISES)
def test_the_library_holds_the_promised_instruction(rule, m):
    instruction, name, a_dtype, w_dtype = PROMISES[rule]
    target = resolve_target(name)
    if not target.features <= host_features():
        pytest.skip(f"this CPU lacks {sorted(target.features - host_features())}")
    if name == "llvm" and rule.removeprefix("avx512_") not in (
        "",
        *(f.removeprefix("avx512") for f in target.features),
    ):
        pytest.skip(f"this CPU has no rule {rule}")
    if shutil.which("objdump") is None:
        pytest.skip("objdump (Debian's binutils) is missing")
    if rule == "avx512_bf16" and m == 1:
        m = 4  # one row is multiplied in slices
    config = MatmulConfig(
        M=m, N=64, K=256, A_dtype=a_dtype, W_dtype=w_dtype, out_dtype="float32", accum_dtype="float32"
    )
    op = Matmul(config, target=target)
    assert [kernel.rule for kernel in op.plan.kernels] == [rule]
    assert op.artifact is not None
    library = op.artifact.path / "kernel.so"
    code = subprocess.run(["objdump", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert re.search(instruction, code), f"no {instruction} in {library}"
