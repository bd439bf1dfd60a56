"""Measuring on cards, without one: batches on a made-up stopwatch, the runner, a dead card, the search and its record."""

from dataclasses import dataclass, replace

import pytest
import torch

from bitblas import FlashAttenConfig, MatmulConfig, cards, env, measuring, operands, tuner
from bitblas.errors import UnsupportedError
from bitblas.layout import PackedLayout
from bitblas.machines import Card
from bitblas.operands import draw_call
from bitblas.plan import AttentionPlan, KernelPlan, MatmulPlan
from bitblas.runtime import Kernels
from bitblas.schedule import AttentionTiling, MatmulTiling, Problem, ScheduleRule
from bitblas.target import Target, resolve_target
from bitblas.tuner import LostError, children, local, record
from bitblas.tuner.search import candidates, tiling_of

CARD = Target("cuda", "sm_90", card=Card(132, 227 << 10, 50 << 20, 4800))
CONFIG = MatmulConfig(M=(1, 16), N=64, K=128, W_dtype="uint4", accum_dtype="float32", with_scaling=True)


class FakeStopwatch:
    """Launches that take as long as is said; those of a batch are done when it runs, as a graph does."""

    def __init__(self, seconds=1e-5):
        self.seconds, self.prepared = seconds, []

    def once(self, call):
        call(0)
        return self.seconds + 1e-4  # what a call costs the host

    def prepare(self, call, count, captured=True):
        result = []
        self.prepared.append(count)

        def run():
            for index in range(count):
                result[:] = [call(index)]
            return self.seconds * count

        run()
        return cards.Batch(run, count, result)


@pytest.mark.parametrize(
    ("seconds", "copies", "count"),
    [
        (1e-5, 1, 100),  # a millisecond
        (1e-5, 30, 120),  # … in whole rounds of the copies
        (1e-6, 30, 1020),
        (1e-9, 1, cards.MOST_LAUNCHES),
        (1e-9, 3000, 3000),
        (1e-9, 5000, 5000),
        (1e-3, 2, 2),
        (5e-3, 16, 4),  # what takes so long needs no copies
        (1.0, 3, 1),
    ],
)
def test_a_batch_is_long_and_goes_round_the_copies(seconds, copies, count):
    class Exact(FakeStopwatch):
        def once(self, call):
            return self.seconds

    assert cards.batch_of(Exact(seconds), lambda index: index, copies).count == count


def test_batches_give_seconds_of_a_launch():
    calls = []
    batch = FakeStopwatch(2e-4).prepare(lambda index: calls.append(index) or index, 5)
    assert batch.result == [4]
    del calls[:]
    assert cards.take_batches(batch, least=2, seconds=1e-9) == pytest.approx([2e-4] * 2)
    assert calls == [0, 1, 2, 3, 4] * 2
    assert len(cards.take_batches(batch, least=1, seconds=3.5e-3)) == 4
    assert len(cards.take_batches(batch, least=1, seconds=1e9)) == measuring.TURN_CALLS


def test_weights_go_round_the_cache_of_the_card():
    assert cards.cache_bytes_of(CARD) == 50 << 20
    assert cards.cache_bytes_of(resolve_target("haswell")) is None
    layout = PackedLayout(4096, 4096, 4, "packed")
    wide = replace(CONFIG, M=1, N=4096, K=4096)
    found = operands.Operands(draw_call(Problem(wide, layout, CARD, 1)), cache=50 << 20)
    weights = [weight for (weight,) in found.copies]
    assert len(weights) == 25  # 8 MB each, four times 50 MB
    assert all(torch.equal(weights[0], other) for other in weights[1:])
    assert len({other.data_ptr() for other in weights}) == 25


def test_operands_are_the_same_on_every_device():
    problem = Problem(CONFIG, PackedLayout(64, 128, 4, "packed"), CARD, 3)
    here = draw_call(problem)
    there = here.to(torch.device("meta"))
    assert {t.device.type for t in (*there.inputs, there.out)} == {"meta"}
    assert [(t.shape, t.dtype) for t in here.inputs] == [(t.shape, t.dtype) for t in there.inputs]
    with torch.device("meta"):
        again = draw_call(problem)
    assert all(torch.equal(one, other) for one, other in zip(here.inputs, again.inputs, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_target_without_its_device():
    assert cards.device_of(resolve_target("haswell")) == torch.device("cpu")
    with pytest.raises(UnsupportedError, match="there is no CUDA device for cuda -arch=sm_90"):
        cards.device_of(CARD)


def test_the_device_of_a_target(monkeypatch):
    archs = ["sm_86", "sm_90", "sm_90"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(archs))
    monkeypatch.setattr(cards, "device_arch", lambda index: archs[index])
    for current, expected in ((0, 1), (1, 1), (2, 2)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        assert cards.device_of(CARD) == torch.device("cuda", expected)
    assert cards.device_of(Target("cuda", "sm_90a")) == torch.device("cuda", 2)
    assert cards.device_of(Target("cuda", "sm_80")) == torch.device("cuda", 0)
    with pytest.raises(UnsupportedError):
        cards.device_of(Target("cuda", "sm_89"))


# -- the runner ------------------------------------------------------------------------------------------------------------


def plan_of(tiling, config=CONFIG, target=CARD):
    layout = PackedLayout(config.N, config.K, config.format.bits, "packed")
    return MatmulPlan(config.kernel, target, layout, (KernelPlan("matmul_0", "fake", tiling, (16,)),))


class Library(dict):
    """A library of one function, which writes a number."""

    def __init__(self, value):
        def function(*operands):
            *inputs, out = operands
            assert [t.device.type for t in inputs] == ["cpu"] * 3
            out.fill_(value)

        super().__init__(matmul_0=function)


def kernels(value):
    return Kernels(Library(value), [(16, "matmul_0", 1 << 20)])


def test_the_runner_times_batches_and_compares_results():
    watch = FakeStopwatch(1.1e-4)  # launches of 0.11 ms, which a call's cost makes 0.21
    runner = local.Runner(watch)
    first, same, other = (plan_of(MatmulTiling(1, 16, k)) for k in (8, 16, 32))
    assert runner.turn(kernels(1.0), first, 16, None) == pytest.approx([1.1e-4] * 3)
    assert runner.turn(kernels(1.0), same, 16, kernels(1.0)) == pytest.approx([1.1e-4] * 3)
    assert "gives other results: 1024 of 1024" in runner.turn(kernels(1.5), other, 16, kernels(1.0))
    assert watch.prepared == [95] * 3
    assert runner.turn(kernels(1.0), first, 16, None) == pytest.approx([1.1e-4] * 3)
    assert watch.prepared == [95] * 3  # it was prepared before
    runner.turn(kernels(2.0), first, 1, None)
    assert watch.prepared == [95] * 4  # other operands


class Attention(dict):
    """A library of one kernel for attention, which writes a number."""

    def __init__(self, value):
        super().__init__(attention_0=lambda q, k, v, out: out.fill_(value))


def attention_plan(tiling):
    return AttentionPlan(FlashAttenConfig(dim=16).kernel, CARD, (KernelPlan("attention_0", "fake", tiling, (16,)),))


def attention_kernels(value):
    return Kernels(Attention(value), [(16, "attention_0", 1 << 40)])


def test_attentions_are_timed_in_batches_and_compared():
    watch = FakeStopwatch(1.1e-4)
    runner = local.Runner(watch)
    first, other = attention_plan(AttentionTiling(64, 64)), attention_plan(AttentionTiling(64, 128))
    taken = runner.turn(attention_kernels(1.0), first, 16, None)
    assert taken == pytest.approx([1.1e-4] * len(taken))
    count = 132 * 16 * 16  # a head for each multiprocessor, 16 queries of 16 numbers
    said = runner.turn(attention_kernels(1.5), other, 16, attention_kernels(1.0))
    assert f"gives other results: {count} of {count} numbers differ" in said
    copies = -(-(200 << 20) // (2 * 132 * 1024 * 16 * 2))  # keys and values of so many bytes, four times the L2 cache
    assert watch.prepared == [copies] * 2
    call = draw_call(first.problem_of(16))
    assert cards.time_on(CARD, attention_kernels(1.0), call, FakeStopwatch(3e-5)) == pytest.approx(3e-5)


def test_a_card_that_still_computes_loses_the_candidate_alone():
    error = RuntimeError("CUDA error: invalid argument\nfurther lines")
    assert local.end_unless_usable(error, lambda: None) == "cannot be run: CUDA error: invalid argument"
    assert local.end_unless_usable(RuntimeError(), lambda: None) == "cannot be run: RuntimeError"


@pytest.mark.slow
def test_a_card_that_computes_no_more_ends_the_child_which_starts_again():
    script = (
        "from bitblas.tuner.local import end_unless_usable\n"
        "def dead():\n"
        "    raise RuntimeError('CUDA error: an illegal memory access was encountered\\nmore')\n"
        "end_unless_usable(RuntimeError('launch failed'), dead)"
    )
    with children.Children(1) as found:
        with pytest.raises(
            LostError, match=r"^crashed with status 70: error: CUDA error: an illegal memory access was enc"
        ):
            found.first.call(exec, script, seconds=60)
        assert found.first.call(abs, -1, seconds=60) == 1


def test_a_job_on_a_card_says_what_cannot_be_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    plan = plan_of(MatmulTiling(1, 16, 8))

    def fail(*_):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(local, "_loaded", fail)
    assert local.turn_job("k.so", plan, 16, 1, None) == "cannot be run: no kernel image is available"
    with pytest.raises(RuntimeError, match="no kernel image"):
        local.turn_job("k.so", replace(plan, target=resolve_target("haswell")), 16, 1, None)


def test_time_of_an_operator_on_a_card():
    layout = PackedLayout(64, 128, 4, "packed")
    call = draw_call(Problem(CONFIG, layout, CARD, 16))
    assert cards.time_on(CARD, kernels(1.0), call, FakeStopwatch(3e-5)) == pytest.approx(3e-5)


# -- the search ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FakeTiling(MatmulTiling):
    stages: int = 1

    kind = "fake"


class FakeRule(ScheduleRule):
    """Offers tilings for cards."""

    name, target_kind, layouts = "fake_mma", "cuda", ("packed",)

    def tilings(self, problem):
        return [FakeTiling(16, 64, 32, stages) for stages in (1, 2, 3, 4)]

    def apply(self, func, problem, tiling):
        raise NotImplementedError


@pytest.fixture
def rules(monkeypatch):
    found = (FakeRule(),)
    for module in ("bitblas.plan", "bitblas.tuner.search"):
        monkeypatch.setattr(f"{module}.RULES", found)
    monkeypatch.setattr("bitblas.schedule._TILINGS", {"fake": FakeTiling})
    monkeypatch.setattr("bitblas.schedule.cuda_layout", lambda config, target: PackedLayout(64, 128, 4, "packed"))
    return found


class Bench:
    """A workbench whose kernels are faster the more stages they have, and one of which kills the card."""

    now = 0.0

    def build(self, plans, go_on):
        for plan in plans:
            yield plan, ""

    def turn(self, plan, m, like):
        stages = tiling_of(plan).stages
        if stages == 4:
            raise LostError("crashed with status 70: error: CUDA error: an illegal memory access was encountered")
        self.now += 0.01
        return [1e-4 / stages] * 3


@pytest.mark.usefixtures("rules")
def test_tilings_of_cards_are_raced_and_the_record_belongs_to_the_card(tmp_path):
    assert [tiling_of(plan).stages for plan in candidates(CONFIG, CARD, 20)[16]] == [1, 2, 3, 4]
    bench = Bench()
    found = tuner.tune(CONFIG, CARD, 20, bench, 30.0, lambda: bench.now).buckets
    assert {m: row.tiling.stages for m, row in found.items()} == {1: 3, 16: 3}
    assert all("illegal memory access" in row.lost[0][1] for row in found.values())
    with env.scope(BITBLAS_CACHE_DIR=tmp_path):
        tuner.save_record(CONFIG, CARD, found, {"name": "here", "cpu": "none", "card": {"name": "NVIDIA H200"}})
        assert {m: t.stages for m, t in tuner.load_record(CONFIG, CARD).items()} == {1: 3, 16: 3}
        others = [replace(CARD.card, **{name: 7}) for name in ("num_sms", "shared_bytes", "l2_bytes", "memory_gbs")]
        for other in (*(replace(CARD, card=card) for card in others), replace(CARD, arch="sm_100")):
            assert tuner.load_record(CONFIG, other) is None
        assert record.record_path(CONFIG, replace(CARD, card=replace(CARD.card))) == record.record_path(CONFIG, CARD)


# -- the clock of a card ---------------------------------------------------------------------------------------------------


@pytest.fixture
def made_up_cuda(monkeypatch):
    """torch.cuda as far as the clock uses it: a log of what is asked of it, and events 3 ms apart."""
    from contextlib import contextmanager

    log, now = [], [0.0]

    class Stream:
        def __init__(self, device):
            self.device = device

        def wait_stream(self, other):
            log.append(f"wait for {other}")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")
            now[0] += 3.0
            self.at = now[0]

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, other):
            return other.at - self.at

    class CUDAGraph:
        def replay(self):
            log.append("replay")

    @contextmanager
    def within(name, *_, **options):
        log.append(f"{name} {{")
        yield
        log.append("}")

    for name, value in {"Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *a, name=name, **k: within(name, *a, **k))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "the default stream")
    return log


TIMED = ["device {", "stream {", "wait for the default stream", "record", "record", "}", "}", "synchronize"]


def test_the_clock_captures_after_a_first_call_and_times_replays(made_up_cuda):
    clock = cards.CardClock(torch.device("cuda", 0))
    batch = clock.prepare(lambda index: made_up_cuda.append(f"call {index}") or index, 3)
    first = [*TIMED[:4], "call 0", *TIMED[4:]]
    assert made_up_cuda == [*first, "device {", "graph {", "call 0", "call 1", "call 2", "}", "}"]
    assert batch.result == [2]
    del made_up_cuda[:]
    assert batch.run() == pytest.approx(3e-3)
    assert made_up_cuda == [*TIMED[:4], "replay", *TIMED[4:]]
    assert cards.take_batches(batch, least=1, seconds=1e-9) == [pytest.approx(1e-3)]


def test_the_clock_calls_anew_what_is_not_to_be_captured(made_up_cuda):
    batch = cards.CardClock(torch.device("cuda", 0)).prepare(
        lambda index: made_up_cuda.append(f"call {index}"), 2, False
    )
    assert not made_up_cuda
    assert batch.run() == pytest.approx(3e-3)
    assert made_up_cuda == [*TIMED[:4], "call 0", "call 1", *TIMED[4:]]
