"""Rules, tilings and the schedule pass: what is compiled, without running any of it."""

import re
from dataclasses import replace

import pytest

from bitblas import MatmulConfig, UnsupportedError, build
from bitblas.formats import FORMATS
from bitblas.layout import PackedLayout
from bitblas.plan import native_layout, plan_matmul
from bitblas.schedule import RULES, LaneTiling, Problem, select_rule
from bitblas.schedule.cpu import CPU_RULES
from bitblas.schedule.cpu.dots import DOT_UNITS
from bitblas.target import Target, resolve_target

AVX512, AVX2, BASELINE = (resolve_target(name) for name in ("x86-64-v4", "haswell", "x86-64"))
VNNI, AVX_VNNI, NEON, OLD_NEON = (
    resolve_target(name) for name in ("cascadelake", "alderlake", "neoverse-n1", "cortex-a72")
)
INTEGERS = [name for name, fmt in FORMATS.items() if fmt.is_integer]


def config(w_dtype="uint4", **changes):
    base = {"M": 1, "N": 64, "K": 128, "A_dtype": "float16", "W_dtype": w_dtype, "group_size": 32, "with_scaling": True}
    return MatmulConfig(**{**base, **changes})


def find_rule(name):
    return next(rule for rule in RULES if rule.name == name)


def problem(target=AVX512, m=1, **changes):
    cfg = config(**changes)
    return Problem(cfg, native_layout(cfg, target), target, m)


def compiled(cfg, target):
    """(assembly, script) of a config's kernels."""
    executable, script = build.compile_plan(plan_matmul(cfg, target))
    return executable.mod.inspect_source("asm"), script


FLOATS = {AVX512: "avx512", VNNI: "avx512", AVX2: "avx2", AVX_VNNI: "avx2", NEON: "neon", BASELINE: "generic"}
#: Units that multiply floats in slices, where weights are integers.
SLICES = {VNNI: "avx512_vnni", AVX_VNNI: "avx_vnni"}
DOTS = {VNNI: "avx512_vnni", AVX_VNNI: "avx_vnni", NEON: "neon_dot"}


@pytest.mark.parametrize("m", [1, 4, 5, 1024])
@pytest.mark.parametrize(("target", "unit"), FLOATS.items(), ids=str)
def test_floats_take_the_widest_vectors(target, unit, m):
    assert select_rule(RULES, problem(target, m, w_dtype="nf4")).name == unit


@pytest.mark.parametrize("a_dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("target", FLOATS, ids=str)
def test_floats_times_integers_are_multiplied_in_slices_where_that_is_faster(target, name, a_dtype):
    subject = problem(target, 1, w_dtype=name, A_dtype=a_dtype)
    rule = select_rule(RULES, subject)
    assert rule.name == SLICES.get(target, FLOATS[target])
    assert {tiling.slices for tiling in rule.tilings(subject)} == {3 if target in SLICES else 0}


@pytest.mark.parametrize("m", [1, 4, 5, 1024])
@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("target", [*DOTS, AVX512, AVX2, OLD_NEON, BASELINE], ids=str)
def test_integers_take_the_best_instruction_for_bytes(target, name, m):
    unit = DOTS.get(target)
    if unit is None and FORMATS[name].bits < 8:
        unit = {AVX512: "avx512_maddubs", AVX2: "avx2_maddubs"}.get(target)
    unit = unit or FLOATS.get(target, "neon")
    subject = problem(target, m, w_dtype=name, A_dtype="int8")
    assert select_rule(RULES, subject).name == unit
    assert (subject.layout.name == "dots") == (unit in {row.name for row in DOT_UNITS})


@pytest.mark.parametrize(
    "changes",
    [
        {"w_dtype": "nf4"},
        {"w_dtype": "nf4", "A_dtype": "float16"},
        {"N": 40},
        {"K": 132, "group_size": -1},
        {"group_size": 4},
        {"w_dtype": "uint1", "group_size": 16},
    ],
    ids=str,
)
def test_what_does_not_fit_words_of_four_bytes_is_multiplied_in_floats(changes):
    subject = problem(VNNI, **{"A_dtype": "int8", **changes})
    assert subject.layout.name != "dots"
    assert select_rule(RULES, subject).name == "avx512"


@pytest.mark.parametrize("how", ["row", "group"])
@pytest.mark.parametrize("a_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("target", [*DOTS, AVX512, AVX2, OLD_NEON, BASELINE], ids=str)
def test_activations_that_are_quantized_take_the_rules_of_int8(target, a_dtype, how):
    for changes in ({}, {"group_size": 4}, {"N": 40}, {"w_dtype": "uint8"}, {"m": 16}, {"K": 132, "group_size": -1}):
        ours = problem(target, A_dtype=a_dtype, dynamic_quantization=how, **{"m": 1, **changes})
        given = problem(target, A_dtype="int8", **{"m": 1, **changes})
        assert ours.layout == given.layout
        assert select_rule(RULES, ours).name == select_rule(RULES, given).name


def test_groups_of_activations_count_where_weights_have_none():
    """144 is a multiple of a word's eight codes, and 12 is not."""
    for how, layout in (("row", "dots"), ("group", "lanes")):
        subject = problem(VNNI, K=144, group_size=12, with_scaling=False, dynamic_quantization=how)
        assert subject.layout.name == layout


def test_each_rule_that_declines_says_why():
    assert "avx512f" in find_rule("avx512").decline(problem(AVX2))
    wide, dots = problem(AVX2, w_dtype="uint8", A_dtype="int8"), problem(VNNI, A_dtype="int8")
    assert "layout dots, not lanes" in find_rule("avx512_vnni").decline(problem(VNNI, w_dtype="nf4"))
    assert "layout lanes or packed, not dots" in find_rule("generic").decline(dots)
    assert "saturates with codes of more than 7 bits" in DOT_UNITS[3].decline(wide.config.format, AVX2)
    both = (find_rule("avx512_vnni"), find_rule("avx512"))
    with pytest.raises(UnsupportedError, match=r"\n  avx512_vnni: reads .*\n  avx512: needs avx512f"):
        select_rule(both, problem(AVX2))
    with pytest.raises(UnsupportedError, match="is for llvm targets, not cuda -arch=sm_90"):
        select_rule(CPU_RULES, problem(resolve_target("cuda -arch=sm_90")))


@pytest.mark.parametrize("unit", [unit for unit in DOT_UNITS if unit.instruction == "vpmaddubsw"], ids=lambda u: u.name)
@pytest.mark.parametrize("name", [name for name in INTEGERS if FORMATS[name].bits < 8])
def test_sums_of_pairs_never_leave_16_bits(unit, name):
    fmt = FORMATS[name]
    largest = max(abs(fmt.value_range[0] + (1 if name == "int1" else fmt.code_offset)), fmt.value_range[1]
                  + (1 if name == "int1" else fmt.code_offset))  # fmt: skip
    depth = unit.depth(fmt)
    assert depth & (depth - 1) == 0
    assert depth * 2 * 128 * largest <= 1 << 15


@pytest.mark.parametrize("target", [*FLOATS, OLD_NEON], ids=str)
@pytest.mark.parametrize("a_dtype", ["float16", "int8"])
@pytest.mark.parametrize("n", [5, 16, 48, 64, 4096])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 64])
def test_tilings_are_legal_and_differ(target, a_dtype, n, m):
    subject = problem(target, m, N=n, A_dtype=a_dtype)
    tilings = select_rule(RULES, subject).tilings(subject)
    assert tilings
    assert len(set(tilings)) == len(tilings)
    for tiling in tilings:
        assert tiling.block_n % 16 == 0
        assert tiling.block_m >= 1
        assert tiling.block_n <= 16 * subject.lane_blocks
        assert subject.config.group % tiling.chunk(subject.config, subject.layout) == 0
        assert bool(tiling.dot) == (subject.layout.name == "dots")
        assert tiling.slab_m % tiling.block_m == 0
        assert tiling.slab_m == 0 or tiling.slab_m >= 512


@pytest.mark.parametrize(
    ("changes", "tiling", "chunk"),
    [
        ({}, LaneTiling(1, 16, 8), 32),
        ({"group_size": -1}, LaneTiling(1, 16, 8), 128),
        ({"group_size": -1}, LaneTiling(8, 16, 8, chunk_k=64), 64),
        ({"group_size": -1, "K": 131}, LaneTiling(8, 16, 8, chunk_k=64), 131),
        ({"group_size": -1, "K": 2048, "A_dtype": "int8"}, LaneTiling(1, 16, 8), 512),
        ({"group_size": -1, "K": 521, "A_dtype": "int8"}, LaneTiling(1, 16, 8), 264),
        ({"group_size": -1, "K": 4099, "A_dtype": "int8"}, LaneTiling(8, 16, 4, chunk_k=128), 128),
        ({"group_size": 1042 // 2, "K": 1042, "A_dtype": "int8"}, LaneTiling(1, 16, 8), 1),
    ],
)
def test_a_chunk_divides_its_group_or_ends_beyond_k_and_keeps_integers_exact(changes, tiling, chunk):
    assert tiling.chunk(config(**changes), PackedLayout(64, config(**changes).K, 4, "packed")) == chunk


@pytest.mark.parametrize(
    ("w_dtype", "K", "group", "tiling", "chunk"),
    [
        ("uint4", 128, 32, LaneTiling(1, 16, 8, dot="u8s8"), 32),
        ("uint4", 4096, -1, LaneTiling(8, 16, 8, chunk_k=512, dot="u8s8"), 512),
        ("uint1", 11008, -1, LaneTiling(8, 16, 8, chunk_k=512, dot="u8s8"), 256),  # 344 is no multiple of 32
        ("uint8", 4 * 1009, -1, LaneTiling(8, 16, 8, chunk_k=512, dot="u8s8"), 512),
        ("uint4", 1 << 17, -1, LaneTiling(1, 16, 8, dot="u8s8"), 1 << 16),
        ("uint8", 8 * 1009, 4 * 1009, LaneTiling(8, 16, 8, chunk_k=512, dot="u8s8"), 4 * 1009),
    ],
)
def test_a_chunk_of_dot_products_ends_with_a_word(w_dtype, K, group, tiling, chunk):
    cfg = config(w_dtype, K=K, group_size=group, A_dtype="int8")
    layout = PackedLayout(cfg.N, K, cfg.format.bits, "dots")
    found = tiling.chunk(cfg, layout)
    assert found == chunk
    assert found % layout.unit == 0


def test_equal_kernels_are_shared_between_buckets():
    plan = plan_matmul(config(M=None, N=768), AVX512)
    assert [kernel.rule for kernel in plan.kernels] == ["avx512", "avx512"]
    assert plan.buckets[0] == (1, plan.kernels[0].name)
    assert {name for _, name in plan.buckets[1:]} == {plan.kernels[1].name}


def test_tuned_tilings_are_taken_and_illegal_ones_are_not():
    cfg = config(M=[1, 64])
    other = select_rule(RULES, problem(AVX512, 64)).tilings(problem(AVX512, 64))[1]
    plan = plan_matmul(cfg, AVX512, {64: other, 1: LaneTiling(7, 16, 8)})
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
    both = (find_rule("avx512_vnni"), find_rule("avx512"))
    with pytest.raises(RuntimeError, match=r"no schedule rule(.|\n)*avx512_vnni: reads(.|\n)*avx512: needs"):
        ApplyDefaultSchedule(both, AVX2)(mod)


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
@pytest.mark.parametrize("target", [AVX2, BASELINE, OLD_NEON], ids=str)
def test_every_format_compiles_on_targets_without_avx512(name, target):
    assembly, script = compiled(config(name, M=[1, 16], N=40, K=24, group_size=8), target)
    assert "zmm" not in assembly
    assert "avx512" not in script
    if target is not AVX2:
        assert "llvm.x86" not in script


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize(
    ("target", "instruction"),
    [(VNNI, r"vpdpbusd.*zmm"), (AVX_VNNI, r"vpdpbusd.*ymm"), (NEON, "sdot"), (AVX512, r"vpmaddubsw.*zmm")],
    ids=str,
)
def test_bytes_are_multiplied_four_at_a_time(target, instruction, name):
    if target is AVX512 and FORMATS[name].bits == 8:
        pytest.skip("products of 8-bit codes do not fit 16 bits")
    assembly, _ = compiled(config(name, M=[1, 16], A_dtype="int8", out_dtype="float32"), target)
    assert re.search(instruction, assembly)


@pytest.mark.parametrize("how", ["row", "group"])
@pytest.mark.parametrize("a_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("m", [1, 64])
@pytest.mark.parametrize(
    ("target", "instructions"),
    [
        (VNNI, [r"vpdpbusd.*zmm", r"vpmax[su]d.*zmm", r"vrndscaleps.*zmm", r"vpmovdb.*zmm"]),
        (AVX2, [r"vpmaddubsw.*ymm", r"vpmax[su]d.*ymm", r"vroundps.*ymm"]),
        (NEON, [r"sdot", r"[su]max\s+v\d+\.4s", r"frinti\s+v\d+\.4s"]),
    ],
    ids=str,
)
def test_activations_are_quantized_in_vectors(target, instructions, m, a_dtype, how):
    assembly, _ = compiled(config(M=m, A_dtype=a_dtype, dynamic_quantization=how), target)
    for instruction in instructions:
        assert re.search(instruction, assembly), instruction
    assert not re.search(r"v?roundss\s|vrndscaless\s|frinti\s+s\d|call.*(nearbyint|round)", assembly)


@pytest.mark.parametrize("how", ["row", "group"])
@pytest.mark.parametrize(("m", "parallel"), [(1, False), (128, True)])
def test_activations_are_quantized_in_one_pass(m, parallel, how):
    """… over each row, which threads share where there are many."""
    cfg = config(M=m, N=256, K=512, with_zeros=True, dynamic_quantization=how)
    script = compiled(cfg, VNNI)[1]
    first, _, rest = script.partition('T.sblock("absmax_lanes_update")')
    loop = first.rindex(" for i in ") + 1
    assert first[loop:].startswith("for i in T.parallel(") == parallel
    depth = len(first[:loop].rpartition("\n")[2])
    passed, _, rest = rest.partition("\n" + " " * depth + "for ")  # the next loop that is no part of it
    for name in ("absmax", "activation_scale", "activation", "row_sum_lanes_update", "row_sum"):
        assert f'T.sblock("{name}")' in passed
        assert f'T.sblock("{name}")' not in rest


@pytest.mark.parametrize("name", ["nf4", "fp4_e2m1", "uint2", "int3"])
def test_avx2_looks_codes_up(name):
    _, script = compiled(config(name, M=[1, 16]), AVX2)
    assert "llvm.x86.avx2.permps" in script


def test_loads_assume_no_alignment():
    executable, _ = build.compile_plan(plan_matmul(config(with_zeros=True, with_bias=True, M=[1, 8]), AVX512))
    code = executable.mod.inspect_source("ll")
    alignments = set()
    for function in code.split("\ndefine "):
        bases = dict(re.findall(r"^ *(%\S+) = getelementptr .*?ptr (%\S+),", function, re.MULTILINE))
        local = set(
            re.findall(r"^ *(%\S+) = alloca ", function, re.MULTILINE)
        )  # what is ours is where the compiler put it
        for pointer, alignment in re.findall(r"load <.*ptr (%\S+), align (\d+)", function):
            while pointer in bases:
                pointer = bases[pointer]
            if pointer not in local:
                alignments.add(int(alignment))
    assert alignments
    assert max(alignments) <= 8


def test_a_foreign_machine_is_refused_before_anything_is_loaded():
    stranger = replace(AVX512, mattr=("+made_up",))
    with pytest.raises(UnsupportedError, match="lacks: made_up"):
        stranger.check_runnable()
    with pytest.raises(UnsupportedError, match="cannot run on this machine"):
        Target("llvm", "riscv64", "x86-64").check_runnable()
