"""Matmul against the float64 reference: the bound, and the exact cases, on small and on real shapes."""

import itertools
import platform
from dataclasses import replace

import pytest
import torch

import bitblas
import reference
from bitblas import ArgumentError, MatmulConfig, UnsupportedError
from bitblas.config import A_DTYPES, LAYOUTS, ZEROS_MODES
from bitblas.formats import FORMATS
from bitblas.ops.provider import plan_key
from bitblas.plan import native_layout, plan_matmul
from bitblas.schedule import RULES, Problem, select_rule
from bitblas.target import host_features, resolve_target
from devices import shift

#: This CPU, and less of it: each instruction set has rules of its own.
X86 = [
    name
    for name in ("llvm", "cascadelake", "skylake-avx512", "alderlake", "haswell", "x86-64-v2")
    if resolve_target(name).features <= host_features()
]
FLOATS = ("float16", "bfloat16", "float32")
INTEGERS = [name for name, fmt in FORMATS.items() if fmt.is_integer]
UNSIGNED = [name for name, fmt in FORMATS.items() if fmt.kind == "uint"]
UGLY_ROWS = (0, 1, 2, 13, 16, 17, 257)
#: N, K and group: shapes of the lane layout and others, in turn.
SHAPES = [(32, 64, 16), (5, 8, 4), (48, 40, -1), (17, 33, 11), (64, 128, 32), (16, 8, 8), (31, 50, 1), (80, 72, 24)]


def config(N=32, K=64, M=(1, 16), **fields):
    return MatmulConfig(**{"M": M, "N": N, "K": K, "out_dtype": "float32", "accum_dtype": "float32", **fields})


def weigh(op, problem):
    """The problem's weights as the operator wants them."""
    return op.transform_weight(problem.weights)


def draw(op, m, **options):
    """A problem for an operator, as its kernels solve it."""
    problem = reference.draw(op.config, m, **options)
    return reference.on_tensor_cores(problem) if op.layout.is_fragments else problem


def check(op, rows, seed=0, **options):
    """The bound and the exact case for each number of rows."""
    for exact in (False, True):
        problem = draw(op, max(rows), seed=seed, exact=exact, **options)
        W = weigh(op, problem)
        for m in rows:
            part = replace(problem, A=problem.A[:m])
            out = op(part.A, W, **part.extras)
            (reference.assert_exact if exact else reference.assert_close)(out, part)


def ids(cases):
    return [pytest.param(*case, id="-".join(str(field) for field in case)) for case in cases]


# -- formats, activations, groups, zeros, bias -----------------------------------------------------------------------------


def covering_formats():
    """Every format with every A; shapes, bias, scaling, and out_dtype in turn."""
    for i, (name, a_dtype) in enumerate(itertools.product(FORMATS, A_DTYPES)):
        out_dtype = ("float32", a_dtype if a_dtype in FLOATS else "float16", "bfloat16")[(i + i // 4) % 3]
        yield name, a_dtype, out_dtype, (i + i // 8) % len(SHAPES), (i // 3) % 2 == 0, i % 5 != 0


@pytest.mark.parametrize(("name", "a_dtype", "out_dtype", "shape", "bias", "scaling"), ids(covering_formats()))
def test_formats(build, name, a_dtype, out_dtype, shape, bias, scaling):
    N, K, group = SHAPES[shape]
    fields = {
        "out_dtype": out_dtype,
        "with_bias": bias,
        "with_scaling": scaling,
        "group_size": group if scaling else -1,
    }
    check(build(config(N, K, A_dtype=a_dtype, W_dtype=name, **fields)), (1, 2, 17))


def covering_zeros():
    """Every format with every zeros mode that it allows; A, shapes, bias and scaling in turn."""
    modes = [(name, mode) for name in INTEGERS for mode in ZEROS_MODES if name in UNSIGNED or mode != "quantized"]
    for i, (name, mode) in enumerate(modes):
        yield (
            name,
            mode,
            A_DTYPES[(i + i // 3) % len(A_DTYPES)],
            (i + i // 8) % len(SHAPES),
            i % 4 == 0,
            i % 3 != 2 or mode == "rescale",
        )


@pytest.mark.parametrize(("name", "mode", "a_dtype", "shape", "bias", "scaling"), ids(covering_zeros()))
def test_zeros(build, name, mode, a_dtype, shape, bias, scaling):
    N, K, group = SHAPES[shape]
    fields = {"with_zeros": True, "zeros_mode": mode, "with_bias": bias, "with_scaling": scaling, "group_size": group}
    check(build(config(N, K, A_dtype=a_dtype, W_dtype=name, **fields)), (1, 3, 16))


def covering_groups():
    """Group × zeros × bias, over shapes; format, A and scaling in turn."""
    names = ("uint4", "uint2", "uint3", "uint8", "uint1")
    for i, (group, mode, bias) in enumerate(
        itertools.product((-1, 1, 2, 4, 8, 24, 48), (None, *ZEROS_MODES), (False, True))
    ):
        yield (
            group,
            mode,
            bias,
            names[i % 5],
            A_DTYPES[(i + i // 4) % len(A_DTYPES)],
            ((32, 48), (21, 48))[(i + i // 2) % 2],
        )


@pytest.mark.parametrize(("group", "mode", "bias", "name", "a_dtype", "shape"), ids(covering_groups()))
def test_groups(build, group, mode, bias, name, a_dtype, shape):
    fields = {"with_zeros": mode is not None, "zeros_mode": mode, "with_bias": bias, "with_scaling": True}
    rows = (1,) if shape[0] == 32 else (16,)
    check(build(config(*shape, rows, A_dtype=a_dtype, W_dtype=name, group_size=group, **fields)), (1, 5, 18))


@pytest.mark.parametrize("N", [256, 257], ids=["lanes", "packed"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_code_at_every_place(build, name, N):
    """Unit rows pick single codes, so that each must come out to the last bit."""
    op = build(config(N, 8, (16,) if N == 256 else (1,), A_dtype="float32", W_dtype=name, with_scaling=True))
    if FORMATS[name].bits <= 8:
        choices = reference.table(name).isfinite().nonzero().flatten()
    else:
        choices = reference.float_codes(
            torch.cat([torch.randn(200), torch.randn(200) * 1e-39, torch.tensor([6e4, -0.0])]), name
        )
    places = torch.arange(N)[:, None] + 37 * torch.arange(8)
    codes = choices[places % len(choices)]
    scale = torch.full((N, 1), 2.0)
    problem = reference.Problem(op.config, torch.eye(8), codes, scale=scale)
    for rows in (problem.A, problem.A[3:4]):
        part = replace(problem, A=rows)
        reference.assert_exact(op(rows, weigh(op, part), scale), part)


@pytest.mark.parametrize("target", X86)
@pytest.mark.parametrize("name", INTEGERS)
def test_every_code_at_every_place_of_four_bytes(build, name, target):
    """The same where integers are multiplied, of which int8 activations of one pick single codes."""
    op = build(config(256, 32, (1, 16), A_dtype="int8", W_dtype=name, out_dtype="int32", accum_dtype="int32"), target)
    choices = torch.arange(len(reference.table(name)))
    codes = choices[(torch.arange(256)[:, None] + 37 * torch.arange(32)) % len(choices)]
    for value in (1, -128, 127):
        problem = reference.Problem(op.config, torch.eye(32).mul(value).to(torch.int8), codes)
        W = weigh(op, problem)
        for rows in (problem.A, problem.A[11:12]):
            part = replace(problem, A=rows)
            reference.assert_exact(op(rows, W), part)


@pytest.mark.parametrize("target", X86)
@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [127, -128])
def test_integers_at_the_ends_of_their_ranges(build, name, target, value):
    """Every product as large as it can be: where an instruction saturates, it is here."""
    values = reference.table(name)
    op = build(config(32, 512, (1, 16), A_dtype="int8", W_dtype=name, out_dtype="int32", accum_dtype="int32"), target)
    for code in (int(values.argmin()), int(values.argmax())):
        codes = torch.full((32, 512), code)
        codes[3] = torch.arange(512) % len(values)
        problem = reference.Problem(op.config, torch.full((5, 512), value, dtype=torch.int8), codes)
        for m in (1, 5):
            reference.assert_exact(op(problem.A[:m], weigh(op, problem)), replace(problem, A=problem.A[:m]))


def covering_groups():
    """Pairs of integers with every zeros mode on every instruction set; one group and several in turn, others now and then."""
    pairs = (("int8", "int8"), ("int8", "uint3"), ("int4", "int4"), ("int4", "int2"))
    cases = itertools.product(X86, pairs, (None, *ZEROS_MODES))
    for i, (target, (a_dtype, name), mode) in enumerate(cases):
        if mode == "quantized" and name not in UNSIGNED:
            continue
        for group in (-1, 32):
            other = (i + i // 4) % 2 == (group == 32)
            label = "-".join(map(str, (target, a_dtype, name, mode, group)))
            marks = pytest.mark.exhaustive if other else ()
            yield pytest.param(a_dtype, name, mode, group, target, id=label, marks=marks)


@pytest.mark.parametrize(("a_dtype", "name", "mode", "group", "target"), list(covering_groups()))
def test_groups_of_integers_on_every_instruction_set(build, a_dtype, name, mode, group, target):
    fields = {"with_scaling": True, "with_zeros": mode is not None, "zeros_mode": mode, "group_size": group}
    check(build(config(96, 160, A_dtype=a_dtype, W_dtype=name, with_bias=True, **fields), target), (1, 4, 17))


@pytest.mark.parametrize("target", X86)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_on_every_instruction_set(build, name, target):
    check(build(config(48, 64, A_dtype="float16", W_dtype=name, with_scaling=True, group_size=16), target), (1, 5, 17))


@pytest.mark.parametrize(
    ("a_dtype", "name"), [("float8_e4m3", "float8_e4m3"), ("float8_e5m2", "float8_e4m3"), ("float8_e4m3", "uint4")]
)
@pytest.mark.parametrize("N", [32, 7])
@pytest.mark.parametrize("out_dtype", FLOATS)
def test_float8_activations(build, a_dtype, name, N, out_dtype):
    check(build(config(N, 40, A_dtype=a_dtype, W_dtype=name, out_dtype=out_dtype, with_bias=True)), (1, 3, 17))


@pytest.mark.parametrize("a_dtype", ["float8_e4m3", "float8_e5m2"])
def test_every_float8_activation(build, a_dtype):
    """Each byte as an activation, NaN and infinity as well, times one."""
    op = build(config(16, 8, A_dtype=a_dtype, W_dtype="uint4"))
    A = torch.zeros(256, 8, dtype=torch.uint8)
    A[:, 3] = torch.arange(256)
    codes = torch.zeros(16, 8, dtype=torch.uint8)
    codes[:, 3] = 1
    out = op(A.view(reference.held(a_dtype)), op.transform_weight(codes))
    expected = reference.table(a_dtype).to(torch.float32)[:, None].expand(256, 16)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["int4", "int2", "uint4", "int8", "nf4"])
@pytest.mark.parametrize("K", [64, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_int4_activations_as_values_and_in_pairs(build, name, K, layout):
    op = build(config(32, K, A_dtype="int4", W_dtype=name, layout=layout))
    problem = draw(op, 6)
    W = op.transform_weight(problem.weights.mT if layout[1] == "n" else problem.weights)
    for A in (problem.A, reference.pairs(problem.A)):
        for lead in ((6,), (2, 3)):
            given = A.view(*lead, -1)
            out = op(given.mT if layout[0] == "t" else given, W)
            assert out.shape == (*lead, 32)
            reference.assert_close(out.view(6, 32), problem)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("a_dtype", "name"), [("float16", "uint4"), ("int8", "int8"), ("float32", "float32"), ("float8_e4m3", "nf4")]
)
def test_layouts(build, layout, a_dtype, name):
    op = build(config(48, 40, A_dtype=a_dtype, W_dtype=name, layout=layout, with_scaling=True, group_size=8))
    problem = reference.draw(op.config, 12, exact=True)
    W = op.transform_weight(problem.weights.mT if layout[1] == "n" else problem.weights)
    for lead in ((12,), (3, 4), (2, 1, 6), (12, 1)):
        A = problem.A.view(*lead, 40)
        A = A.mT if layout[0] == "t" else A
        for given in (A, A.contiguous()):
            output = torch.empty(*lead, 48)
            out = op(given, W, problem.scale, output=output)
            assert out is output
            reference.assert_exact(out.view(12, 48), problem)
    reference.assert_exact(op(problem.A[5], W, problem.scale)[None], replace(problem, A=problem.A[5:6]))
    assert op(
        torch.zeros(40, 0).to(problem.A.dtype) if layout[0] == "t" else problem.A[:0], W, problem.scale
    ).shape == (0, 48)


def test_operators_that_differ_at_the_door_share_their_kernels(build):
    ops = [
        build(config(48, 64, A_dtype=a, W_dtype="int4", layout=layout)) for a in ("int8", "int4") for layout in LAYOUTS
    ]
    assert len({plan_key(op.plan) for op in ops}) == 1


@pytest.mark.parametrize("N", [16, 5], ids=["lanes", "packed"])
@pytest.mark.parametrize("name", ["float8_e4m3", "float8_e5m2", "float16", "bfloat16", "float32"])
def test_infinity_and_nan_of_weights(build, name, N):
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0, -2.0])
    values = values.to(getattr(torch, FORMATS[name].torch_name))
    weight = values[torch.arange(N) % 5][:, None].view(torch.uint8).repeat(1, 8).view(values.dtype)
    op = build(config(N, 8, A_dtype="float32", W_dtype=name))
    out = op(torch.ones(2, 8), op.transform_weight(weight))
    expected = weight.to(torch.float32).sum(1).expand(2, N)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


# -- sizes -----------------------------------------------------------------------------------------------------------------

UGLY = [
    (1, 1, -1), (1, 7, 7), (5, 8, 4), (3, 1, 1), (16, 4, 2), (17, 33, 3), (31, 100, 4), (33, 8, 8), (48, 56, 28), (100, 10, 5),
    (112, 88, 4), (13, 257, -1), (16, 520, 8),
]  # fmt: skip


@pytest.mark.parametrize(("N", "K", "group"), UGLY)
@pytest.mark.parametrize(("name", "a_dtype"), [("uint4", "float16"), ("int3", "bfloat16"), ("uint7", "int8")])
def test_ugly_sizes(build, name, a_dtype, N, K, group):
    fields = {"with_scaling": True, "with_bias": True, "group_size": group}
    if name != "int3":
        fields |= {"with_zeros": True, "zeros_mode": "quantized"}
    check(build(config(N, K, A_dtype=a_dtype, W_dtype=name, **fields)), UGLY_ROWS)


CHUNKED = [(80, 384, -1), (80, 640, 160), (33, 300, -1), (96, 1032, 344)]


@pytest.mark.parametrize(("N", "K", "group"), CHUNKED)
@pytest.mark.parametrize(
    ("a_dtype", "name", "mode"),
    [
        ("float16", "uint4", "quantized"),
        ("float32", "nf4", None),
        ("int8", "uint3", "original"),
        ("bfloat16", "float16", None),
        ("int8", "int8", None),
    ],
)
def test_more_than_one_chunk_of_k_and_slab_of_rows(build, a_dtype, name, mode, N, K, group):
    fields = {"with_zeros": mode is not None, "zeros_mode": mode, "with_scaling": name != "int8", "group_size": group}
    check(build(config(N, K, (1, 16, 128), A_dtype=a_dtype, W_dtype=name, **fields)), (1, 7, 40, 300))


@pytest.mark.parametrize("M", [m for m in UGLY_ROWS if m])
@pytest.mark.parametrize(("N", "K"), [(48, 24), (21, 19)])
def test_static_rows(build, N, K, M):
    op = build(config(N, K, M, A_dtype="float16", W_dtype="int4", with_scaling=True, with_bias=True))
    check(op, (M,))
    problem = reference.draw(op.config, M, exact=True)
    W = weigh(op, problem)
    for lead in ((M,), (1, M), (M, 1), (1, M, 1), *([(2, M // 2)] if M % 2 == 0 else [])):
        out = op(problem.A.view(*lead, K), W, **problem.extras)
        assert out.shape == (*lead, N)
        reference.assert_exact(out.view(M, N), problem)


@pytest.mark.parametrize("M", [(4,), [1, 2, 4], (32, 1, 8, 8), None, (1000,)], ids=str)
def test_any_number_of_rows_between_and_beyond_buckets(build, M):
    op = build(config(48, 40, M, A_dtype="float32", W_dtype="uint4", with_scaling=True, with_zeros=True, group_size=8))
    check(op, (0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 70))


@pytest.mark.parametrize("lead", [(), (1,), (3,), (0,), (2, 3), (1, 1), (2, 1, 3), (2, 0, 3), (1, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("N", [32, 7])
def test_any_rank(build, N, lead):
    op = build(config(N, 24, A_dtype="float16", W_dtype="int4", out_dtype="float16", with_scaling=True, group_size=8))
    problem = reference.draw(op.config, int(torch.Size(lead).numel()), exact=True)
    out = op(problem.A.view(*lead, 24), weigh(op, problem), **problem.extras)
    assert out.shape == (*lead, N)
    reference.assert_exact(out.reshape(-1, N), problem)


# -- memory ----------------------------------------------------------------------------------------------------------------


def misaligned(tensor):
    """The same values, one element after an allocation's begin."""
    copy = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return copy.copy_(tensor)


def strided(tensor):
    """The same values, with gaps between neighbours."""
    copy = torch.empty((*tensor.shape[:-1], 2 * tensor.shape[-1]), dtype=tensor.dtype)[..., ::2]
    return copy.copy_(tensor)


def transposed(tensor):
    """The same values, column by column in memory."""
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor


def offset_rows(tensor):
    """The same values, as the middle columns of a wider tensor."""
    shape = (*tensor.shape[:-1], tensor.shape[-1] + 5)
    return torch.empty(shape, dtype=tensor.dtype)[..., 3:-2].copy_(tensor)


MEMORY = (misaligned, strided, transposed, offset_rows)
#: Small enough for tails, large enough for vectors.
GROUPED = {"with_scaling": True, "with_zeros": True, "with_bias": True, "group_size": 8}
MIXED = [
    ("float16", "uint4", "original"),
    ("bfloat16", "uint3", "quantized"),
    ("int8", "int2", "rescale"),
    ("float32", "uint8", "quantized"),
]


@pytest.mark.parametrize(("N", "K"), [(48, 40), (21, 24)])
@pytest.mark.parametrize(("a_dtype", "name", "mode"), MIXED)
def test_operands_anywhere_in_memory(build, a_dtype, name, mode, N, K):
    op = build(config(N, K, A_dtype=a_dtype, W_dtype=name, zeros_mode=mode, **GROUPED))
    for m in (1, 6, 16):
        problem = reference.draw(op.config, m, exact=True)
        W = weigh(op, problem)
        for move in MEMORY:
            reference.assert_exact(op(move(problem.A), W, **problem.extras), problem)
        reference.assert_exact(op(problem.A, misaligned(W), **problem.extras), problem)
        reference.assert_exact(
            op(problem.A, W, **{key: misaligned(tensor) for key, tensor in problem.extras.items()}), problem
        )
        first = shift(torch.float32)
        out = torch.full((m * N + first,), 77, dtype=torch.float32)
        assert op(problem.A, W, **problem.extras, output=out[first:].view(m, N)).data_ptr() == out[first:].data_ptr()
        reference.assert_exact(out[first:].view(m, N), problem)
        assert (out[:first] == 77).all()


@pytest.mark.parametrize("move", [strided, transposed])
@pytest.mark.parametrize("operand", ["W", "scale", "zeros", "bias"])
def test_other_operands_are_made_contiguous_or_refused(build, operand, move):
    op = build(config(48, 40, A_dtype="float16", W_dtype="uint4", **GROUPED))
    problem = reference.draw(op.config, 3, exact=True)
    operands = {"W": weigh(op, problem), **problem.extras}
    operands[operand] = move(operands[operand])
    try:
        out = op(problem.A, **operands)
    except ArgumentError as error:
        assert operand in str(error)  # noqa: PT017 - either outcome is right
    else:
        reference.assert_exact(out, problem)


def test_views_with_shared_memory(build):
    """A broadcast row, and a window that slides over one buffer."""
    op = build(config(32, 24, A_dtype="float32", W_dtype="int4"))
    problem = reference.draw(op.config, 1, exact=True)
    W = weigh(op, problem)
    rows = problem.A.expand(5, 24)
    reference.assert_exact(op(rows, W), replace(problem, A=rows))
    windows = torch.arange(60.0).as_strided((7, 24), (3, 1))
    reference.assert_exact(op(windows, W), replace(problem, A=windows))


@pytest.mark.parametrize("N", [48, 21])
def test_output_is_written_in_full_and_nowhere_else(build, N):
    op = build(config(N, 40, A_dtype="float16", W_dtype="int4", out_dtype="float16", with_scaling=True))
    for m in (1, 2, 13, 17, 33):
        problem = reference.draw(op.config, m, exact=True)
        rows = shift(torch.float16)
        room = torch.full((m + 2 * rows, N), 77.0, dtype=torch.float16)
        result = op(problem.A, weigh(op, problem), **problem.extras, output=room[rows:-rows])
        assert result.data_ptr() == room[rows:-rows].data_ptr()
        reference.assert_exact(room[rows:-rows], problem)
        assert (room[:rows] == 77).all()
        assert (room[-rows:] == 77).all()


def test_output_of_higher_rank(build):
    op = build(config(32, 24, A_dtype="float16", W_dtype="int4"))
    problem = reference.draw(op.config, 6, exact=True)
    out = torch.full((2, 3, 32), float("nan"))
    assert op(problem.A.view(2, 3, 24), weigh(op, problem), output=out) is out
    reference.assert_exact(out.view(6, 32), problem)


def test_operands_are_left_alone(build):
    op = build(config(48, 40, A_dtype="float16", W_dtype="uint4", **GROUPED))
    problem = reference.draw(op.config, 5)
    operands = {"A": problem.A, "W": weigh(op, problem), **problem.extras}
    before = {name: tensor.clone() for name, tensor in operands.items()}
    op(**operands)
    assert all(torch.equal(operands[name], before[name]) for name in operands)


# -- calling ---------------------------------------------------------------------------------------------------------------


def test_extras_bind_by_order_and_by_name(build):
    both = build(config(32, 24, A_dtype="float16", W_dtype="uint4", **{**GROUPED, "zeros_mode": "rescale"}))
    problem = reference.draw(both.config, 3, exact=True)
    W = weigh(both, problem)
    for out in (
        both(problem.A, W, problem.scale, problem.zeros, problem.bias),
        both(problem.A, W, problem.scale, bias=problem.bias, zeros=problem.zeros),
        both(A=problem.A, W=W, **problem.extras),
        both.forward(problem.A, W, problem.scale, problem.zeros, problem.bias),
    ):
        reference.assert_exact(out, problem)
    only = build(config(32, 24, A_dtype="float16", W_dtype="uint4", with_bias=True))
    problem = reference.draw(only.config, 3, exact=True)
    out = torch.empty(3, 32)
    reference.assert_exact(only(problem.A, weigh(only, problem), problem.bias, output=out), problem)
    zeroed = build(config(32, 24, A_dtype="float16", W_dtype="uint4", with_zeros=True, with_bias=True))
    problem = reference.draw(zeroed.config, 3, exact=True)
    reference.assert_exact(zeroed(problem.A, weigh(zeroed, problem), problem.zeros, problem.bias), problem)


@pytest.mark.parametrize("name", ["uint4", "int3", "int8", "float8_e4m3"])
@pytest.mark.parametrize("N", [32, 7])
def test_packed_weight_as_any_bytes(build, name, N):
    op = build(config(N, 24, A_dtype="float16", W_dtype=name))
    problem = reference.draw(op.config, 4, exact=True)
    W = weigh(op, problem)
    assert W.dtype is torch.int8 or name == "float8_e4m3"
    for held in (W.view(torch.int8), W.view(torch.uint8), torch.nn.Parameter(W.view(torch.int8), requires_grad=False)):
        reference.assert_exact(op(problem.A, held), problem)


def test_inference_mode_and_parameters(build):
    op = build(config(32, 24, A_dtype="float32", W_dtype="int4", with_scaling=True, with_bias=True))
    problem = reference.draw(op.config, 4, exact=True)
    W = weigh(op, problem)
    extras = {name: torch.nn.Parameter(tensor) for name, tensor in problem.extras.items()}
    with torch.inference_mode():
        reference.assert_exact(op(problem.A.clone(), W, **extras), problem)
    with torch.no_grad():
        reference.assert_exact(op(problem.A, W, **extras), problem)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_default_device_is_of_no_account(device):
    """Layers are constructed under `torch.device("meta")`; what is computed follows A."""
    cfg = config(32, 24, A_dtype="float16", W_dtype="uint4", **GROUPED)
    problem = reference.draw(cfg, 3, exact=True)
    weights = problem.weights
    with torch.device(device), torch.inference_mode():
        op = bitblas.Matmul(cfg, target="llvm")
        assert list(op.transform_weight(weights).shape) == op.retrieve_weight_shape()
        W = op.transform_weight(weights)
        assert torch.equal(op.unpack_weight(W).to(torch.int64), problem.codes)
        out = op(problem.A, W, **problem.extras)
    reference.assert_exact(out, problem)


def test_scale_of_one_group_may_be_a_vector(build):
    op = build(config(32, 24, A_dtype="float16", W_dtype="int4", with_scaling=True))
    problem = reference.draw(op.config, 3, exact=True)
    reference.assert_exact(op(problem.A, weigh(op, problem), problem.scale.view(-1)), problem)


def scale_dtypes():
    for name, group in itertools.product(("int2", "uint4", "int8"), (-1, 8)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            yield name, group, dtype


@pytest.mark.parametrize(("name", "group", "dtype"), ids(scale_dtypes()))
def test_scale_dtypes_of_int8_activations(build, name, group, dtype):
    fields = {"with_scaling": True, "group_size": group, "with_zeros": True, "zeros_mode": "original"}
    check(build(config(48, 24, A_dtype="int8", W_dtype=name, **fields)), (1, 5), scale_dtype=dtype)


@pytest.mark.parametrize("a_dtype", A_DTYPES)
@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("own", [False, True], ids=["bias-as-out", "bias-as-A"])
def test_bias_dtypes(build, a_dtype, out_dtype, own):
    dtype = reference.held(a_dtype) if own else getattr(torch, out_dtype)
    op = build(config(32, 24, A_dtype=a_dtype, W_dtype="int4", out_dtype=out_dtype, with_bias=True))
    check(op, (1, 5), bias_dtype=dtype)


# -- weights ---------------------------------------------------------------------------------------------------------------


def unbuilt(cfg):
    """An operator that only transforms weights, and so compiles nothing."""
    return bitblas.Matmul(cfg, target="llvm", from_database=True)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("N", "K"), [(48, 40), (5, 11)])
def test_packed_weight_is_what_the_reference_packs(name, N, K):
    """`pack` and `transform_weight` agree, and where nothing fits the lanes the tensor is the canonical one."""
    op = unbuilt(config(N, K, A_dtype="float16", W_dtype=name))
    problem = reference.draw(op.config, 2, exact=True)
    W = weigh(op, problem)
    shape = op.retrieve_weight_shape()
    assert isinstance(shape, list)
    assert all(type(size) is int for size in shape)
    assert list(W.shape) == shape
    assert shape[0] == N
    if FORMATS[name].is_native:
        return
    assert shape == [N, -(-K * FORMATS[name].bits // 8)]
    codes = problem.codes.to(torch.uint8)
    assert torch.equal(op.pack(codes).view(torch.int8), W.view(torch.int8))
    assert torch.equal(op.unpack_weight(W), codes)
    if K == 11:
        assert torch.equal(W.view(torch.int8), reference.pack_bits(problem.codes, FORMATS[name].bits))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["uint4", "int4", "uint2", "int1"])
def test_transform_weight_takes_any_dtype(name, dtype):
    if name.startswith("int") and dtype is torch.uint8:
        pytest.skip("uint8 holds no negative value")
    op = unbuilt(config(32, 24, A_dtype="float16", W_dtype=name))
    problem = reference.draw(op.config, 1)
    values = problem.weights
    assert torch.equal(op.transform_weight(values.to(dtype)), op.transform_weight(values))
    assert torch.equal(op.transform_weight(strided(values.to(dtype))), op.transform_weight(values))
    assert torch.equal(op.transform_weight(transposed(values.to(dtype))), op.transform_weight(values))


@pytest.mark.parametrize("name", ["float8_e4m3", "float8_e5m2"])
@pytest.mark.parametrize("N", [32, 7])
def test_float8_weights_as_tensors_or_bytes(build, name, N):
    op = build(config(N, 24, A_dtype="float16", W_dtype=name))
    problem = reference.draw(op.config, 3, exact=True)
    weight = problem.weights.view(getattr(torch, FORMATS[name].torch_name))
    for held in (weight, weight.view(torch.int8), weight.view(torch.uint8)):
        reference.assert_exact(op(problem.A, op.transform_weight(held)), problem)


# -- dtypes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accum_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("a_dtype", A_DTYPES)
def test_accumulation_exceeds_what_is_asked(build, a_dtype, accum_dtype):
    """A sum that needs more bits than float16 and bfloat16 have comes out as float32 holds it."""
    op = build(config(32, 64, A_dtype=a_dtype, W_dtype="uint8", accum_dtype=accum_dtype))
    problem = reference.draw(op.config, 5, exact=True)
    reference.assert_exact(op(problem.A, weigh(op, problem)), problem)


@pytest.mark.parametrize("out_dtype", ["int32", "int8", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["int8", "uint4", "int2", "uint8", "int1"])
def test_integers_without_scales_are_exact(build, name, out_dtype):
    op = build(config(48, 40, A_dtype="int8", W_dtype=name, out_dtype=out_dtype, accum_dtype="int32"))
    check(op, (1, 2, 17))
    problem = reference.draw(op.config, 9)
    if out_dtype.startswith("int"):
        reference.assert_exact(op(problem.A, weigh(op, problem)), problem)


@pytest.mark.parametrize("mode", [None, "quantized", "original", "rescale"])
@pytest.mark.parametrize("group", [-1, 8])
@pytest.mark.parametrize("out_dtype", ["int32", "int8"])
def test_integer_outputs_of_scaled_matmuls(build, out_dtype, group, mode):
    fields = {"with_scaling": True, "group_size": group, "with_zeros": mode is not None, "zeros_mode": mode}
    check(build(config(32, 24, A_dtype="int8", W_dtype="uint4", out_dtype=out_dtype, **fields)), (1, 5))


@pytest.mark.parametrize("value", [127, -128])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("N", "name"), [(16, "int8"), (16, "uint8"), (5, "int8"), (16, "int4")])
def test_integer_sums_beyond_float32(build, N, name, bias, value):
    """Sums past 2^24 keep their last bit."""
    K = 3001 if N == 5 else 3000
    op = build(config(N, K, A_dtype="int8", W_dtype=name, out_dtype="int32", accum_dtype="int32", with_bias=bias))
    codes = torch.full((N, K), {"int8": 129, "uint8": 255, "int4": 1}[name])
    codes[:, ::7] -= 1
    A = torch.full((2, K), value, dtype=torch.int8)
    A[1, ::5] += 1 if value < 0 else -1
    offset = torch.arange(N, dtype=torch.int32) * 3 + 2**25 + 1 if bias else None
    problem = reference.Problem(op.config, A, codes, bias=offset)
    reference.assert_exact(op(A, weigh(op, problem), **problem.extras), problem)


@pytest.mark.parametrize("N", [16, 5])
def test_int8_output_saturates(build, N):
    op = build(config(N, 8, A_dtype="int8", W_dtype="int8", out_dtype="int8", with_bias=True))
    A = torch.tensor([[127] * 8, [-128] * 8, [1] * 8, [0] * 8, [-1, 1] * 4], dtype=torch.int8)
    codes = torch.arange(N * 8).view(N, 8) % 256
    problem = reference.Problem(op.config, A, codes, bias=torch.arange(N).to(torch.int8))
    out = op(A, weigh(op, problem), bias=problem.bias)
    reference.assert_exact(out, problem)
    assert {-128, 127} <= set(out.flatten().tolist())


def test_int32_output_saturates(build):
    op = build(config(16, 8, A_dtype="int8", W_dtype="int8", out_dtype="int32", with_scaling=True))
    scale = torch.tensor([1e30, -1e30, 2.0**20, 1.0] * 4).view(16, 1)
    problem = reference.Problem(
        op.config, torch.full((1, 8), 100, dtype=torch.int8), torch.full((16, 8), 100), scale=scale
    )
    out = op(problem.A, weigh(op, problem), scale)
    assert out.flatten()[:4].tolist() == [2**31 - 1, -(2**31), 2**31 - 1, 80000]
    reference.assert_exact(out, problem)


@pytest.mark.parametrize("a_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("N", [48, 21])
def test_nan_and_infinity_stay_in_their_row(build, a_dtype, N):
    op = build(config(N, 40, A_dtype=a_dtype, W_dtype="int4", out_dtype=a_dtype, with_scaling=True, group_size=8))
    problem = reference.draw(op.config, 5, exact=True)
    problem.A[1, 3] = float("nan")
    problem.A[3, 0], problem.A[3, 1] = float("inf"), float("nan")
    out = op(problem.A, weigh(op, problem), **problem.extras)
    assert out[[1, 3]].isnan().all()
    kept = [0, 2, 4]
    reference.assert_exact(out[kept], replace(problem, A=problem.A[kept]))


def test_results_round_to_nearest_even_and_overflow_to_infinity(build):
    """1 + 2^-11 lies half way between two numbers of float16, as does 1 + 3·2^-11; 65520 rounds to infinity.

    (65520 - 2^-6 is the number below that slices, of 24 bits, hold exactly.)
    """
    for out_dtype, half in (("float16", 2.0**-11), ("bfloat16", 2.0**-8)):
        op = build(config(16, 8, A_dtype="float32", W_dtype="int8", out_dtype=out_dtype))
        A = torch.zeros(4, 8)
        A[:, 0] = 1.0
        A[:, 1] = torch.tensor([1.0, 3.0, -1.0, 1.5]) * half
        A = torch.cat([A, torch.tensor([[65520 - 2.0**-6], [65520.0], [-65520.0], [1e38]]) * torch.eye(8)[0]])
        problem = reference.Problem(op.config, A, torch.ones((16, 8), dtype=torch.int64))
        reference.assert_exact(op(A, weigh(op, problem)), problem)


@pytest.mark.parametrize("N", [16, 5])
def test_a_bias_saturates_too(build, N):
    op = build(config(N, 8, A_dtype="int8", W_dtype="int8", out_dtype="int32", with_bias=True))
    A = torch.tensor([[127] * 8, [-127] * 8], dtype=torch.int8)
    bias = torch.tensor([2**31 - 1, -(2**31), 2**31 - 129033, 0, 5] * 4, dtype=torch.int32)[:N]
    problem = reference.Problem(op.config, A, torch.full((N, 8), 127), bias=bias)
    reference.assert_exact(op(A, weigh(op, problem), bias=bias), problem)


# -- targets and tilings -----------------------------------------------------------------------------------------------------


def covering_targets():
    """Every format for older x86-64, with tilings and rules that this CPU would not choose; the rest in turn."""
    for i, (mcpu, name) in enumerate(itertools.product(("x86-64", "x86-64-v3"), FORMATS)):
        mode = ZEROS_MODES[i % 3] if name in UNSIGNED else None
        yield (
            mcpu,
            name,
            A_DTYPES[(i + i // 4) % len(A_DTYPES)],
            mode,
            ((48, 40), (21, 24))[(i + i // 2) % 2],
            (1, 16)[i // 2 % 2],
        )


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86-64 targets")
@pytest.mark.parametrize(("mcpu", "name", "a_dtype", "mode", "shape", "bucket"), ids(covering_targets()))
def test_targets(mcpu, name, a_dtype, mode, shape, bucket):
    fields = {"with_scaling": True, "with_zeros": mode is not None, "zeros_mode": mode, "group_size": 8}
    cfg = config(*shape, (bucket,), A_dtype=a_dtype, W_dtype=name, **fields)
    try:
        op = bitblas.Matmul(cfg, target=f"llvm -mcpu={mcpu}")
    except UnsupportedError as error:
        if "cannot run on this machine" not in str(error):
            raise
        pytest.skip(str(error))
    check(op, (1, 5, 17))


def tilings():
    """Every tiling that a rule offers for a small and a large number of rows, lanes and not."""
    for (N, K), m in itertools.product(((96, 256), (37, 96)), (1, 2, 16)):
        for a_dtype, name, zeros in (("float16", "uint4", True), ("int8", "int3", False), ("float32", "nf4", False)):
            fields = {"with_scaling": True, "with_zeros": zeros, "zeros_mode": "quantized" if zeros else None}
            cfg = config(N, K, (m,), A_dtype=a_dtype, W_dtype=name, **fields)
            target = resolve_target("llvm")
            problem = Problem(cfg, native_layout(cfg, target), target, m)
            for i, tiling in enumerate(select_rule(RULES, problem).tilings(problem)):
                yield pytest.param(cfg, tiling, id=f"{N}x{K}-m{m}-{name}-{i}")


@pytest.mark.parametrize(("cfg", "tiling"), list(tilings()))
def test_every_tiling_that_tuning_may_choose(cfg, tiling):
    op = bitblas.Matmul(cfg, target="llvm", from_database=True)
    op.plan = plan_matmul(cfg, op.target, dict.fromkeys(cfg.buckets, tiling))
    assert [kernel.tiling for kernel in op.plan.kernels] == [tiling]
    check(op, (1, 3, 16, 33))


# -- repeatable ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 7, 64])
@pytest.mark.parametrize(("N", "K"), [(256, 512), (131, 97)])
def test_bits_do_not_depend_on_run_or_threads(build, N, K, m):
    op = build(config(N, K, M=(1, 16, 64), A_dtype="float16", W_dtype="uint4", with_scaling=True))
    problem = reference.draw(op.config, m)
    W = weigh(op, problem)
    threads = torch.get_num_threads()
    first = op(problem.A, W, **problem.extras)
    reference.assert_close(first, problem)
    try:
        for count in (1, 2, 3, 5, threads):
            torch.set_num_threads(count)
            for _ in range(3):
                assert torch.equal(op(problem.A, W, **problem.extras), first)
    finally:
        torch.set_num_threads(threads)


def test_operators_of_one_config_agree(build):
    cfg = config(48, 40, A_dtype="float16", W_dtype="nf4", with_scaling=True)
    problem = reference.draw(cfg, 5)
    first, second = build(cfg), bitblas.Matmul(cfg, target="llvm")
    out = first(problem.A, weigh(first, problem), **problem.extras)
    assert torch.equal(second(problem.A, weigh(second, problem), **problem.extras), out)


# -- real shapes -----------------------------------------------------------------------------------------------------------

REAL = [
    ("float16", "uint4", "quantized", 4096, 4096, 128),
    ("float32", "uint4", "original", 4096, 4096, 128),
    ("bfloat16", "int4", None, 11008, 4096, 128),
    ("float16", "nf4", None, 4096, 11008, 64),
    ("int8", "int2", None, 4096, 4096, -1),
    ("float16", "uint3", "rescale", 5120, 5120, 64),
    ("float16", "float16", None, 4096, 4096, -1),
    ("float32", "int1", None, 14336, 4096, -1),
]


def every_seventh_column(problem):
    """The part of a large problem that the reference computes: 7 has no common divisor with a tile."""
    columns = torch.arange(0, problem.config.N, 7)
    parts = {name: getattr(problem, name) for name in ("codes", "scale", "zero_values", "bias")}
    parts = {name: part[columns] for name, part in parts.items() if part is not None}
    return columns, replace(problem, config=replace(problem.config, N=len(columns)), **parts)


@pytest.mark.slow
@pytest.mark.parametrize(("a_dtype", "name", "mode", "N", "K", "group"), ids(REAL))
def test_real_shapes(build, a_dtype, name, mode, N, K, group):
    fields = {
        "with_scaling": name != "float16",
        "with_zeros": mode is not None,
        "zeros_mode": mode,
        "group_size": group,
    }
    op = build(config(N, K, A_dtype=a_dtype, W_dtype=name, **fields))
    for exact in (False, True):
        problem = draw(op, 20, exact=exact)
        W = weigh(op, problem)
        columns, part = every_seventh_column(problem)
        for rows in (slice(3, 4), slice(0, 20)):
            out = op(problem.A[rows], W, **problem.extras)[:, columns]
            (reference.assert_exact if exact else reference.assert_close)(out, replace(part, A=problem.A[rows]))


# -- the tests themselves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("N", [256, 257], ids=["lanes", "packed"])
def test_one_flipped_code_is_noticed(build, name, N):
    op = build(config(N, 8, (16,) if N == 256 else (1,), A_dtype="float32", W_dtype=name, with_scaling=True))
    problem = reference.draw(op.config, 2, exact=True)
    codes = problem.codes.clone()
    values = reference.decode(codes[:1], name)[0]
    other = int((values != values[5]).nonzero()[0])  # a position with another value: 5 takes it
    codes[0, 5] = codes[0, other]
    flipped = weigh(op, replace(problem, codes=codes))
    with pytest.raises(AssertionError, match=r"2 of \d+ results are wrong, first at \[0, 0\]"):
        reference.assert_exact(op(problem.A, flipped, problem.scale), problem)


@pytest.mark.parametrize("a_dtype", A_DTYPES)
def test_two_swapped_scales_are_noticed(build, a_dtype):
    op = build(config(48, 40, A_dtype=a_dtype, W_dtype="uint4", with_scaling=True, group_size=8))
    problem = reference.draw(op.config, 2, exact=True)
    W = weigh(op, problem)
    pairs = [(n, g) for n in range(48) for g in range(4) if problem.scale[n, g] != problem.scale[n, g + 1]]
    n, g = pairs[0]
    swapped = problem.scale.clone()
    swapped[n, [g, g + 1]] = problem.scale[n, [g + 1, g]]
    with pytest.raises(AssertionError, match=rf"results are wrong, first at \[\d, {n}\]"):
        reference.assert_exact(op(problem.A, W, swapped), problem)


def test_one_wrong_zero_and_one_wrong_bias_are_noticed(build):
    op = build(config(48, 40, A_dtype="float16", W_dtype="uint4", **GROUPED))
    problem = reference.draw(op.config, 2, exact=True)
    W = weigh(op, problem)
    for name in ("zeros", "bias"):
        wrong = problem.extras[name].clone()
        wrong.view(-1)[7] += 1
        with pytest.raises(AssertionError, match="results are wrong"):
            reference.assert_exact(op(problem.A, W, **{**problem.extras, name: wrong}), problem)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e3])
def test_the_bound_notices(value):
    problem = reference.draw(config(32, 24, A_dtype="float16", W_dtype="int4", with_scaling=True), 3)
    out = problem.output().to(torch.float32)
    reference.assert_close(out, problem)
    out[1, 2] = value
    with pytest.raises(AssertionError, match=r"1 of 96 results are wrong, first at \[1, 2\]"):
        reference.assert_close(out, problem)
    with pytest.raises(AssertionError):
        reference.assert_close(out.to(torch.float16), problem)
    with pytest.raises(AssertionError):
        reference.assert_close(out[:2], problem)
