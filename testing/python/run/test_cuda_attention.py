"""Attention on a card: every rule and tiling, also under compute-sanitizer; streams, devices, torch's own attention."""

from dataclasses import replace

import pytest
import torch

import attention_cases
import sanitizer
from attention_cases import CASES, Sizes, check_result, draw
from bitblas import FlashAtten, FlashAttenConfig
from bitblas.plan import plan_attention
from bitblas.schedule import RULES, AttentionProblem, select_rule
from bitblas.target import resolve_target

#: One of each rule and kind of tiling.
WATCHED = ("few", "grouped", "long", "transposed", "tails", "float")


@pytest.mark.parametrize("name", CASES)
def test_each_case(name):
    attention_cases.check(name)


@pytest.mark.parametrize("name", ["half", "causal", "transposed", "float"])
def test_any_number_of_queries(name):
    """Every bucket of rows, by one operator."""
    config = attention_cases.open_case(name)
    op = FlashAtten(config, target="cuda")
    for seq_len in (1, 5, 33, 64, 200, 1500):
        problem = draw(config, Sizes(1, seq_len, seq_len + 3, 4, 2))
        check_result(op(*problem.to("cuda")), problem)


@pytest.mark.slow
@pytest.mark.parametrize("name", WATCHED)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_under_compute_sanitizer(name, tool):
    FlashAtten(CASES[name][0], target="cuda")  # built here, so that only the kernel is watched
    sanitizer.watch(attention_cases.__file__, name, tool)


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 64, 1024])
@pytest.mark.parametrize("name", ["half", "causal", "transposed", "wide", "float"])
def test_every_tiling_that_tuning_may_choose(name, m):
    config, target = replace(CASES[name][0], seq_len=None), resolve_target("cuda")
    bucket = AttentionProblem(config.kernel, target, m)
    problem = draw(config, Sizes(1, m, 2 * m + 5, 2, 1))
    for tiling in select_rule(RULES, bucket).tilings(bucket):
        plan = plan_attention(config, target, {m: tiling})
        assert tiling in [kernel.tiling for kernel in plan.kernels]
        op = FlashAtten.restore(config, plan)
        check_result(op(*problem.to("cuda")), problem)


def test_the_current_stream():
    config = FlashAttenConfig(dim=64)
    op = FlashAtten(config, target="cuda")
    problem = draw(config, Sizes(1, 512, 512, 8, 8))
    tensors = problem.to("cuda")
    op(*tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        out = op(*(tensor + 0 for tensor in tensors))
    stream.synchronize()
    check_result(out, problem)


def test_a_captured_graph():
    config = FlashAttenConfig(dim=64, is_causal=True)
    op = FlashAtten(config, target="cuda")
    problem = draw(config, Sizes(1, 100, 100, 2, 2))
    q, k, v = problem.to("cuda")
    op(q, k, v)
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(q)
    with torch.cuda.graph(graph):
        op(q, k, v, out)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    check_result(out, problem)


@pytest.mark.parametrize("is_causal", [False, True])
def test_beside_torch(is_causal):
    config = FlashAttenConfig(dim=128, is_causal=is_causal)
    op = FlashAtten(config, target="cuda")
    problem = draw(config, Sizes(1, 1024, 1024, 8, 8))
    q, k, v = problem.to("cuda")
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    theirs = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=is_causal).transpose(1, 2)
    ours = op(q, k, v)
    check_result(ours, problem)
    assert float((ours.float() - theirs.float()).norm() / theirs.float().norm()) < 2e-3


def test_more_elements_than_32_bits_number():
    """Keys and values of one head, whose neighbours lie far away in memory."""
    config = FlashAttenConfig(dim=64, seq_len=64)
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("the card has too little memory")
    op = FlashAtten(replace(config, seq_len_kv=None), target="cuda")
    problem = draw(config, Sizes(1, 64, 40, 1, 1))
    q, k, v = problem.to("cuda")
    room = torch.zeros((1 << 32) + (1 << 27), dtype=torch.float16, device="cuda")
    step = (1 << 32) // 40 // 8 * 8
    far_k, far_v = (room[first:].as_strided((1, 40, 1, 64), (0, step, 64, 1)) for first in (0, 1 << 20))
    far_k.copy_(k)
    far_v.copy_(v)
    check_result(op(q, far_k, far_v), problem)
