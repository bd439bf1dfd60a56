"""On a card: streams, graphs, devices, memory, and what a call costs the host."""

import statistics
import threading
import time

import pytest
import torch

import reference
from bitblas import ArgumentError, BitBLASError, Matmul, MatmulConfig
from bitblas.formats import FORMATS

#: Cycles of a card that sleeps: some ten milliseconds.
NAP = 20_000_000
ROWS = (1, 16, 128)
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device, or none")


def config(N=256, K=512, M=ROWS, **fields):
    defaults = {"A_dtype": "float16", "W_dtype": "uint4", "with_scaling": True, "group_size": 128}
    return MatmulConfig(M=M, N=N, K=K, **{**defaults, "accum_dtype": "float32", **fields})


#: Few columns and much of K, which a rule shares out: where kernels need room beside their output, these do.
SPLIT = config(N=64, K=16384)


@pytest.fixture(scope="module")
def operator():
    return Matmul(config(), target="cuda")


class Call:
    """A problem on a device, whose result is exact, so that no order of sums matters."""

    def __init__(self, op, m, seed=0, device="cuda"):
        self.op, self.problem = op, reference.draw(op.config, m, seed=seed, exact=True)
        self.A = self.problem.A.to(device)
        self.W = op.transform_weight(self.problem.weights).to(device)
        self.extras = {name: tensor.to(device) for name, tensor in self.problem.extras.items()}

    def __call__(self, A=None, **options):
        return self.op(self.A if A is None else A, self.W, **self.extras, **options)

    def check(self, out):
        reference.assert_exact(out.cpu(), self.problem)


# -- streams ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", ROWS)
def test_what_a_side_stream_still_computes_is_waited_for(operator, m):
    """… and only there: the host goes on before the input is there."""
    call, stream = Call(operator, m), torch.cuda.Stream()
    call()  # loads what the first call loads
    A = torch.zeros_like(call.A)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(NAP)
        A.copy_(call.A)
        out = call(A)
        assert not stream.query(), "the call waited for the stream"
    assert out.device == A.device
    stream.synchronize()
    call.check(out)


def test_a_stream_does_not_wait_for_another(operator):
    """A nap on one stream holds nothing up on another."""
    call, busy, free = Call(operator, 1), torch.cuda.Stream(), torch.cuda.Stream()
    call()
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(50 * NAP)
    with torch.cuda.stream(free):
        out = call()
    free.synchronize()
    napping = not busy.query()
    busy.synchronize()
    assert napping
    call.check(out)


@pytest.mark.parametrize("m", ROWS)
def test_kernels_that_share_k_out_on_two_streams_at_once(m):
    op = Matmul(SPLIT, target="cuda")
    calls, streams = [Call(op, m, seed) for seed in range(2)], [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(5):
        outs = [[], []]
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(NAP // 20)  # so that what follows is there on both when they begin
        for _ in range(20):
            for call, stream, found in zip(calls, streams, outs, strict=True):
                with torch.cuda.stream(stream):
                    found.append(call())
        torch.cuda.synchronize()
        for call, found in zip(calls, outs, strict=True):
            call.check(found[0])
            assert all(torch.equal(found[0], other) for other in found)


def test_threads_call_one_operator_each_on_its_stream(operator):
    calls, failures = [Call(operator, m, seed) for seed, m in enumerate((1, 3, 16, 17, 64, 130))], []
    torch.cuda.synchronize()

    def work(call):
        stream = torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                for _ in range(30):
                    out = call()
            stream.synchronize()
            call.check(out)
        except (AssertionError, RuntimeError, BitBLASError) as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# -- graphs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True], ids=["whole", "K-shared-out"])
@pytest.mark.parametrize("m", ROWS)
def test_a_graph_computes_what_its_inputs_hold_when_it_runs(operator, m, shared):
    op = Matmul(SPLIT, target="cuda") if shared else operator
    first, second = Call(op, m, 1), Call(op, m, 2)
    A, W, extras = first.A.clone(), first.W.clone(), {name: t.clone() for name, t in first.extras.items()}
    op(A, W, **extras)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op(A, W, **extras)
        again = op(A, W, **extras)
    for call in (second, first, second):
        A.copy_(call.A)
        W.copy_(call.W)
        for name, tensor in extras.items():
            tensor.copy_(call.extras[name])
        out.fill_(float("nan"))
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        call.check(out)
        call.check(again)


# -- memory and time -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True], ids=["whole", "K-shared-out"])
@pytest.mark.parametrize("m", ROWS)
def test_nothing_is_allocated_but_the_output(operator, m, shared):
    call = Call(Matmul(SPLIT, target="cuda") if shared else operator, m)
    out = call()

    def allocations(work):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        kept = work()
        found = torch.cuda.memory_stats()["allocation.all.allocated"] - before
        call.check(kept)
        return found

    assert allocations(call) == 1
    assert allocations(lambda: call(output=out)) == 0


def test_a_call_takes_the_host_no_more_than_ten_microseconds(operator):
    call, calls = Call(operator, 1), 100
    out = call()
    rounds = []
    for _ in range(20):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call.op(call.A, call.W, call.extras["scale"], output=out)
        rounds.append((time.perf_counter() - began) / calls)
    assert statistics.median(rounds) <= 10e-6, rounds


# -- devices ---------------------------------------------------------------------------------------------------------------


def test_tensors_on_the_cpu_are_refused(operator):
    call = Call(operator, 3)
    for name in ("A", "W", *call.extras):
        operands = {"A": call.A, "W": call.W, **call.extras}
        operands[name] = operands[name].cpu()
        with pytest.raises(ArgumentError, match=r"is on device (cpu|cuda:0)"):
            operator(**operands)
    with pytest.raises(ArgumentError, match=r"output is on device cpu"):
        call(output=torch.empty(3, 256, dtype=torch.float16))
    forward = getattr(Matmul.forward, "__wrapped__", Matmul.forward)  # which the other tests' way to cards wraps
    with pytest.raises(ArgumentError, match=r"A is on device cpu; this operator runs on cuda"):
        forward(operator, call.A.cpu(), call.W.cpu(), **{name: tensor.cpu() for name, tensor in call.extras.items()})


def test_an_operator_of_the_cpu_refuses_tensors_of_a_card():
    call = Call(Matmul(config(), target="x86-64", from_database=True), 3)
    with pytest.raises(ArgumentError, match=r"A is on device cuda:0; this operator runs on cpu"):
        call()


@pytest.mark.parametrize("device", ["meta", "cpu", "cuda"])
def test_a_default_device_is_of_no_account(device):
    with torch.device(device), torch.inference_mode():
        op = Matmul(config(), target="cuda")
        lut = Matmul(config(W_dtype="nf4"), target="cuda", from_database=True).lut
    assert lut.shape == (16,)
    call = Call(op, 5)
    with torch.device(device), torch.inference_mode():
        out = call()
    assert out.device.type == "cuda"
    call.check(out)


def test_the_operators_card_is_this_one(operator):
    facts = torch.cuda.get_device_properties(0)
    assert operator.target.arch == f"sm_{facts.major}{facts.minor}"
    assert operator.target.card.num_sms == facts.multi_processor_count
    assert operator.target.card.l2_bytes == facts.L2_cache_size


@needs_two
def test_kernels_run_where_the_tensors_are_whatever_device_is_current():
    first = Matmul(config(), target="cuda")
    with torch.cuda.device(1):
        second = Matmul(config(), target="cuda")
    for current in (0, 1):
        for op, index in ((first, 0), (second, 1)):
            call = Call(op, 17, device=f"cuda:{index}")
            with torch.cuda.device(current):
                out = call()
                assert torch.cuda.current_device() == current
            assert out.device == torch.device("cuda", index)
            call.check(out)


@needs_two
def test_cards_of_one_kind_share_an_operator_and_others_refuse_it():
    op, alike = (
        Matmul(config(), target="cuda"),
        torch.cuda.get_device_capability(0) == torch.cuda.get_device_capability(1),
    )
    calls = [Call(op, 17, device=f"cuda:{index}") for index in range(2)]
    if not alike:
        with pytest.raises(BitBLASError):
            calls[1]()
        return
    for _ in range(3):
        for call in calls:
            call.check(call())
    streams = [torch.cuda.Stream(device=index) for index in range(2)]
    outs = []
    for call, stream in zip(calls, streams, strict=True):
        with torch.cuda.stream(stream):
            outs.append(call())
    for call, out in zip(calls, outs, strict=True):
        torch.cuda.synchronize(out.device)
        call.check(out)


@needs_two
def test_operands_on_two_cards_are_refused():
    call = Call(Matmul(config(), target="cuda"), 3)
    for name in ("W", *call.extras):
        operands = {"A": call.A, "W": call.W, **call.extras}
        operands[name] = operands[name].to("cuda:1")
        with pytest.raises(ArgumentError, match=rf"{name} is on device cuda:1"):
            call.op(**operands)


# -- weights ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("N", "K"), [(256, 512), (37, 99)])
def test_weights_are_transformed_on_the_card_as_on_the_cpu(name, N, K):
    op = Matmul(config(N, K, W_dtype=name, with_scaling=False, group_size=-1), target="cuda", from_database=True)
    problem = reference.draw(op.config, 1)
    here, there = op.transform_weight(problem.weights), op.transform_weight(problem.weights.cuda())
    assert there.device.type == "cuda"
    assert torch.equal(there.cpu().view(torch.uint8), here.view(torch.uint8))
    assert torch.equal(op.unpack_weight(there).cpu(), op.unpack_weight(here))
