"""Rules, tilings and the schedule pass: what is compiled, without running any of it."""

import re
from dataclasses import replace

import pytest

from bitblas import MatmulConfig, UnsupportedError, build
from bitblas.formats import FORMATS
from bitblas.layout import PackedLayout
from bitblas.plan import plan_matmul
from bitblas.schedule import RULES, Problem, Tiling, select_rule
from bitblas.target import Target, resolve_target

AVX512, AVX2, BASELINE = (resolve_target(name) for name in ("x86-64-v4", "haswell", "x86-64"))


def config(w_dtype="uint4", **changes):
    base = {"M": 1, "N": 64, "K": 128, "A_dtype": "float16", "W_dtype": w_dtype, "group_size": 32, "with_scaling": True}
    return MatmulConfig(**{**base, **changes})


def find_rule(name):
    return next(rule for rule in RULES if rule.name == name)


def problem(target=AVX512, m=1, **changes):
    cfg = config(**changes)
    return Problem(cfg, PackedLayout.native(cfg.N, cfg.K, cfg.format), target, m)


def compiled(cfg, target):
    """(assembly, script) of a config's kernels."""
    executable, script = build.compile_plan(plan_matmul(cfg, target))
    return executable.mod.inspect_source("asm"), script


@pytest.mark.parametrize(
    ("target", "m", "name"),
    [
        (AVX512, 1, "avx512_small_m"),
        (AVX512, 4, "avx512_small_m"),
        (AVX512, 5, "avx512_gemm"),
        (AVX512, 1024, "avx512_gemm"),
        (AVX2, 1, "generic_llvm"),
        (BASELINE, 64, "generic_llvm"),
    ],
)
def test_the_first_rule_that_fits_is_taken(target, m, name):
    assert select_rule(RULES, problem(target, m)).name == name


def test_each_rule_that_declines_says_why():
    assert "avx512f" in find_rule("avx512_gemm").decline(problem(AVX2))
    assert "at most 4 rows, not 5" in find_rule("avx512_small_m").decline(problem(AVX512, 5))
    with pytest.raises(UnsupportedError, match=r"avx512_small_m: needs avx512f.*\n  avx512_gemm: needs avx512f"):
        select_rule(RULES[:2], problem(AVX2))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("n", [5, 16, 48, 64, 4096])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 64])
def test_tilings_are_legal_and_differ(rule, n, m):
    subject = problem(AVX512, m, N=n)
    if rule.decline(subject):
        pytest.skip("the rule declines")
    tilings = rule.tilings(subject)
    assert tilings
    assert len(set(tilings)) == len(tilings)
    for tiling in tilings:
        assert tiling.block_n % 16 == 0
        assert tiling.block_m >= 1
        assert tiling.block_n <= 16 * subject.lane_blocks
        assert subject.config.group % tiling.chunk(subject.config) == 0
        assert tiling.slab_m % tiling.block_m == 0
        assert tiling.slab_m == 0 or tiling.slab_m >= 512


@pytest.mark.parametrize(
    ("changes", "tiling", "chunk"),
    [
        ({}, Tiling(1, 16, 8), 32),
        ({"group_size": -1}, Tiling(1, 16, 8), 128),
        ({"group_size": -1}, Tiling(8, 16, 8, chunk_k=64), 64),
        ({"group_size": -1, "K": 131}, Tiling(8, 16, 8, chunk_k=64), 131),
        ({"group_size": -1, "K": 2048, "A_dtype": "int8"}, Tiling(1, 16, 8), 512),
        ({"group_size": -1, "K": 521, "A_dtype": "int8"}, Tiling(1, 16, 8), 264),
        ({"group_size": -1, "K": 4099, "A_dtype": "int8"}, Tiling(8, 16, 4, chunk_k=128), 128),
        ({"group_size": 1042 // 2, "K": 1042, "A_dtype": "int8"}, Tiling(1, 16, 8), 1),
    ],
)
def test_a_chunk_divides_its_group_or_ends_beyond_k_and_keeps_integers_exact(changes, tiling, chunk):
    assert tiling.chunk(config(**changes)) == chunk


def test_equal_kernels_are_shared_between_buckets():
    plan = plan_matmul(config(M=None, N=768), AVX512)
    assert [kernel.rule for kernel in plan.kernels] == ["avx512_small_m", "avx512_gemm"]
    assert plan.buckets[0] == (1, plan.kernels[0].name)
    assert {name for _, name in plan.buckets[1:]} == {plan.kernels[1].name}


def test_tuned_tilings_are_taken_and_illegal_ones_are_not():
    cfg = config(M=[1, 64])
    other = select_rule(RULES, problem(AVX512, 64)).tilings(problem(AVX512, 64))[1]
    plan = plan_matmul(cfg, AVX512, {64: other, 1: Tiling(7, 16, 8)})
    assert plan.kernels[1].tiling == other
    assert plan.kernels[0].tiling == plan_matmul(cfg, AVX512).kernels[0].tiling


def test_weights_beyond_the_reach_of_an_index_are_refused():
    with pytest.raises(UnsupportedError, match="index fewer than 2147483648"):
        plan_matmul(config("float32", A_dtype="float32", N=1 << 16, K=1 << 13), AVX512)


def test_blocks_are_named():
    script = build.expression_module(plan_matmul(config(with_zeros=True), AVX512)).script()
    for name in ("words0", "unpack", "decode", "matmul", "accumulate", "epilogue"):
        assert f'T.sblock("{name}")' in script


def test_the_pass_leaves_foreign_functions_alone_and_schedules_described_ones():
    import tvm
    from tvm import te

    from bitblas.transform import ApplyDefaultSchedule

    a = te.placeholder((8,), name="a")
    foreign = te.create_prim_func([a, te.compute((8,), lambda i: a[i] + 1.0, name="b")])
    mod = build.expression_module(plan_matmul(config(), AVX512))
    before = mod["matmul_0"].script()
    scheduled = ApplyDefaultSchedule(RULES, AVX512)(tvm.IRModule({"foreign": foreign, "matmul_0": mod["matmul_0"]}))
    assert scheduled["foreign"].script() == foreign.script()
    assert "T.vectorized(16)" not in before
    assert "T.vectorized(16)" in scheduled["matmul_0"].script()


def test_the_pass_reports_every_reason_when_all_rules_decline():
    from bitblas.transform import ApplyDefaultSchedule

    mod = build.expression_module(plan_matmul(config(), AVX512))
    with pytest.raises(RuntimeError, match=r"no schedule rule(.|\n)*avx512_small_m: needs(.|\n)*avx512_gemm: needs"):
        ApplyDefaultSchedule(RULES[:2], AVX2)(mod)


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.bits <= 4])
@pytest.mark.parametrize("m", [1, 64])
def test_avx512_looks_codes_up_by_one_permutation(name, m):
    assembly, _ = compiled(config(name, M=m), AVX512)
    assert re.search(r"vperm(d|ps)\s", assembly)


@pytest.mark.parametrize("target", [AVX512, AVX2], ids=["avx512", "avx2"])
@pytest.mark.parametrize("name", FORMATS)
def test_no_scalar_arithmetic_where_nothing_is_padded(name, target):
    """Every multiply-add is packed; scalar ones could only come from a fallback."""
    assembly, _ = compiled(config(name, M=8, out_dtype="float32", group_size=-1), target)
    register = "zmm" if target is AVX512 else "ymm"
    assert re.search(rf"vfmadd\w*ps\s.*%{register}", assembly)
    assert not re.search(r"vfmadd\w*ss\s|vmulss\s|vcvtsi2ss\s|vpinsrb\s", assembly)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("target", [AVX2, BASELINE], ids=["avx2", "baseline"])
def test_every_format_compiles_on_targets_without_avx512(name, target):
    assembly, script = compiled(config(name, M=[1, 16], N=40, K=24, group_size=8), target)
    assert "zmm" not in assembly
    assert "llvm.x86" not in script


def test_loads_assume_no_alignment():
    executable, _ = build.compile_plan(plan_matmul(config(with_zeros=True, with_bias=True, M=[1, 8]), AVX512))
    alignments = {int(text) for text in re.findall(r"load <.*align (\d+)", executable.mod.inspect_source("ll"))}
    assert alignments
    assert max(alignments) <= 8


def test_a_foreign_machine_is_refused_before_anything_is_loaded():
    stranger = replace(AVX512, mattr=("+made_up",))
    with pytest.raises(UnsupportedError, match="lacks: made_up"):
        stranger.check_runnable()
    with pytest.raises(UnsupportedError, match="cannot run on this machine"):
        Target("llvm", "riscv64", "x86-64").check_runnable()
