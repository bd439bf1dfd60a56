"""Attention on cards: its text, run thread by thread in the emulator."""

import math
from dataclasses import replace

import emulator
import pytest
import torch

from attention_cases import CASES, Sizes, check_result, draw
from bitblas import FlashAtten, FlashAttenConfig
from bitblas.build import compile_cuda
from bitblas.cuda.launches import evaluate, read_launches
from bitblas.plan import plan_attention
from bitblas.schedule import RULES, AttentionProblem, select_rule
from bitblas.schedule.cuda.attention import FragmentAttentionRule, ThreadAttentionRule
from bitblas.schedule.cuda.attention_tiles import FragmentAttentionTiling
from bitblas.target import resolve_target

ARCHS = ("sm_75", "sm_80", "sm_89", "sm_90")
THREADS_CASES = ("float", "float-few", "odd", "mixed", "widest")


@pytest.fixture(scope="module")
def make(emulated):
    """Operators by config and capability, each built once."""
    made = {}

    def make(config, arch="sm_80"):
        key = config, arch
        if key not in made:
            made[key] = FlashAtten(config, target=f"cuda -arch={arch}")
        return made[key]

    return make


# -- results ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_results(make, name):
    config, calls = CASES[name]
    op = make(config)
    rule = ThreadAttentionRule if name in THREADS_CASES else FragmentAttentionRule
    assert {kernel.rule for kernel in op.plan.kernels} == {rule.name}
    for sizes in calls:
        problem = draw(config, sizes)
        check_result(op(problem.q, problem.k, problem.v), problem)


@pytest.mark.parametrize(
    ("name", "arch"),
    [("causal", "sm_75"), ("transposed", "sm_75"), ("wide", "sm_75"), ("few", "sm_90"), ("half", "sm_90")],
)
def test_other_cards(make, name, arch):
    """The oldest ones have no asynchronous copies, smaller products, and none of bfloat16."""
    config, calls = CASES[name]
    op = make(config, arch)
    if config.Q_dtype == "bfloat16" and arch == "sm_75":
        assert op.plan.kernels[0].rule == ThreadAttentionRule.name
    problem = draw(config, calls[0])
    check_result(op(problem.q, problem.k, problem.v), problem)


@pytest.mark.parametrize("name", ["causal", "few", "transposed", "float"])
def test_logits_of_ten_thousand(make, name):
    config, calls = CASES[name]
    problem = draw(config, calls[0], 2500 / math.sqrt(config.dim) / abs(config.softmax_scale))
    check_result(make(config)(problem.q, problem.k, problem.v), problem)


def special(config, sizes, change):
    """Operands with some elements changed: `change` takes Q, K as (batch, key, head, dim), and V."""
    problem = draw(config, sizes)
    k = problem.k.permute(0, 3, 2, 1) if config.layout == "ntn" else problem.k
    change(problem.q, k, problem.v)
    return problem


@pytest.mark.parametrize("name", ["causal", "few", "transposed", "float", "odd"])
def test_nan_spreads_as_far_as_it_must(make, name):
    config, calls = CASES[name]
    op, sizes = make(config), calls[0]

    def of_query(q, k, v):
        q[0, 0, 1, 3] = math.nan

    def of_key(q, k, v):
        k[0, 5, 0, 2] = math.nan

    for change in (of_query, of_key):
        problem = special(config, sizes, change)
        out = op(problem.q, problem.k, problem.v)
        assert out.isnan().any()
        check_result(out, problem)
    problem = special(config, sizes, lambda q, k, v: v[0, 0, 0, 1].fill_(math.nan))  # which every query sees
    if config.seq_len <= sizes.seq_len_kv:
        check_result(op(problem.q, problem.k, problem.v), problem)


@pytest.mark.parametrize("name", ["causal", "few", "float"])
def test_scores_of_minus_infinity(make, name):
    """Of some keys, and of all keys of a query: that gives 0."""
    config, calls = CASES[name]

    def change(q, k, v):
        q[..., 0] = 1.0
        k[..., 0] = 0.0
        k[:, :40, :, 0] = -math.inf
        q[:, 0, 0] = 0.0
        q[:, 0, 0, 1] = math.inf
        k[..., 1] = -1.0
        k[:, :40, :, 1] = -2.0
        q[:, 0, 0, 0] = 1.0

    problem = special(config, calls[0], change)
    out = make(config)(problem.q, problem.k, problem.v)
    assert bool((out[:, 0, 0] == 0).all())
    check_result(out, problem)


def test_queries_that_see_no_key_give_zeros(make):
    for name in ("causal", "float"):
        config, calls = CASES[name]
        problem = draw(config, calls[1])
        assert calls[1].seq_len_kv < config.seq_len
        out = make(config)(problem.q, problem.k, problem.v)
        hidden = config.seq_len - calls[1].seq_len_kv
        assert bool((out[:, :hidden] == 0).all())
        assert bool((out[:, hidden:] != 0).any(-1).all())


# -- where tensors lie -----------------------------------------------------------------------------------------------------


def scattered(tensor, order, gap):
    """The same numbers, dimensions in another order in memory, NaN in gaps behind the last."""
    inverse = [order.index(place) for place in range(4)]
    shape = [tensor.shape[place] for place in order]
    room = torch.full((*shape[:3], shape[3] + gap), math.nan, dtype=tensor.dtype)
    return room[..., : shape[3]].permute(inverse).copy_(tensor)


@pytest.mark.parametrize("name", ["causal", "transposed", "grouped", "float", "odd"])
def test_strides(make, name):
    """Heads before queries, as models have them, gaps that NaN fills, and a head of keys that all queries share."""
    config, calls = CASES[name]
    op, sizes = make(config), calls[0]
    problem = draw(config, sizes)
    for gap in (8, 3):
        q = scattered(problem.q, (0, 2, 1, 3), gap)
        k = scattered(problem.k, (2, 0, 1, 3), gap)
        v = scattered(problem.v, (2, 0, 1, 3), gap)
        check_result(op(q, k, v), problem)
    one = Sizes(sizes.batch, sizes.seq_len, sizes.seq_len_kv, sizes.heads, 1)
    problem = draw(config, one)
    k, v = (tensor.expand(-1, -1, sizes.heads, -1) for tensor in (problem.k, problem.v))
    check_result(op(problem.q, k, v), problem)


@pytest.mark.parametrize("name", ["causal", "float"])
def test_addresses(make, name):
    config, calls = CASES[name]
    op, problem = make(config), draw(config, calls[0])

    def moved(tensor):
        return torch.full((tensor.numel() + 1,), math.nan, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)

    check_result(op(moved(problem.q), moved(problem.k), moved(problem.v)), problem)
    out = moved(torch.zeros(op(problem.q, problem.k, problem.v).shape, dtype=getattr(torch, config.Out_dtype)))
    if name == "causal":
        with pytest.raises(ValueError, match="output begins at the address"):
            op(problem.q, problem.k, problem.v, out)
    else:
        check_result(op(problem.q, problem.k, problem.v, out), problem)


@pytest.mark.parametrize("name", ["few", "causal", "float"])
def test_orders_of_threads(make, name):
    """Bit-equal in every order, with every access checked."""
    config, calls = CASES[name]
    op, problem = make(config), draw(config, calls[0])
    out = op(problem.q, problem.k, problem.v)
    again = torch.empty_like(out)
    function = op._ready().module._library[op.plan.kernels[0].name]
    emulator.run(function, problem.q, problem.k, problem.v, again, seeds=(1, 2))
    assert torch.equal(out, again)


# -- tilings ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_tilings_fit(arch):
    target = resolve_target(f"cuda -arch={arch}")
    for dim in (8, 40, 64, 80, 96, 128, 192, 256):
        for causal, layout in ((False, "nnn"), (True, "ntn")):
            config = FlashAttenConfig(dim=dim, is_causal=causal, layout=layout).kernel
            for m in (1, 16, 64, 256, 1024):
                bucket = AttentionProblem(config, target, m)
                rule = select_rule(RULES, bucket)
                tilings = rule.tilings(bucket)
                assert rule.name == FragmentAttentionRule.name
                assert len(set(tilings)) == len(tilings) >= 2
                for tiling in tilings:
                    assert tiling.shared_bytes(config) <= target.card.shared_bytes
                    assert tiling.registers(config) * tiling.num_threads * tiling.blocks_at_once < 1 << 16


def test_few_rows_have_tilings_of_their_own():
    plan = plan_attention(FlashAttenConfig(dim=128), resolve_target("cuda -arch=sm_90"))
    assert [kernel.tiling.block_m for kernel in plan.kernels] == [16, 64, 128]
    assert plan.kernels[0].tiling.warps_n > 1


def test_reasons_to_decline():
    def reason(arch="sm_80", **fields):
        bucket = AttentionProblem(FlashAttenConfig(**fields).kernel, resolve_target(f"cuda -arch={arch}"), 64)
        return FragmentAttentionRule().decline(bucket)

    assert reason(dim=64) is None
    assert "not bfloat16, float16" in reason(dim=64, K_dtype="bfloat16")
    assert "not float32" in reason(dim=64, Q_dtype="float32", K_dtype="float32", V_dtype="float32")
    assert "capability 8.0" in reason("sm_75", dim=64, Q_dtype="bfloat16", K_dtype="bfloat16", V_dtype="bfloat16")
    assert "multiples of 8, not 60 and 64" in reason(dim=60, dim_v=64)
    assert "no room for heads of 1024" in reason(dim=1024)
    assert "llvm" not in reason(dim=1024)


#: The tilings of a bucket are those of all that its rule takes: every bucket, kind of K and rule has its turn in each run.
IN_EACH_RUN = {("causal", 1), ("transposed", 40), ("causal", 257), ("float", 40)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        pytest.param(name, rows, marks=() if (name, rows) in IN_EACH_RUN else pytest.mark.exhaustive)
        for name in ("causal", "transposed", "float")
        for rows in (1, 40, 257)
    ],
)
def test_every_tiling(emulated, name, rows):
    config = replace(CASES[name][0], seq_len=rows, heads=1)
    target, (m,) = resolve_target("cuda -arch=sm_90"), config.buckets
    bucket = AttentionProblem(config.kernel, target, m)
    problem = draw(config, Sizes(1, rows, 150, 1, 1))
    for tiling in select_rule(RULES, bucket).tilings(bucket):
        plan = plan_attention(config, target, {m: tiling})
        assert [kernel.tiling for kernel in plan.kernels] == [tiling]
        op = FlashAtten.restore(config, plan)
        check_result(op(problem.q, problem.k, problem.v), problem)


@pytest.mark.parametrize("name", ["causal", "transposed", "grouped"])
def test_shared_memory_has_no_conflicts(make, name):
    config, calls = CASES[name]
    op, problem = make(config), draw(config, calls[0])
    op(problem.q, problem.k, problem.v)
    counts = emulator.statistics()
    assert counts.shared_passes > 100
    assert counts.shared_conflicts <= counts.shared_passes // 50  # of facts of rows


def test_launches_without_nvcc():
    """What NVRTC's loader computes from tensors: sizes, strides, blocks."""
    config = FlashAttenConfig(dim=64, seq_len=70, seq_len_kv=None, layout="ntn")
    plan = plan_attention(config, resolve_target("cuda -arch=sm_80"))
    compiled, _ = compile_cuda(plan)
    ((launch,),) = read_launches(compiled.host).values()
    problem = draw(config, Sizes(2, 70, 88, 6, 3))
    tensors = (
        problem.q.transpose(1, 2).contiguous().transpose(1, 2),
        problem.k,
        problem.v,
        torch.empty(2, 70, 6, 64),
    )
    values = [evaluate(value, tensors) for _, value in launch.arguments]
    for tensor in tensors:
        assert tensor.data_ptr() in values
        assert all(stride in values for stride in tensor.stride()[:3])
    tiling = plan.kernels[0].tiling
    assert isinstance(tiling, FragmentAttentionTiling)
    assert evaluate(launch.grid[0], tensors) == -(-70 * 2 // tiling.block_m) * 2 * 3
    assert evaluate(launch.block[0], tensors) == tiling.num_threads
    assert evaluate(launch.shared, tensors) == tiling.shared_bytes(plan.config)


def test_each_rule_has_a_case():
    names = {rule.name for rule in RULES if rule.solves is AttentionProblem and rule.target_kind == "cuda"}
    target = resolve_target("cuda -arch=sm_80")
    assert {plan_attention(config, target).kernels[0].rule for config, _ in CASES.values()} == names


def test_the_reference_notices_what_is_wrong():
    """A key too many, heads exchanged, a scale that is off: none of that passes."""
    config = FlashAttenConfig(dim=64, seq_len_kv=None, is_causal=True)
    problem = draw(config, Sizes(1, 20, 30, 4, 2))
    right = problem.output().half().contiguous()
    check_result(right, problem)
    q, k = problem.q, problem.k
    for wrong in (
        {"k": k.roll(1, 1)},
        {"k": k.roll(1, 2)},
        {"q": q * 1.02},
        {"k": torch.cat([k[:, 1:], k[:, :1]], 1)},
    ):
        with pytest.raises(AssertionError, match="results are wrong"):
            check_result(right, replace(problem, **wrong))
