"""What nvcc makes of attention: registers, memory, instructions."""

import re
import subprocess

import pytest

from bitblas import FlashAtten, FlashAttenConfig
from bitblas.build import compile_cuda
from bitblas.cuda.nvcc import find_nvcc
from bitblas.cuda.source import kernel_source
from bitblas.plan import plan_attention
from bitblas.target import resolve_target

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc")


def compiled_cases():
    """The operators that models ask for, on every card; some of many rows in the short run."""
    short = {("sm_80", 128, True), ("sm_89", 64, True), ("sm_90", 128, True), ("sm_90", 64, False)}
    found = [pytest.param(*case, 1024, id="-".join(map(str, case))) for case in sorted(short)]
    for arch in ("sm_80", "sm_89", "sm_90", "sm_75"):
        for dim, causal in ((128, True), (64, True), (64, False), (128, False)):
            marks = (pytest.mark.slow, pytest.mark.exhaustive)
            found.append(pytest.param(arch, dim, causal, None, id=f"{arch}-{dim}-{causal}-all", marks=marks))
    return found


@pytest.mark.parametrize(("arch", "dim", "causal", "seq_len"), compiled_cases())
def test_nothing_spills(arch, dim, causal, seq_len):
    op = FlashAtten(FlashAttenConfig(dim=dim, is_causal=causal, seq_len=seq_len), target=f"cuda -arch={arch}")
    resources = op.artifact.manifest["resources"]
    assert len(resources) == len(op.plan.kernels) >= (3 if seq_len is None else 1)
    for kernel in op.plan.kernels:
        took = resources[f"{kernel.name}_kernel"]
        assert (took["spill_stores"], took["spill_loads"], took["stack"]) == (0, 0, 0), kernel
        assert took["registers"] * kernel.tiling.num_threads * kernel.tiling.blocks_at_once <= 65536


@pytest.mark.parametrize(("arch", "staged"), [("sm_80", True), ("sm_75", False)])
def test_promised_instructions(arch, staged, tmp_path):
    config = FlashAttenConfig(dim=64, seq_len=1024)
    compiled, _ = compile_cuda(plan_attention(config, resolve_target(f"cuda -arch={arch}")))
    source = tmp_path / "k.cu"
    source.write_text(kernel_source(compiled.mod))
    number = arch.removeprefix("sm_")
    command = [find_nvcc(), "-ptx", "-std=c++17", f"-arch=compute_{number}", "-o", str(tmp_path / "k.ptx"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ptx = (tmp_path / "k.ptx").read_text()
    assert ("cp.async.cg.shared.global" in ptx) == staged
    shape = "m16n8k16" if staged else "m16n8k8"
    for instruction in (
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
        f"mma.sync.aligned.{shape}.row.col.f32.f16.f16.f32",
        "ex2.approx.ftz.f32",
        "st.global.v4.u32",
    ):
        assert instruction in ptx, instruction
    assert not re.search(r"\bld\.local|\bst\.local", ptx)
