"""NEON kernels, compiled on any machine: what instructions they are made of, and what they compute under qemu."""

import itertools
import re
from dataclasses import replace

import pytest
import torch

import neon
import reference
from bitblas import MatmulConfig, build, packing
from bitblas.config import ZEROS_MODES
from bitblas.formats import FORMATS
from bitblas.plan import plan_matmul
from bitblas.target import resolve_target
from neon import A72, GENERIC, N1

INTEGERS = [name for name, fmt in FORMATS.items() if fmt.is_integer]
CODEBOOKS = [name for name, fmt in FORMATS.items() if fmt.codebook]
#: N, K and group: with whole tiles of columns and without, several groups and one.
SHAPES = [(48, 128, 32), (64, 256, -1), (64, 128, 64), (80, 64, 32)]
#: … of which the first two leave some formats without sdot, and the others are packed row by row.
UGLY_SHAPES = [(80, 72, 24), (16, 8, 8), (5, 33, -1), (17, 33, 11), (31, 50, 1)]
ROWS = (1, 3, 9)
OUTPUTS = ("float32", "float16", "bfloat16")


def config(w_dtype, a_dtype="float16", **changes):
    """Kernels for three rows and for more, small enough that neither starts threads."""
    fields = {"M": (3, 9), "N": 48, "K": 128, "out_dtype": "float32", "accum_dtype": "float32"}
    return MatmulConfig(A_dtype=a_dtype, W_dtype=w_dtype, **{**fields, **changes})


# -- instructions ----------------------------------------------------------------------------------------------------------


def compute_functions(cfg, target):
    """(rule, assembly) of each kernel of a config."""
    plan = plan_matmul(cfg, resolve_target(target))
    assembly = build.compile_plan(plan)[0].mod.inspect_source("asm")
    found = []
    for kernel in plan.kernels:
        body = re.search(rf"^{kernel.name}_compute_:\n(.*?)^\.Lfunc_end", assembly, re.MULTILINE | re.DOTALL)
        assert body, f"no function {kernel.name}_compute_"
        found.append((kernel.rule, body[1]))
    return found


def count(instruction, assembly):
    return len(re.findall(rf"^\s+{instruction}\s", assembly, re.MULTILINE))


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_multiplied_by_sdot_where_there_is_one(name):
    functions = compute_functions(config(name, "int8", with_scaling=True), N1)
    assert {rule for rule, _ in functions} == {"neon_dot"}
    for _, assembly in functions:
        assert re.search(r"^\s+sdot\s+v\d+\.4s, v\d+\.16b,", assembly, re.MULTILINE)
        assert not count("fmla|mla|smlal2?|umlal2?", assembly)


@pytest.mark.parametrize(("name", "target"), [("uint1", A72), ("uint8", GENERIC), ("int5", GENERIC), ("int8", A72)])
def test_integers_are_multiplied_by_fmla_where_there_is_no_sdot(name, target):
    functions = compute_functions(config(name, "int8", with_scaling=True), target)
    assert {rule for rule, _ in functions} == {"neon"}
    for _, assembly in functions:
        assert re.search(r"^\s+fmla\s+v\d+\.4s,", assembly, re.MULTILINE)
        assert not count("sdot|udot", assembly)


@pytest.mark.parametrize(("name", "target"), [(name, (N1, A72)[i % 2]) for i, name in enumerate(FORMATS)])
def test_floats_are_multiplied_by_fmla_in_vectors(name, target):
    functions = compute_functions(config(name, with_scaling=True), target)
    assert {rule for rule, _ in functions} == {"neon"}
    for _, assembly in functions:
        assert re.search(r"^\s+fmla\s+v\d+\.4s,", assembly, re.MULTILINE)
        assert not count("fmadd|sdot", assembly)
        # the compiler shuffles bytes by tables of one and two registers
        in_four = re.search(r"^\s+tbl\s+v\d+\.16b, \{ (v\d+\.16b, ){3}v\d+\.16b \}", assembly, re.MULTILINE)
        assert bool(in_four) == (name in CODEBOOKS)


# -- results ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _one_thread():
    """What the reference computes here is too small for threads, which would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(program, plan, problems):
    """For each problem the outputs of all kernels of the program."""
    names = [kernel.name for kernel in plan.kernels]
    dtype = getattr(torch, plan.config.out_dtype)
    calls = [
        (name, kernel_operands(plan, problem), torch.empty(problem.A.shape[0], plan.config.N, dtype=dtype))
        for problem in problems
        for name in names
    ]
    outputs = iter(neon.run(program, plan.target, calls))
    return [[next(outputs) for _ in names] for _ in problems]


def kernel_operands(plan, problem):
    """A, W, and what else the kernels take, in their dtypes."""
    cfg = plan.config
    activation, scale, bias = (getattr(torch, name) for name in (cfg.activation_dtype, cfg.scale_dtype, cfg.bias_dtype))
    codes = packing.encode(problem.weights, cfg.format)
    operands = [problem.A.view(activation), packing.pack(codes, plan.layout).view(-1)]
    if problem.scale is not None:
        operands.append(problem.scale.to(scale))
    if problem.zeros is not None:
        operands.append(problem.zeros.view(-1) if cfg.zeros_packed else problem.zeros.to(scale))
    if problem.bias is not None:
        operands.append(problem.bias.to(bias))
    return operands


def draw(cfg, m, exact):
    """A random problem; an A of float8 is one of float32, rounded."""
    if not cfg.A_dtype.startswith("float8"):
        return reference.draw(cfg, m, exact=exact)
    problem = reference.draw(replace(cfg, A_dtype="float32"), m, exact=exact)
    return replace(problem, config=cfg, A=problem.A.to(getattr(torch, FORMATS[cfg.A_dtype].torch_name)))


def cases(cfg):
    """(problem, comparison): the bound on random numbers and the exact case, for each number of rows."""
    for exact, compare in ((False, reference.assert_close), (True, reference.assert_exact)):
        problem = draw(cfg, max(ROWS), exact)
        yield from ((replace(problem, A=problem.A[:m]), compare) for m in ROWS)


@pytest.fixture
def check(objects, tmp_path):
    """Compare each kernel of a config with the reference, by default in `cases`; returns the names of their rules."""

    def check(target, cfg, chosen=None):
        plan = plan_matmul(cfg, resolve_target(target))
        program = tmp_path / "kernels"
        neon.link(plan, objects, program)
        problems, comparisons = zip(*(chosen or cases(cfg)), strict=True)
        for problem, compare, outs in zip(problems, comparisons, run(program, plan, problems), strict=True):
            for out in outs:
                compare(out, problem)
        return {kernel.rule for kernel in plan.kernels}

    return check


def ids(cases):
    return [pytest.param(*case, id="-".join(str(field) for field in case)) for case in cases]


def covering_formats():
    """Every format with A in float16 and int8, on both targets where their rules differ; shapes, out_dtype, bias in turn."""
    for i, name in enumerate(FORMATS):
        for j, a_dtype in enumerate(("float16", "int8")):
            rules_differ = a_dtype == "int8" and name in INTEGERS
            for target in (N1, A72) if rules_differ else ((N1, A72)[(i + j) % 2],):
                yield target, a_dtype, name, (i + j) % len(SHAPES), OUTPUTS[(i + 2 * j) % len(OUTPUTS)], i % 3 == 0


@pytest.mark.parametrize(("target", "a_dtype", "name", "shape", "out_dtype", "bias"), ids(covering_formats()))
def test_formats(check, target, a_dtype, name, shape, out_dtype, bias):
    N, K, group = SHAPES[shape]
    fields = {"N": N, "K": K, "group_size": group, "out_dtype": out_dtype, "with_bias": bias}
    rules = check(target, config(name, a_dtype, M=(1, 9) if shape % 2 else (3, 9), with_scaling=True, **fields))
    unit = "neon_dot" if target == N1 and a_dtype == "int8" and name in INTEGERS else "neon"
    assert rules == {unit}


def covering_zeros():
    """Every zeros mode with A in float16 and int8 on each target; formats, shapes, scaling and bias in turn."""
    names = ("uint4", "uint3", "uint8", "int5", "uint2")
    for i, mode in enumerate(ZEROS_MODES):
        for j, (a_dtype, target) in enumerate((("float16", N1), ("int8", N1), ("int8", A72), ("int8", N1))):
            name = names[(i + j) % 3 if mode == "quantized" else (3 * i + j) % len(names)]
            yield target, a_dtype, name, mode, (i + j) % len(SHAPES), (i + j) % 3 != 0


@pytest.mark.parametrize(("target", "a_dtype", "name", "mode", "shape", "scaling"), ids(covering_zeros()))
def test_zeros(check, target, a_dtype, name, mode, shape, scaling):
    N, K, group = SHAPES[shape]
    fields = {"N": N, "K": K, "group_size": group, "with_scaling": scaling, "with_bias": shape % 2 == 0}
    check(target, config(name, a_dtype, with_zeros=True, zeros_mode=mode, **fields))


def covering_ugly_shapes():
    """Every such shape with A in float16 and int8; formats, targets, zeros modes and bias in turn."""
    names = ("uint4", "int3", "nf4", "uint7", "fp4_e2m1", "int8", "uint1", "bfloat16", "uint2", "int6")
    for i, (shape, a_dtype) in enumerate(itertools.product(UGLY_SHAPES, ("float16", "int8"))):
        yield (N1, A72, GENERIC)[i % 3], a_dtype, names[i], shape


@pytest.mark.parametrize(("target", "a_dtype", "name", "shape"), ids(covering_ugly_shapes()))
def test_ugly_shapes(check, target, a_dtype, name, shape):
    (N, K, group), zeros = shape, name in INTEGERS
    fields = {"with_scaling": True, "with_zeros": zeros, "zeros_mode": "quantized" if name[0] == "u" else "rescale"}
    check(target, config(name, a_dtype, N=N, K=K, group_size=group, with_bias=K % 2 == 0, **fields))


@pytest.mark.parametrize(
    ("target", "a_dtype", "name", "out_dtype"),
    [
        (N1, "bfloat16", "uint4", "bfloat16"),
        (A72, "bfloat16", "nf4", "float16"),
        (N1, "float32", "float8_e4m3", "float32"),
        (N1, "float8_e4m3", "float8_e5m2", "bfloat16"),
        (A72, "float8_e5m2", "int6", "float16"),
    ],
)
def test_other_activations(check, target, a_dtype, name, out_dtype):
    check(target, config(name, a_dtype, with_scaling=True, with_bias=True, group_size=32, out_dtype=out_dtype))


def covering_quantized():
    """Activations that are quantized on the fly, by row and by group; formats, A, shapes and zeros in turn."""
    names = ("uint4", "int8", "int2", "uint3", "uint8")
    for i, (target, how, shape) in enumerate(
        itertools.product((N1, A72), ("row", "group"), (*SHAPES[:2], UGLY_SHAPES[3]))
    ):
        yield target, how, ("float16", "bfloat16", "float32")[i % 3], names[i % 5], shape, i % 2 == 0


@pytest.mark.parametrize(("target", "how", "a_dtype", "name", "shape", "zeros"), ids(covering_quantized()))
def test_quantized_activations(check, target, how, a_dtype, name, shape, zeros):
    N, K, group = shape
    fields = {"N": N, "K": K, "group_size": group, "with_scaling": True, "with_zeros": zeros}
    rules = check(target, config(name, a_dtype, dynamic_quantization=how, **fields))
    unit = "neon_dot" if target == N1 and shape in SHAPES else "neon"
    assert rules == {unit}


@pytest.mark.parametrize("target", [N1, A72])
@pytest.mark.parametrize(
    ("out_dtype", "name", "scaling"), [("int32", "int8", False), ("int8", "uint4", True), ("int8", "int2", False)]
)
def test_integer_outputs(check, target, out_dtype, name, scaling):
    check(target, config(name, "int8", with_scaling=scaling, with_bias=True, out_dtype=out_dtype, accum_dtype="int32"))


#: Terms of which int32 just holds the sum (65793 · 128 · 255 < 2^31), and more than that, even of signed bytes.
LONG, LONGER = 65792, 131584


def covering_extremes():
    for target in (N1, A72):
        for name in ("uint8", "int8", "uint7", "int1"):
            yield target, name, 1056, "int32"
        yield target, "uint8", LONG, "int32"
        yield target, "uint8", LONGER, "float32"
        yield target, "int8", LONGER, "int32"


@pytest.mark.parametrize(("target", "name", "K", "out_dtype"), ids(covering_extremes()))
def test_extremes_are_exact(check, target, name, K, out_dtype):
    """The largest and smallest codes, each times the largest and smallest activations, and the largest zero point."""
    bits = FORMATS[name].bits
    zeros = name.startswith("u") and K < LONG
    cfg = config(
        name, "int8", N=16, K=K, out_dtype=out_dtype, accum_dtype="int32", with_zeros=zeros, zeros_mode="quantized"
    )
    codes = torch.zeros(cfg.N, K, dtype=torch.int64)
    codes[: cfg.N // 2] = (1 << bits) - 1
    if name == "int8":
        codes[: cfg.N // 2], codes[cfg.N // 2 :] = 127, 128
    problems = []
    for rows in ([-128], [127, -128, 127]):
        A = torch.tensor(rows, dtype=torch.int8)[:, None].expand(-1, K).contiguous()
        problem = reference.Problem(cfg, A, codes)
        if zeros:
            values = torch.full((cfg.N, 1), (1 << bits) - 1, dtype=torch.int64)
            packed = reference.pack_bits(values.T.contiguous(), bits)
            problem = replace(problem, zeros=packed, zero_values=values.to(torch.float64))
        problems.append((problem, reference.assert_exact))
    check(target, cfg, problems)
