"""What attention on CPUs is made of: the definition, the exponential, the instructions, the memory."""

import math
import re
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
import tvm_ffi

import attention_reference
import neon
from bitblas import FlashAttenConfig, build
from bitblas.config import MAX_HEAD_DIM, QUERY_BUCKETS
from bitblas.errors import UnsupportedError
from bitblas.plan import KernelPlan, plan_attention
from bitblas.schedule import AttentionProblem, read_tiling, select_rule
from bitblas.schedule.cpu.attention import CPU_ATTENTION_RULES
from bitblas.schedule.rule import read_problem
from bitblas.target import host_features, resolve_target


def config(dtype="float32", **changes):
    return FlashAttenConfig(
        **{"dim": 64, "Q_dtype": dtype, "K_dtype": dtype, "V_dtype": dtype, "Out_dtype": dtype, **changes}
    )


# -- the definition --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "causal"), [("nnn", True), ("ntn", False)])
def test_the_definition_computes_attention(layout, causal):
    """The expression, compiled as it stands, without any rule."""
    import tvm

    from bitblas.expr import attention_func

    cfg = config(dim=5, dim_v=3, layout=layout, is_causal=causal, softmax_scale=0.7)
    compiled = tvm.compile(tvm.IRModule({"definition": attention_func(cfg, "definition")}), target="llvm").jit()
    problem = attention_reference.draw(
        cfg, batch=2, heads=4, heads_kv=2, seq_len=7, seq_len_kv=4 if layout == "ntn" else 9
    )
    out = torch.full((2, 7, 4, 3), math.nan)
    compiled["definition"](problem.q, problem.k, problem.v, out)
    attention_reference.assert_close(out, problem)


# -- the exponential -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("degree", "promised"), [(3, 7.5e-5), (6, 1.1e-7)])
@pytest.mark.parametrize("lanes", [4, 16])
def test_powers_of_two_have_the_stated_error(degree, promised, lanes):
    x = np.concatenate([np.linspace(-125, 1, 1 << 16), -np.logspace(-30, 2, 1 << 12), [0.0, -1.5, 0.5, -0.5, 1.0]])
    x = x.astype(np.float32)
    x = np.pad(x, (0, -len(x) % lanes))
    found = powers(x, degree, lanes).astype(np.float64)
    exact = np.exp2(x.astype(np.float64))
    error = np.abs(found / exact - 1)
    assert promised / 2 <= error.max() <= promised + 2.0**-23 * (degree == 3)


def test_powers_of_two_at_the_ends():
    x = np.array(
        [-math.inf, -1e30, -127.0, np.nextafter(np.float32(-125), np.float32(-126)), -125.0, 0, math.nan, -1e-38]
    )
    found = powers(x.astype(np.float32).repeat(2), 6, 16)[::2]
    assert found[:4].tolist() == [0, 0, 0, 0]
    assert found[4] == pytest.approx(2.0**-125, rel=1e-6)
    assert found[5] == 1
    assert math.isnan(found[6])


def powers(x, degree, lanes):
    import tvm
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as B

    from bitblas.schedule.cpu.exponential import exp2

    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("powers")
        B.func_attr({"global_symbol": "powers"})
        a, b = B.arg("a", B.handle()), B.arg("b", B.handle())
        A, R = B.match_buffer(a, (len(x),), "float32"), B.match_buffer(b, (len(x),), "float32")
        with B.serial(0, len(x) // lanes) as i, B.sblock("powers"):
            B.reads()
            B.writes()
            value = exp2(A.vload([i * lanes], f"float32x{lanes}"), lanes, degree)
            B.buffer_store(R, value, [B.ramp(i * lanes, 1, lanes)])
    compiled = tvm.compile(tvm.IRModule({"powers": builder.get()}), target="llvm").jit()
    out = torch.empty(len(x))
    compiled["powers"](torch.from_numpy(x), out)
    return out.numpy()


# -- rules -----------------------------------------------------------------------------------------------------------------

#: Targets, and the rule that each takes for float32 and for bfloat16; for one row see `row_rule`.
TARGETS = {
    "znver4": ("attention_avx512", "attention_avx512_bf16"),
    "skylake-avx512": ("attention_avx512", "attention_avx512"),
    "haswell": ("attention_avx2", "attention_avx2"),
    "x86-64-v2": ("attention_generic", "attention_generic"),
    "llvm -mtriple=aarch64-linux-gnu -mcpu=neoverse-n1": ("attention_neon", "attention_neon"),
}


def row_rule(rule):
    """The rule of one row on a machine that takes a rule for many."""
    return rule.removesuffix("_bf16").replace("attention", "attention_row")


@pytest.mark.parametrize(("target", "rules"), TARGETS.items())
def test_the_rule_of_a_machine(target, rules):
    resolved = resolve_target(target)
    mixed = config("bfloat16", V_dtype="float16")
    for asked, rule in ((config(), rules[0]), (config("bfloat16"), rules[1]), (mixed, rules[0])):
        first, *others = plan_attention(asked, resolved).kernels
        assert (first.rule, first.buckets) == (row_rule(rule), (1,))
        assert {kernel.rule for kernel in others} == {rule}


def test_one_row_of_short_heads():
    """Fewer elements than lanes are no vector."""
    resolved = resolve_target("haswell")
    assert plan_attention(config(dim=7, dim_v=5), resolved).kernels[0].rule == "attention_avx2"
    assert plan_attention(config(dim=7, dim_v=8), resolved).kernels[0].rule == "attention_row_avx2"


def test_one_query_of_heads_that_may_share_keys():
    """Bucket 1 is for one row: those of heads that share keys are more."""
    resolved = resolve_target("znver4")
    rules = [kernel.rule for kernel in plan_attention(config(seq_len=1), resolved).kernels]
    assert rules == ["attention_row_avx512", "attention_avx512"]
    assert [kernel.buckets for kernel in plan_attention(config(seq_len=1), resolved).kernels] == [(1,), (16,)]
    for heads, buckets in (({"heads": 8}, (1,)), ({"heads": 8, "heads_kv": 2}, (16,))):
        (kernel,) = plan_attention(config(seq_len=1, **heads), resolved).kernels
        assert kernel.buckets == buckets


def test_tilings_of_one_row_differ_in_what_they_do():
    for layout, least in (("nnn", 5), ("ntn", 3)):
        problem = AttentionProblem(config(layout=layout).kernel, resolve_target("znver4"), 1)
        tilings = select_rule(CPU_ATTENTION_RULES, problem).tilings(problem)
        assert len(tilings) == least


def test_a_rule_that_declines_says_why():
    problem = AttentionProblem(config(), resolve_target("haswell"), 64)
    reasons = {rule.name: rule.decline(problem) for rule in CPU_ATTENTION_RULES}
    assert reasons["attention_avx2"] is None
    assert reasons["attention_row_avx2"] == "is for one row"
    assert "needs avx512f" in reasons["attention_avx512"]
    assert "multiplies bfloat16, not float32" in reasons["attention_avx512_bf16"]
    with pytest.raises(
        UnsupportedError, match=r"attention_avx512: needs avx512f(?s:.)*haswell|haswell(?s:.)*needs avx512f"
    ):
        select_rule(tuple(rule for rule in CPU_ATTENTION_RULES if "avx512" in rule.name), problem)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_thread_holds_a_megabyte(target, dtype):
    for dim in (1, 17, 64, 128, 192, 256, 576, MAX_HEAD_DIM):
        cfg = config(dtype, dim=dim)
        for m in QUERY_BUCKETS:
            problem = AttentionProblem(cfg, resolve_target(target), m)
            tilings = select_rule(CPU_ATTENTION_RULES, problem).tilings(problem)
            assert len(set(tilings)) == len(tilings) >= 1
            for tiling in tilings:
                assert tiling.held_bytes(cfg) <= 1 << 20
                assert tiling.block_n % tiling.keys == 0
                assert read_tiling(tiling.fields()) == tiling
                if tiling.kind != "attention_row":
                    assert tiling.block_m % (tiling.lanes * tiling.vectors) == 0
                else:
                    assert tiling.block_n % tiling.lanes == 0 == tiling.lanes % tiling.keys


def test_a_problem_is_read_from_its_fields():
    problem = AttentionProblem(config(is_causal=True).kernel, resolve_target("haswell"), 64)
    assert read_problem(problem.fields(), problem.target) == problem


# -- instructions ----------------------------------------------------------------------------------------------------------


def inner_loops(library, instruction, least):
    """Innermost loops of a library that have an instruction so often: lists of their instructions."""
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(library)], capture_output=True, text=True, check=True
    )
    lines = re.findall(r"^\s+([0-9a-f]+):\s+(\S.*)$", text.stdout, re.MULTILINE)
    places = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    loops = []
    for i, (address, code) in enumerate(lines):
        jump = re.match(r"j\w+\s+([0-9a-f]+)\b", code)
        begin = places.get(int(jump[1], 16)) if jump else None
        if begin is None or int(jump[1], 16) > int(address, 16):
            continue
        body = [code for _, code in lines[begin : i + 1]]
        if sum(instruction in code for code in body) >= least and not any(re.match(r"j\w+\s", c) for c in body[:-1]):
            loops.append(body)
    return loops


@pytest.mark.parametrize(
    ("target", "dtype", "instruction", "register", "least"),
    [
        ("znver4", "bfloat16", "vdpbf16ps", "zmm", 16),
        ("skylake-avx512", "float32", "vfmadd", "zmm", 16),
        ("haswell", "float32", "vfmadd", "ymm", 8),
    ],
)
def test_products_stay_in_registers(target, dtype, instruction, register, least, tmp_path):
    """The inner loops load words, multiply, and store nothing."""
    plan = plan_attention(config(dtype, seq_len=1024), resolve_target(target))
    assert len(plan.kernels) == 1
    build.build_library(plan, tmp_path, build.find_compiler())
    loops = inner_loops(tmp_path / build.LIBRARY, instruction, least)
    loops = [body for body in loops if not re.search("vrndscale|vround", " ".join(body))]  # those of exponentials
    assert len(loops) >= 2  # keys, and values
    for body in loops:
        products = [code for code in body if instruction in code]
        assert all(f"%{register}" in code for code in products)
        assert not [code for code in body if re.match(rf"vmov\S+\s+%{register}\d+,.*\(", code)]
        tiling = plan.kernels[0].tiling
        expected = {tiling.vectors * tiling.keys, tiling.vectors * tiling.values}
        assert len(products) in expected or len(products) % min(expected) == 0
        assert len(body) <= 2 * len(products) + 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "dtype", "layout", "dim", "dim_v", "rows"),
    [
        ("znver4", "bfloat16", "nnn", 40, 24, 64),
        ("znver4", "bfloat16", "ntn", 33, 33, 64),
        ("znver4", "float32", "ntn", 33, 17, 64),
        ("znver4", "float32", "nnn", 33, 200, 1),
        ("znver4", "bfloat16", "ntn", 40, 24, 1),
        ("skylake-avx512", "bfloat16", "nnn", 17, 40, 64),
        ("haswell", "float16", "ntn", 24, 33, 64),
        ("haswell", "float16", "nnn", 24, 33, 1),
        ("x86-64-v2", "float32", "nnn", 7, 5, 64),
        ("x86-64-v2", "bfloat16", "nnn", 7, 5, 1),
    ],
)
def test_every_tiling_computes_the_same(target, dtype, layout, dim, dim_v, rows, tmp_path):
    """All that a rule offers, where this CPU can run it: also what only tuning would choose."""
    resolved = resolve_target(target)
    if not resolved.features <= host_features():
        pytest.skip(f"this CPU is no {target}")
    cfg = config(dtype, dim=dim, dim_v=dim_v, layout=layout, is_causal=layout == "nnn", Out_dtype="float32").kernel
    asked = AttentionProblem(cfg, resolved, rows)
    rule = select_rule(CPU_ATTENTION_RULES, asked)
    tilings = rule.tilings(asked)
    if rows > 1:  # the panels are the same for all numbers of them
        tilings = list({(tiling.vectors, tiling.block_n): tiling for tiling in tilings}.values())
    assert len(tilings) >= 3
    library = compile_tilings(plan_attention(cfg, resolved), rule.name, tilings, rows, tmp_path)
    problem = attention_reference.draw(cfg, batch=2, heads=6, heads_kv=2, seq_len=45, seq_len_kv=130)
    for index in range(len(tilings)):
        out = torch.full((2, 45, 6, dim_v), math.nan)
        library[f"attention_{index}"](problem.q, problem.k, problem.v, out)
        attention_reference.assert_close(out, problem, "bfloat16" if "bf16" in rule.name else "float32")


def compile_tilings(plan, rule, tilings, rows, folder):
    """One library of a plan's config with all tilings."""
    kernels = tuple(KernelPlan(f"attention_{i}", rule, tiling, (rows,)) for i, tiling in enumerate(tilings))
    build.build_library(replace(plan, kernels=kernels), folder, build.find_compiler())
    return tvm_ffi.load_module(str(folder / build.LIBRARY))


# -- on ARM ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "layout", "causal", "dim"),
    [("float32", "nnn", True, 20), ("bfloat16", "ntn", False, 7), ("float16", "nnn", False, 16)],
)
def test_neon_computes_attention(objects, tmp_path, dtype, layout, causal, dim):
    """Under qemu, with every tensor at the end of its memory; each kernel of a plan for any lengths."""
    cfg = config(dtype, dim=dim, layout=layout, is_causal=causal)
    plan = plan_attention(cfg, resolve_target(neon.A72))
    assert {kernel.rule for kernel in plan.kernels} == {"attention_neon", "attention_row_neon"}
    neon.link(plan, objects, tmp_path / "kernels")
    problems = [
        attention_reference.draw(cfg, batch=2, heads=4, heads_kv=2, seq_len=queries, seq_len_kv=keys)
        for queries, keys in ((1, 1), (1, 33), (1, 400), (11, 101), (70, 6))
    ]
    calls = [
        (kernel.name, (problem.q, problem.k, problem.v), torch.empty_like(problem.q, dtype=getattr(torch, dtype)))
        for problem in problems
        for kernel in plan.kernels
    ]
    outputs = iter(neon.run(tmp_path / "kernels", plan.target, calls))
    for problem in problems:
        for _ in plan.kernels:
            attention_reference.assert_close(next(outputs), problem, "float32")
