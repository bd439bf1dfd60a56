"""FlashAtten against float64: data types, layouts, masks, lengths, grouped heads, odd values, and tensors of any strides."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import event, given, note
from hypothesis import strategies as st

import attention_reference as reference
from bitblas import FlashAtten, FlashAttenConfig
from bitblas.plan import make_plan
from bitblas.target import resolve_target

HALF, BRAIN, FLOAT = "float16", "bfloat16", "float32"


def config(dim, dtypes, layout="nnn", is_causal=False, dim_v=None, softmax_scale=None, **sizes):
    """A config that leaves all sizes open but those of a head; `dtypes` of Q, K, V and the output, or one for all."""
    q, k, v, out = (dtypes,) * 4 if isinstance(dtypes, str) else dtypes
    sizes = {"seq_len_kv": None, **sizes}
    return FlashAttenConfig(
        dim=dim,
        Q_dtype=q,
        K_dtype=k,
        V_dtype=v,
        Out_dtype=out,
        layout=layout,
        is_causal=is_causal,
        dim_v=dim_v,
        softmax_scale=softmax_scale,
        **sizes,
    )


#: The rows that a kernel is fast for, and what kernels differ in: each row costs the compilation of one. All are called with
#: any number of rows.
CONFIGS = {
    "float32": (256, config(64, FLOAT)),
    "float32 causal": (64, config(64, FLOAT, is_causal=True)),
    "float16": (1024, config(64, HALF)),
    "float16 causal": (16, config(64, HALF, is_causal=True)),
    "bfloat16 causal": (256, config(64, BRAIN, is_causal=True)),
    "bfloat16 128 ntn": (64, config(128, BRAIN, "ntn")),
    "float32 128 ntn causal": (16, config(128, FLOAT, "ntn", is_causal=True)),
    "float32 1 causal": (1, config(1, FLOAT, is_causal=True)),
    "float16 3 to 5 ntn causal": (16, config(3, HALF, "ntn", is_causal=True, dim_v=5)),
    "bfloat16 17": (1, config(17, BRAIN)),
    "row float32 causal": (1, config(64, FLOAT, is_causal=True)),
    "row float16 40 to 200": (1, config(40, HALF, dim_v=200)),
    "row bfloat16 128 ntn causal": (1, config(128, BRAIN, "ntn", is_causal=True)),
    "mixed 40 to 64 causal": (64, config(40, (HALF, BRAIN, FLOAT, FLOAT), is_causal=True, dim_v=64)),
    "mixed 96 to 40 ntn": (256, config(96, (FLOAT, HALF, BRAIN, BRAIN), "ntn", dim_v=40)),
    "bfloat16 256 causal": (1024, config(256, BRAIN, is_causal=True)),
    "large scale 256 to 1": (64, config(256, HALF, dim_v=1, softmax_scale=2.0)),
    "negative scale mixed 80 ntn": (64, config(80, (BRAIN, BRAIN, HALF, HALF), "ntn", softmax_scale=-0.3)),
    "no scale": (16, config(8, FLOAT, softmax_scale=0.0)),
}
ROW_CONFIGS = [which for which in CONFIGS if which.startswith("row")]
#: batch, heads, heads of K and V, queries, keys.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 4, 4, 17, 17),
    (1, 8, 2, 5, 131),
    (2, 4, 1, 131, 5),
    (1, 2, 2, 300, 300),
    (3, 6, 3, 1, 97),
    (1, 3, 3, 129, 193),
    (1, 6, 2, 96, 1),
]
SEEDS = st.integers(0, 2**31)


@functools.cache
def attention(which):
    """An operator for any sizes, with the one kernel of a row of CONFIGS."""
    rows, open_config = CONFIGS[which]
    plan = make_plan(open_config.for_bucket(rows), resolve_target("llvm"))
    assert len(plan.kernels) == 1
    return FlashAtten.restore(open_config, plan)


def draw(which, batch, heads, heads_kv, seq_len, seq_len_kv, **options):
    return reference.draw(attention(which).config, batch, heads, seq_len, heads_kv, seq_len_kv, **options)


def assert_close(out, problem):
    """Compare a result with the reference; tensor cores take weights in V_dtype."""
    on_card = resolve_target("llvm").kind == "cuda"
    reference.assert_close(out, problem, problem.config.V_dtype if on_card else None)


def check(which, problem):
    """Compute a problem, compare it with the reference, and return the result."""
    out = attention(which)(problem.q, problem.k, problem.v)
    assert_close(out, problem)
    return out


# -- numbers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("which", CONFIGS)
def test_results(which, shape):
    check(which, draw(which, *shape))


@pytest.mark.parametrize(
    ("which", "allowed"),
    [("float16", 2e-3), ("float16 causal", 2e-3), ("float32", 1e-5), ("float32 causal", 1e-5)],
)
@pytest.mark.parametrize("keys", [64, 1000])
def test_the_error_that_is_promised(which, allowed, keys):
    problem = draw(which, 1, 2, 2, keys, keys)
    assert reference.error(check(which, problem), problem) <= allowed


@pytest.mark.parametrize("which", ["float32 causal", "float16", "bfloat16 causal", "row bfloat16 128 ntn causal"])
def test_every_length(which):
    for length in range(1, 301, 13 if which == "float16" else 7):
        check(which, draw(which, 1, 1, 1, length, length, seed=length))


@pytest.mark.parametrize("keys", [1, 2, 31, 32, 33, 95, 96, 97, 127, 128, 129, 191, 192, 193, 255, 256, 257])
@pytest.mark.parametrize("which", ["float32", "float32 causal", "row float32 causal", "row float16 40 to 200"])
def test_lengths_around_blocks(which, keys):
    for queries in (1, 15, 16, 17, 127, 128, 129):
        check(which, draw(which, 1, 1, 1, queries, keys))


@pytest.mark.parametrize("keys", [257, 128 * 9, 5000])
@pytest.mark.parametrize("heads", [1, 64, 260])
@pytest.mark.parametrize("which", ["row float32 causal", "row bfloat16 128 ntn causal"])
def test_keys_are_shared_out(which, heads, keys):
    """All of a head to one task, some blocks to each, or one block."""
    check(which, draw(which, heads // 2 or 1, min(heads, 2), min(heads, 2), 2, keys))


@pytest.mark.parametrize("which", ["float32", "bfloat16 causal", "float16 causal", "row float32 causal"])
def test_very_many_keys(which):
    """What is summed early must not lose, or win, with each block that comes later."""
    problem = draw(which, 1, 1, 1, 1, 1 << 17)
    sign = torch.where(torch.arange(1 << 17) < 1 << 16, 1.0, -1.0).to(problem.v.dtype)[None, :, None, None]
    balanced = reference.Problem(problem.config, torch.zeros_like(problem.q), problem.k, sign.expand(problem.v.shape))
    check(which, balanced)
    check(which, problem)


@given(st.data())
def test_any_shape(data):
    which = data.draw(st.sampled_from(list(CONFIGS)))
    heads_kv, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    sizes = data.draw(st.integers(1, 3)), heads_kv * group, heads_kv
    lengths = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 220))
    size = data.draw(st.sampled_from([1.0, 0.0, 0.01, 8.0]))
    how = [data.draw(st.sampled_from(list(PLACEMENTS))) for _ in "qkv"]
    problem = draw(which, *sizes, *lengths, seed=data.draw(SEEDS), size=size)
    note(f"{which}, {sizes}, {lengths}, size {size}, {how}")
    event(which)
    tensors = [PLACEMENTS[name](t) for name, t in zip(how, (problem.q, problem.k, problem.v), strict=True)]
    assert_close(attention(which)(*tensors), problem)


# -- what a row sees -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "keys"), [(9, 4), (200, 100), (130, 1), (300, 7)])
@pytest.mark.parametrize(
    "which", ["float32 causal", "float16 causal", "bfloat16 causal", "float32 128 ntn causal", "row float32 causal"]
)
def test_rows_that_see_no_key_are_zero(which, queries, keys):
    out = check(which, draw(which, 2, 4, 2, queries, keys))
    assert torch.equal(out[:, : queries - keys], torch.zeros_like(out[:, : queries - keys]))
    assert (out[:, queries - keys :] != 0).all()


@pytest.mark.parametrize(("queries", "keys"), [(1, 50), (10, 300), (129, 130)])
def test_the_last_row_sees_all_keys_and_the_first_the_rest(queries, keys):
    problem = draw("float32 causal", 1, 2, 2, queries, keys)
    out = check("float32 causal", problem)
    for row in (0, queries // 2, queries - 1):
        seen = keys - queries + row + 1
        alone = attention("float32")(problem.q[:, row : row + 1], problem.k[:, :seen], problem.v[:, :seen])
        torch.testing.assert_close(out[:, row : row + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["float32", "float16 causal", "bfloat16 128 ntn", "row float16 40 to 200"])
@pytest.mark.parametrize("group", [1, 2, 8])
def test_grouped_heads_are_repeated_ones(which, group):
    problem = draw(which, 2, 8, 8 // group, 33, 70)
    repeat = functools.partial(torch.repeat_interleave, repeats=group, dim=2)
    out = attention(which)(problem.q, repeat(problem.k), repeat(problem.v))
    torch.testing.assert_close(check(which, problem), out, rtol=1e-2, atol=1e-2)
    assert_close(out, problem)


@pytest.mark.parametrize(
    "shape",
    [(0, 2, 2, 5, 5), (2, 0, 0, 5, 5), (2, 2, 2, 0, 5), (2, 2, 2, 5, 0), (0, 0, 0, 0, 0), (1, 4, 2, 0, 0)],
    ids=str,
)
@pytest.mark.parametrize("which", ["float32", "float32 causal", "bfloat16 128 ntn", "row float32 causal"])
def test_nothing_to_compute(which, shape):
    problem = draw(which, *shape)
    out = check(which, problem)
    assert not out.any()
    given_out = torch.full_like(out, math.nan)
    assert attention(which)(problem.q, problem.k, problem.v, given_out) is given_out
    assert torch.equal(given_out, out)


# -- large, infinite and missing numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("which", ["float32", "float16", "float16 causal", "bfloat16 causal", "row float32 causal"])
def test_large_scores(which, sign):
    """Scores of ±1e4, which differ by whole numbers: weights are 1, 1/e, … and no power overflows."""
    problem = draw(which, 1, 2, 2, 40, 200)
    q, k = torch.zeros_like(problem.q), torch.zeros_like(problem.k)
    q[..., 0], q[..., 1] = 128, 8
    k[..., 0] = sign * 625  # 128 · 625 / √64 = 1e4
    k[..., 1] = torch.randint(-8, 9, k.shape[:-1]).to(k.dtype)
    if which.startswith("bfloat16"):
        k[..., 0] = sign * 624
    large = reference.Problem(problem.config, q, k, problem.v)
    assert 9.9e3 < large.scores()[..., -1, :].abs().min() < large.scores()[..., -1, :].abs().max() < 1.01e4
    out = check(which, large)
    assert out.isfinite().all()


@pytest.mark.parametrize("which", ["float32", "row float32 causal"])
def test_scores_that_jump_from_block_to_block(which):
    """The maximum comes late, or early: what was summed before is scaled to nothing, or what comes adds nothing."""
    for order in (1, -1):
        problem = draw(which, 1, 1, 1, 40, 400)
        q, k = torch.ones_like(problem.q), torch.zeros_like(problem.k)
        k[..., 0] = (torch.arange(400) * order * 200).float()[None, :, None]
        out = check(which, reference.Problem(problem.config, q, k, problem.v))
        largest = problem.v[:, -1 if order > 0 else 0]
        torch.testing.assert_close(out[:, -1], largest, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("which", ["float32", "float16 causal", "bfloat16 128 ntn", "row float16 40 to 200"])
def test_scores_of_minus_infinity(which):
    problem = draw(which, 1, 2, 2, 50, 120)
    q, k = torch.ones_like(problem.q), torch.zeros_like(problem.k)
    keys = k if problem.config.layout == "nnn" else k.permute(0, 3, 2, 1)
    keys[:, ::3, 0] = -math.inf  # of the first head some, in whole blocks and alone
    keys[:, :100, 0] = -math.inf
    keys[:, :, 1] = -math.inf  # of the second all
    out = check(which, reference.Problem(problem.config, q, k, problem.v))
    assert out.isfinite().all()
    assert torch.equal(out[:, :, 1], torch.zeros_like(out[:, :, 1]))
    assert out[:, -1, 0].any()


@pytest.mark.parametrize("which", ["float32", "row float32 causal"])
def test_scores_of_infinity_are_no_numbers(which):
    problem = draw(which, 1, 1, 1, 20, 120)
    q, k = torch.ones_like(problem.q), torch.zeros_like(problem.k)
    k[0, 70] = math.inf
    assert check(which, reference.Problem(problem.config, q, k, problem.v)).isnan().all()


@pytest.mark.parametrize("key", [0, 5, 95, 96, 119])
@pytest.mark.parametrize("where", "qkv")
@pytest.mark.parametrize(
    "which", [*("float32 causal", "bfloat16 causal", "float16", "float32 128 ntn causal"), *ROW_CONFIGS]
)
def test_nan_spreads_to_those_who_see_it(which, where, key):
    problem = draw(which, 1, 2, 2, 120, 120)
    spoiled = getattr(problem, where)
    if where == "k" and problem.config.layout == "ntn":
        spoiled[0, 0, 1, key] = math.nan
    else:
        spoiled[0, key, 1, 0] = math.nan
    out = attention(which)(problem.q, problem.k, problem.v)
    assert not out[:, :, 0].isnan().any()
    together = CONFIGS[which][0] > 1
    if where == "v" and together:  # a weight of 0 times NaN is one: so may be rows computed with others that see it
        unseen = ~problem.seen()[:, key]
        out[:, unseen] = torch.where(out[:, unseen].isnan(), problem.output()[:, unseen].to(out.dtype), out[:, unseen])
    assert_close(out, problem)
    reached = out[0, :, 1].isnan().any(-1)
    if where == "q":
        assert reached.nonzero().flatten().tolist() == [key]
    else:
        first = key if problem.config.is_causal else 0
        assert reached.tolist() == [False] * first + [True] * (120 - first)


# -- tensors of any strides ------------------------------------------------------------------------------------------------


def by_heads(tensor):
    """A view of (batch, heads, length, dim)."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def packed(tensor):
    """A slice of a tensor that holds Q, K and V."""
    whole = torch.randn(*tensor.shape[:2], 3, *tensor.shape[2:]).to(tensor.dtype)
    whole[:, :, 1] = tensor
    return whole[:, :, 1]


def interleaved(tensor):
    return torch.stack([tensor, torch.full_like(tensor, math.nan)], -1)[..., 0]


def reversed_dimensions(tensor):
    return tensor.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


def shifted(tensor):
    """One element behind an aligned address."""
    memory = torch.full((tensor.numel() + 1,), math.nan, dtype=tensor.dtype)
    return memory[1:].view(tensor.shape).copy_(tensor)


def padded(tensor):
    """Rows with NaN between them."""
    whole = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan, dtype=tensor.dtype)
    whole[..., : tensor.shape[-1]] = tensor
    return whole[..., : tensor.shape[-1]]


def negated(tensor):
    return torch._neg_view(-tensor)


PLACEMENTS = {
    "as it is": lambda tensor: tensor,
    "by heads": by_heads,
    "packed": packed,
    "interleaved": interleaved,
    "reversed": reversed_dimensions,
    "shifted": shifted,
    "padded": padded,
    "negated": negated,
    "parameter": torch.nn.Parameter,
}


@pytest.mark.parametrize(
    "which", ["float32 causal", "float16", "bfloat16 128 ntn", "float32 1 causal", "large scale 256 to 1", *ROW_CONFIGS]
)
@pytest.mark.parametrize("name", PLACEMENTS)
@torch.no_grad()
def test_strides(which, name):
    for shape in ((2, 4, 2, 33, 50), (1, 1, 1, 1, 5)):
        problem = draw(which, *shape)
        plain = check(which, problem)
        for given_to in ("q", "k", "v", "qkv"):
            tensors = [getattr(problem, x) for x in "qkv"]
            tensors = [PLACEMENTS[name](t) if x in given_to else t for x, t in zip("qkv", tensors, strict=True)]
            assert torch.equal(attention(which)(*tensors), plain), given_to


def test_an_imaginary_part_of_a_conjugate():
    problem = draw("float32", 1, 2, 2, 7, 9)
    view = torch.complex(problem.q, -problem.q).conj().imag
    assert view.is_neg()
    assert torch.equal(attention("float32")(view, problem.k, problem.v), check("float32", problem))


@pytest.mark.parametrize("which", ["float32 causal", "bfloat16 128 ntn", "row float32 causal"])
def test_expanded_heads_and_batches(which):
    problem = draw(which, 1, 1, 1, 20, 30)
    out = attention(which)(*(t.expand(3, -1, 4, -1) for t in (problem.q, problem.k, problem.v)))
    assert torch.equal(out, check(which, problem).expand(3, -1, 4, -1))


def test_inputs_may_share_memory():
    problem = draw("float32", 2, 3, 3, 40, 40)
    same = reference.Problem(problem.config, problem.q, problem.q, problem.q)
    check("float32", same)


def test_addresses_beyond_32_bits():
    far = 1 << 31
    try:
        memory = torch.empty(far + 64 * 3, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("there is not so much address space")
    problem = draw("float16", 2, 1, 1, 3, 3)
    tensors = [memory.as_strided((2, 3, 1, 64), (far, 64, 64, 1)).copy_(t) for t in (problem.q,)]
    assert torch.equal(attention("float16")(tensors[0], problem.k, problem.v), check("float16", problem))
    tensors = [memory.as_strided((2, 3, 1, 64), (far, 64, 64, 1)).copy_(problem.k)]
    assert torch.equal(attention("float16")(problem.q, tensors[0], problem.v), check("float16", problem))
    tensors = [memory.as_strided((2, 3, 1, 64), (far, 64, 64, 1)).copy_(problem.v)]
    assert torch.equal(attention("float16")(problem.q, problem.k, tensors[0]), check("float16", problem))


@pytest.mark.parametrize("which", ["float32 causal", "float16", "bfloat16 128 ntn", "mixed 96 to 40 ntn", *ROW_CONFIGS])
def test_an_output_is_filled_and_nothing_beside_it(which):
    problem = draw(which, 2, 4, 2, 130, 70)
    expected = check(which, problem)
    memory = torch.full((expected.numel() + 128,), math.nan, dtype=expected.dtype)
    out = memory[64:-64].view(expected.shape)
    assert attention(which)(problem.q, problem.k, problem.v, out) is out
    assert torch.equal(out, expected)
    assert memory[:64].isnan().all()
    assert memory[-64:].isnan().all()


# -- what results do not depend on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["float32 causal", "bfloat16 128 ntn"])
def test_bits_do_not_depend_on_threads_or_neighbours(which):
    problem = draw(which, 2, 4, 4, 140, 150)
    plain, before = check(which, problem), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(attention(which)(problem.q, problem.k, problem.v), plain)
    finally:
        torch.set_num_threads(before)
    alone = attention(which)(*(t[1:, :, 2:3] for t in (problem.q, problem.k, problem.v)))
    assert torch.equal(alone, plain[1:, :, 2:3])


def test_kernels_are_shared_by_configs_that_differ_in_sizes_only():
    sizes = {"batch": 2, "heads": 4, "seq_len": 10, "heads_kv": 2, "seq_len_kv": 77}  # 20 rows
    first = FlashAtten(config(64, FLOAT, is_causal=True, **sizes), target="llvm")
    assert first.plan == make_plan(config(64, FLOAT, is_causal=True, seq_len=64), first.target)
    assert first.artifact is None or first.artifact.key == attention("float32 causal").provided.artifact.key
    problem = reference.draw(first.config, 2, 4, 10, 2, 77)
    assert_close(first(problem.q, problem.k, problem.v), problem)


def test_lengths_take_the_kernel_that_is_fast_for_them():
    small = config(8, FLOAT, softmax_scale=0.0)
    op = FlashAtten(small, target="llvm", from_database=True)
    assert [m for m, _ in op.plan.buckets] == list(small.buckets)
    for rows in (1, 2, 17, 65, 300, 3000):
        fixed = make_plan(replace(small, seq_len=rows), op.target).kernels[0]
        bucket = next((m for m in small.buckets if m >= rows), small.buckets[-1])
        assert fixed.tiling == op.plan.tilings[bucket]
