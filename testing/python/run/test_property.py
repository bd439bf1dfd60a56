"""Whole configurations and shapes drawn by hypothesis, against the float64 reference."""

import math

import pytest
import torch
from hypothesis import event, given, note
from hypothesis import strategies as st

import reference
from bitblas import MatmulConfig
from bitblas.config import A_DTYPES, LAYOUTS, OUT_DTYPES, SCALE_DTYPES, ZEROS_MODES
from bitblas.formats import FORMATS
from bitblas.target import host_features, resolve_target

#: This CPU, and less of it: each instruction set has rules of its own.
TARGETS = [
    name
    for name in ("llvm", "cascadelake", "skylake-avx512", "alderlake", "haswell", "x86-64-v2")
    if resolve_target(name).features <= host_features()
]
FLOATS = [name for name in OUT_DTYPES if not name.startswith("int")]
#: Sizes that fit the lanes, sizes that do not, and all between.
WIDTHS = st.one_of(st.sampled_from([16, 32, 48, 64, 112]), st.integers(1, 200))
DEPTHS = st.one_of(st.sampled_from([8, 24, 32, 64, 128, 200]), st.integers(1, 200))


@st.composite
def configs(draw):
    K = draw(DEPTHS)
    name, a_dtype = draw(st.sampled_from(list(FORMATS))), draw(st.sampled_from(A_DTYPES))
    fmt = FORMATS[name]
    integers = a_dtype in ("int8", "int4") and fmt.is_integer
    modes = ZEROS_MODES if fmt.kind == "uint" else ZEROS_MODES[:2]
    group_size = draw(st.sampled_from([-1, *(g for g in range(1, K + 1) if K % g == 0)]))
    quantizations = [None]
    if fmt.is_integer and a_dtype in ("float16", "bfloat16", "float32"):
        quantizations += ["row"] if group_size == 1 < K else ["row", "group"]
    rows = st.integers(1, 40)
    buckets = st.lists(st.integers(1, 48), min_size=1, max_size=3)
    return MatmulConfig(
        M=draw(st.one_of(rows, buckets, buckets.map(tuple), st.none())),
        N=draw(WIDTHS),
        K=K,
        A_dtype=a_dtype,
        W_dtype=name,
        out_dtype=draw(st.sampled_from(OUT_DTYPES if integers else FLOATS)),
        accum_dtype=draw(st.sampled_from([*FLOATS, "int32"] if integers else FLOATS)),
        layout=draw(st.sampled_from(LAYOUTS)),
        with_bias=draw(st.booleans()),
        group_size=group_size,
        with_scaling=draw(st.booleans()),
        with_zeros=fmt.is_integer and draw(st.booleans()),
        zeros_mode=draw(st.sampled_from(modes)),
        dynamic_quantization=draw(st.sampled_from(quantizations)),
    )


@st.composite
def leads(draw, config):
    """Leading dimensions of A that the operator takes."""
    if config.is_dynamic:
        return draw(
            st.one_of(st.integers(0, 40).map(lambda m: (m,)), st.lists(st.integers(0, 4), max_size=3).map(tuple))
        )
    divisor = draw(st.sampled_from([d for d in range(1, config.M + 1) if config.M % d == 0]))
    return draw(st.sampled_from([(config.M,), (divisor, config.M // divisor), (1, divisor, config.M // divisor)]))


def placed(tensor, how):
    """The same values elsewhere in memory."""
    if how == "misaligned":
        return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)
    if how == "strided":
        return torch.empty((*tensor.shape[:-1], 2 * tensor.shape[-1]), dtype=tensor.dtype)[..., ::2].copy_(tensor)
    return tensor.mT.contiguous().mT if how == "transposed" and tensor.ndim > 1 else tensor


def as_asked(A, config, packed):
    """(..., K) activations as the config's layout and dtype have them."""
    if packed:
        A = reference.pairs(A)
    return A.mT if config.layout[0] == "t" and A.ndim > 1 else A


@given(st.data())
def test_matmul(build, data):
    config, target = data.draw(configs()), data.draw(st.sampled_from(TARGETS))
    lead = data.draw(leads(config))
    exact = data.draw(st.booleans())
    packed = config.A_dtype == "int4" and config.K > 1 and data.draw(st.booleans())  # K = 1: a byte is a value
    dtypes = list(dict.fromkeys((reference.held(config.A_dtype), getattr(torch, config.out_dtype))))
    problem = reference.draw(
        config,
        math.prod(lead),
        seed=data.draw(st.integers(0, 2**31)),
        exact=exact,
        scale_dtype=getattr(torch, data.draw(st.sampled_from(SCALE_DTYPES)))
        if reference.width(config.A_dtype) <= 8
        else None,
        bias_dtype=data.draw(st.sampled_from(dtypes)),
    )
    how = data.draw(st.sampled_from(["as it is", "misaligned", "strided", "transposed"]))
    note(f"{config}, {target}, lead {lead}, exact {exact}, {how}, packed {packed}")
    event(f"{config.A_dtype} x {config.W_dtype}, quantized by {config.dynamic_quantization}")
    op = build(config, target)
    event(op.plan.kernels[0].rule)
    W = op.transform_weight(problem.weights.mT if config.layout[1] == "n" else problem.weights)
    A = placed(as_asked(problem.A.view(*lead, config.K), config, packed), how)
    extras = {
        name: placed(tensor, "misaligned") if how == "misaligned" else tensor for name, tensor in problem.extras.items()
    }
    out = op(A, W, **extras)
    assert out.shape == (*lead, config.N)
    (reference.assert_exact if exact else reference.assert_close)(out.reshape(-1, config.N), problem)


@pytest.mark.parametrize("given_output", [False, True])
@given(st.data())
def test_rows_do_not_depend_on_each_other(build, given_output, data):
    """Each row of a result is, up to the bound, what the row alone gives; exactly so in the exact cases."""
    fields = {"out_dtype": "float32", "with_scaling": True, "with_bias": True, "group_size": 8}
    name = data.draw(st.sampled_from(["uint4", "int3", "nf4"]))
    shape = data.draw(st.sampled_from([(32, 40), (21, 40)]))
    op = build(MatmulConfig([1, 8], *shape, "float16", name, **fields))
    m = data.draw(st.integers(1, 40))
    problem = reference.draw(op.config, m, seed=data.draw(st.integers(0, 2**31)), exact=True)
    W = op.transform_weight(problem.weights)
    out = torch.full((m, shape[0]), math.nan) if given_output else None
    out = op(problem.A, W, **problem.extras, output=out)
    row = data.draw(st.integers(0, m - 1))
    assert torch.equal(op(problem.A[row], W, **problem.extras), out[row])
