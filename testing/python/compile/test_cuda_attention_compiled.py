"""What nvcc makes of attention: registers, memory, instructions."""

import re
import subprocess

import pytest

from bitblas import FlashAtten, FlashAttenConfig
from bitblas.cuda.nvcc import find_nvcc

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc")


def compiled_cases():
    """The operators that models ask for, on every card; in turn in the short run."""
    found = []
    for i, arch in enumerate(("sm_80", "sm_89", "sm_90", "sm_75")):
        for j, (dim, causal) in enumerate(((128, True), (64, True), (64, False), (128, False))):
            short = arch != "sm_75" and i == j
            marks = () if short else (pytest.mark.slow, pytest.mark.exhaustive)
            found.append(pytest.param(arch, dim, causal, marks=marks))
    return found


@pytest.mark.parametrize(("arch", "dim", "causal"), compiled_cases())
def test_nothing_spills(arch, dim, causal):
    op = FlashAtten(FlashAttenConfig(dim=dim, is_causal=causal), target=f"cuda -arch={arch}")
    resources = op.artifact.manifest["resources"]
    assert len(resources) == len(op.plan.kernels) >= 2
    for kernel in op.plan.kernels:
        took = resources[f"{kernel.name}_kernel"]
        assert (took["spill_stores"], took["spill_loads"], took["stack"]) == (0, 0, 0), kernel
        assert took["registers"] * kernel.tiling.num_threads * kernel.tiling.blocks_at_once <= 65536


@pytest.mark.parametrize(("arch", "staged"), [("sm_80", True), ("sm_75", False)])
def test_promised_instructions(arch, staged, tmp_path):
    config = FlashAttenConfig(dim=64, seq_len=1024)
    op = FlashAtten(config, target=f"cuda -arch={arch}")
    text = op.get_source()
    source = tmp_path / "k.cu"
    source.write_text(text[: text.index("#include <tvm/ffi/c_api.h>")])
    number = arch.removeprefix("sm_")
    command = [find_nvcc(), "-ptx", "-std=c++17", f"-arch=compute_{number}", "-o", str(tmp_path / "k.ptx"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ptx = (tmp_path / "k.ptx").read_text()
    assert ("cp.async.cg.shared.global" in ptx) == staged
    shape = "m16n8k16" if staged else "m16n8k8"
    for instruction in ("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", f"mma.sync.aligned.{shape}.row.col.f32.f16.f16.f32",
                        "ex2.approx.ftz.f32", "st.global.v4.u32"):  # fmt: skip
        assert instruction in ptx, instruction
    assert not re.search(r"\bld\.local|\bst\.local", ptx)
