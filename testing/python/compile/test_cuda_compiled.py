"""What nvcc makes of kernels for tensor cores, for the cards there are: registers, memory, instructions."""

import itertools
import re
import subprocess

import pytest
from benchmark import resources as table

from bitblas import Matmul, MatmulConfig
from bitblas.cuda.nvcc import find_nvcc
from bitblas.formats import FORMATS

FORMAT_NAMES = [name for name, fmt in FORMATS.items() if not fmt.is_native]
pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc")


def built(target, **fields):
    """An operator for 1, 16, 64 and 128 rows, built by nvcc, and what its kernels take of a card."""
    given = {"M": (1, 16, 64, 128), "N": 4096, "K": 4096, "A_dtype": "float16", "W_dtype": "uint4", **fields}
    op = Matmul(MatmulConfig(**{"out_dtype": "float32", "accum_dtype": "float32", **given}), target=target)
    return op, op.artifact.manifest["resources"]


def of_cards():
    """Every format on every card, in turn in the short run."""
    archs = ("sm_75", "sm_80", "sm_89", "sm_90")
    for i, (name, arch) in enumerate(itertools.product(FORMAT_NAMES, archs)):
        short = name in ("uint4", "int2", "uint3", "nf4", "float8_e4m3", "int8") and i % 5 == 0
        yield pytest.param(
            name, arch, id=f"{name}-{arch}", marks=() if short else (pytest.mark.slow, pytest.mark.exhaustive)
        )


@pytest.mark.parametrize(("name", "arch"), list(of_cards()))
def test_nothing_spills(name, arch):
    a_dtype = (
        "int8"
        if name in ("int2", "int8", "uint1")
        else "bfloat16"
        if name == "uint3" and arch != "sm_75"
        else "float16"
    )
    fields = {"A_dtype": a_dtype, "with_scaling": True, "group_size": 128, "W_dtype": name}
    if FORMATS[name].is_integer:
        fields.update(with_zeros=True)
    check_resources(*built(f"cuda -arch={arch}", **fields))


def check_resources(op, resources):
    """Nothing spills, and what a block takes is there."""
    assert len(resources) == len(op.plan.kernels) >= 2
    for kernel in op.plan.kernels:
        took = resources[f"{kernel.name}_kernel"]
        assert (took["spill_stores"], took["spill_loads"], took["stack"]) == (0, 0, 0), kernel
        threads = kernel.tiling.num_threads
        assert took["registers"] * threads * kernel.tiling.blocks_at_once <= 65536
        assert kernel.tiling.shared_bytes(op.plan.config) <= op.target.card.shared_bytes


def of_quantized():
    """Weights and float activations that are quantized on every card, in turn in the short run."""
    names, archs = ("int2", "uint4", "int8", "int1", "int3"), ("sm_75", "sm_80", "sm_90")
    for i, (name, a_dtype, arch) in enumerate(itertools.product(names, ("float16", "bfloat16", "float32"), archs)):
        marks = () if name == "int2" and i % 4 == 0 else (pytest.mark.slow, pytest.mark.exhaustive)
        yield pytest.param(name, a_dtype, arch, id=f"{name}-{a_dtype}-{arch}", marks=marks)


@pytest.mark.parametrize(("name", "a_dtype", "arch"), [*of_quantized()])
def test_nothing_spills_where_activations_are_quantized(name, a_dtype, arch):
    scaled = {"scale_per_tensor": True} if name == "int2" else {"group_size": 128, "with_zeros": name != "int1"}
    fields = {"A_dtype": a_dtype, "W_dtype": name, "with_scaling": True, "with_bias": True}
    check_resources(*built(f"cuda -arch={arch}", dynamic_quantization="row", **fields, **scaled))


@pytest.mark.parametrize(
    ("arch", "fields", "promised"),
    [
        ("sm_80", {}, ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "fma.rn.f16x2")),
        (
            "sm_90",
            {"A_dtype": "bfloat16"},
            ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "fma.rn.bf16x2"),
        ),
        ("sm_80", {"A_dtype": "int8", "W_dtype": "int4"}, ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32",)),
        ("sm_75", {}, ("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32",)),
        (
            "sm_80",
            {"dynamic_quantization": "row", "W_dtype": "int2"},
            ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", "redux.sync.max.u32"),
        ),
    ],
)
def test_promised_instructions(arch, fields, promised, tmp_path):
    op, _ = built(f"cuda -arch={arch}", with_scaling=True, group_size=128, **fields)
    number = arch.removeprefix("sm_")
    command = [find_nvcc(), "-ptx", "-std=c++17", f"-arch=compute_{number}", "-o", str(tmp_path / "k.ptx")]
    source = tmp_path / "k.cu"
    text = op.get_source()
    source.write_text(text[: text.index("#include <tvm/ffi/c_api.h>")])
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = (tmp_path / "k.ptx").read_text().split(".entry ")[1:]
    assert len(kernels) == len(op.plan.kernels)
    for kernel in kernels:
        staged = "cp.async.cg.shared.global" in kernel
        assert staged == (arch != "sm_75" and not kernel.startswith("matmul_0"))
        weights = "cp.async.cg.shared.global.L2::128B" if staged else "ld.global.nc.L1::no_allocate.v4.u32"
        for instruction in (*promised, "lop3.b32", weights):
            assert instruction in kernel, instruction
        assert not re.search(r"\bld\.local|\bst\.local", kernel)


def test_the_table_of_the_documents_is_that_of_the_manifest():
    op, resources = built("cuda -arch=sm_80", M=(1, 32), N=256, K=512, with_scaling=True, group_size=128)
    lines = table.rows(op)
    assert len(lines) == len(op.plan.kernels) == 2
    for line, kernel in zip(lines, op.plan.kernels, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) == len(table.COLUMNS)
        assert cells[0] == str(kernel.buckets[0])
        assert int(cells[6]) == resources[f"{kernel.name}_kernel"]["registers"] > 0
