"""Random operands: of which shapes and dtypes, which sizes are chosen, and what is copied so that it comes from memory."""

import pytest
import torch

from bitblas import FlashAttenConfig, MatmulConfig, operands
from bitblas.config import QUERY_BUCKETS, Sizes
from bitblas.errors import ArgumentError
from bitblas.machines import Card
from bitblas.operands import choose_sizes, draw_attention, draw_call, usual_sizes
from bitblas.plan import make_plan
from bitblas.runtime import Kernels
from bitblas.schedule import AttentionProblem
from bitblas.target import Target, resolve_target

TARGET = resolve_target("x86-64-v4")
CARD = Target("cuda", "sm_90", card=Card(132, 227 << 10, 50 << 20, 4800))
DTYPES = {"Q_dtype": "bfloat16", "K_dtype": "float16", "V_dtype": "float32", "Out_dtype": "bfloat16"}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["nnn", "ntn"])
def test_operands_of_an_attention(layout):
    config = FlashAttenConfig(dim=24, dim_v=40, layout=layout, **DTYPES)
    sizes = Sizes(2, 6, 3, 5, 7)
    call = draw_attention(config, sizes)
    q, k, v = call.inputs
    assert q.shape == (2, 5, 6, 24)
    assert k.shape == ((2, 7, 3, 24) if layout == "nnn" else (2, 24, 3, 7))
    assert v.shape == (2, 7, 3, 40)
    assert call.out.shape == (2, 5, 6, 40)
    assert [t.dtype for t in (q, k, v, call.out)] == [torch.bfloat16, torch.float16, torch.float32, torch.bfloat16]
    assert call.m == 10  # five queries of two heads that share keys
    assert all(t.float().std() > 0.5 for t in call.inputs)
    assert all(
        torch.equal(one, other) for one, other in zip(call.inputs, draw_attention(config, sizes).inputs, strict=True)
    )


@pytest.mark.parametrize(("dtype", "step"), [("float16", 8), ("float32", 4)])
def test_rows_are_aligned_wherever_they_are(dtype, step):
    """As kernels for cards take them; on the device, and in each of the copies, too."""
    config = FlashAttenConfig(dim=5, dim_v=9, layout="ntn", **dict.fromkeys(DTYPES, dtype))
    call = draw_attention(config, Sizes(2, 2, 2, 3, 7))
    for found in (call, call.to(torch.device("cpu")), call.to(torch.device("meta"))):
        for tensor in found.inputs:
            assert tensor.stride(3) == 1
            assert all(stride % step == 0 for stride in tensor.stride()[:3])
    assert all(torch.equal(a, b) for a, b in zip(call.inputs, call.to(torch.device("cpu")).inputs, strict=True))
    for copy in operands.Operands(call, cache=16 << 20).copies[:3]:
        assert [tensor.stride() for tensor in copy] == [tensor.stride() for tensor in call.inputs[1:]]
    assert call.out.is_contiguous()


def test_a_bucket_is_measured_with_heads_for_all_threads():
    assert usual_sizes(TARGET, 16) == Sizes(1, 9, 9, 16, 1024)  # a multiple of three threads
    assert usual_sizes(TARGET, 4000) == Sizes(1, 9, 9, 4000, 4000)
    assert usual_sizes(CARD, 1) == Sizes(1, 132, 132, 1, 1024)
    for m in QUERY_BUCKETS:
        assert draw_call(AttentionProblem(FlashAttenConfig(dim=8).kernel, TARGET, m)).m == m


@pytest.mark.parametrize(
    ("config", "wanted", "expected"),
    [
        ({}, {}, (1, 9, 9, 1024, 1024)),
        ({}, {"seq_len": 3}, (1, 9, 9, 3, 1024)),
        ({}, {"seq_len": 3, "seq_len_kv": 7, "batch": 2, "heads": 6, "heads_kv": 2}, (2, 6, 2, 3, 7)),
        ({}, {"heads": 4}, (1, 4, 4, 1024, 1024)),
        ({}, {"heads_kv": 3}, (1, 9, 3, 1024, 1024)),
        ({"batch": 2, "heads": 4, "heads_kv": 2, "seq_len": 5}, {}, (2, 4, 2, 5, 5)),
        ({"seq_len": 5, "seq_len_kv": None}, {}, (1, 9, 9, 5, 1024)),
        ({"seq_len": 5, "seq_len_kv": None}, {"seq_len": 5, "seq_len_kv": 6}, (1, 9, 9, 5, 6)),
        ({"seq_len": 2000, "seq_len_kv": None}, {}, (1, 9, 9, 2000, 2000)),
        ({"seq_len_kv": 77}, {"seq_len": 5}, (1, 9, 9, 5, 77)),
    ],
)
def test_sizes_that_are_not_named_are_the_configs_or_the_usual_ones(config, wanted, expected):
    assert choose_sizes(FlashAttenConfig(dim=8, **config), TARGET, wanted) == Sizes(*expected)


@pytest.mark.parametrize(
    ("config", "wanted", "message"),
    [
        ({}, {"m": 3}, "'m' is no size of an attention; allowed: batch, heads, heads_kv, seq_len, seq_len_kv"),
        ({}, {"seq_len": 0}, "seq_len is 0; it must be an integer of at least 1"),
        ({}, {"heads": True}, "heads is True; it must be"),
        ({}, {"batch": 1.0}, "batch is 1.0; it must be"),
        ({"seq_len": 5}, {"seq_len": 6}, "seq_len is 6; this operator was built for seq_len = 5"),
        ({"seq_len": 5}, {"seq_len_kv": 6}, "seq_len_kv is 6; this operator was built for seq_len_kv = 5"),
        ({"heads": 4, "heads_kv": 2}, {"heads_kv": 4}, "heads_kv is 4; this operator was built for heads_kv = 2"),
        ({}, {"heads": 4, "heads_kv": 3}, "heads_kv is 3; it must be a divisor of heads = 4"),
    ],
)
def test_sizes_that_cannot_be(config, wanted, message):
    with pytest.raises(ArgumentError) as caught:
        choose_sizes(FlashAttenConfig(dim=8, **config), TARGET, wanted)
    assert message in str(caught.value)


def test_keys_and_values_are_rotated_together_and_queries_are_not():
    call = draw_attention(FlashAttenConfig(dim=64), Sizes(1, 8, 8, 3, 1024))
    held = operands.Operands(call, cache=16 << 20)
    assert len(held.copies) == 32  # 2 MB each, four times 16 MB
    seen = []

    class Library(dict):
        def __init__(self):
            super().__init__(attention_0=lambda q, k, v, out: seen.append((q, k, v, out)))

    kernels = Kernels(Library(), [(16, "attention_0", 1 << 40)])
    for _ in range(33):
        assert held.launch(kernels) is call.out
    assert {q.data_ptr() for q, _, _, _ in seen} == {call.inputs[0].data_ptr()}
    for place in (1, 2):
        addresses = [row[place].data_ptr() for row in seen]
        assert len(set(addresses)) == 32
        assert addresses[32] == addresses[0] == call.inputs[place].data_ptr()
        assert all(torch.equal(row[place], call.inputs[place]) for row in seen)
    held.launch(kernels, 5)
    assert seen[-1][1].data_ptr() == seen[5][1].data_ptr()


@pytest.mark.parametrize(
    "config",
    [MatmulConfig(M=(1, 16), N=64, K=64, W_dtype="uint4"), FlashAttenConfig(dim=8)],
    ids=["matmul", "attention"],
)
def test_candidates_for_several_buckets_are_measured_with_the_same(config):
    """Kernels of one bucket, and of the operator, get the same operands: their results are compared."""
    for m in config.buckets[:2]:
        one = draw_call(make_plan(config.for_bucket(m), TARGET).problem_of(m))
        other = draw_call(make_plan(config, TARGET).problem_of(m))
        assert one.m == other.m == m
        assert all(torch.equal(a, b) for a, b in zip(one.inputs, other.inputs, strict=True))
        assert config.for_bucket(m).buckets == (m,)
    assert config.for_bucket(None) == config.for_bucket(None).for_bucket(None)


def test_a_fixed_m_stays_one():
    config = MatmulConfig(M=5, N=64, K=64, W_dtype="uint4")
    assert config.for_bucket(5) == config.kernel
    assert config.for_bucket(None).is_dynamic
