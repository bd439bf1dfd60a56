"""bitblas.bench: turns and medians on a clock of our own, the float64 reference, what is reported of a machine."""

import dataclasses
import json
import math

import pytest
import torch

from bitblas import ArgumentError, BuildError, Matmul, MatmulConfig, env, measuring
from bitblas.bench import (
    Candidate,
    Comparison,
    Probes,
    Timing,
    Verdict,
    decode_kind,
    draw_workload,
    measure_machine,
    products_of,
    side_by_side,
    unit_of,
    use_threads,
)
from bitblas.bench import machine as machine_module
from bitblas.bench import timing as timing_module
from bitblas.bench.timing import MIN_CALLS
from bitblas.formats import FORMATS
from bitblas.measuring import TURN_CALLS
from bitblas.target import host_features

RIGHT = Verdict(0.0, True)


class Clock:
    """A clock that only work moves."""

    def __init__(self):
        self.now = 100.0
        self.log = []

    def __call__(self):
        return self.now

    def candidate(self, name, *seconds, check=lambda result: RIGHT, **fields):
        """A candidate whose calls take `seconds`, in a circle."""

        def call(index):
            self.log.append(name)
            self.now += seconds[index % len(seconds)]
            return name, index

        return Candidate(name, call, check, "float32", **fields)

    def turns(self):
        """The order of the turns, without the first call of each candidate, which is checked and not timed."""
        names = list(dict.fromkeys(self.log))
        calls = self.log[len(names) :]
        return [name for place, name in enumerate(calls) if place == 0 or calls[place - 1] != name]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """Fake work leaves no threads to wait for."""
    monkeypatch.setattr(timing_module, "SETTLE_SECONDS", 0.0)


# -- turns -----------------------------------------------------------------------------------------------------------------


def test_candidates_take_turns_and_the_median_counts():
    clock = Clock()
    slow, fast = clock.candidate("slow", 0.2, 0.3, 0.1, 0.2), clock.candidate("fast", 0.02)
    timings = side_by_side([slow, fast], seconds=1.0, clock=clock)
    assert [timing.name for timing in timings] == ["slow", "fast"]
    turns = clock.turns()
    assert turns[:4] == ["slow", "fast", "slow", "fast"]
    assert abs(turns.count("slow") - turns.count("fast")) <= 1
    assert timings[0].seconds == pytest.approx(0.2)
    assert timings[0].fastest == pytest.approx(0.1)
    assert timings[1].seconds == pytest.approx(0.02)
    assert all(timing.calls >= MIN_CALLS for timing in timings)


def test_the_first_call_of_a_turn_does_not_count():
    clock = Clock()
    # call 0 is checked only; then whole turns of calls, the first of which is slow
    quick = clock.candidate("quick", 0.0005, 0.004, *[0.0005] * (TURN_CALLS - 1))
    timings = side_by_side(
        [dataclasses.replace(quick, call=lambda index: quick.call(index % TURN_CALLS or TURN_CALLS))], 0.05, clock
    )
    assert timings[0].seconds == pytest.approx(0.0005)
    clock = Clock()
    timings = side_by_side([clock.candidate("long", 0.5)], 0.0, clock)
    assert timings[0].calls == 6  # three turns of three, less the first of each
    assert timings[0].seconds == pytest.approx(0.5)


def test_what_takes_long_is_called_less_often():
    (timing,) = side_by_side([(clock := Clock()).candidate("slow", 4.0)], 0.5, clock)
    assert timing.calls == 2


def test_repeats_share_the_time():
    clock = Clock()
    (timing,) = side_by_side([clock.candidate("graph", 0.8, repeats=8)], 0.1, clock)
    assert timing.seconds == pytest.approx(0.1)


def test_a_wrong_result_has_no_time_and_takes_none_from_the_others():
    clock = Clock()
    wrong = clock.candidate("wrong", 1.0, check=lambda result: Verdict(3.0, False))
    right, alone = clock.candidate("right", 0.1), clock.candidate("right", 0.1)
    timings = side_by_side([wrong, right], 0.5, clock)
    assert timings[0].seconds is None
    assert timings[0].fastest is None
    assert timings[0].error == 3.0
    assert timings[1].seconds == pytest.approx(0.1)
    assert clock.log.count("wrong") == 1
    assert timings[1].calls == side_by_side([alone], 0.5, clock)[0].calls


def test_a_result_that_goes_wrong_later_has_no_time_either():
    clock = Clock()
    (timing,) = side_by_side(
        [clock.candidate("racy", 0.1, check=lambda r: Verdict(float(r[1]), r[1] == 0))], 0.2, clock
    )
    assert timing.seconds is None
    assert timing.calls >= MIN_CALLS
    assert timing.error >= MIN_CALLS


# -- comparisons -----------------------------------------------------------------------------------------------------------


def timing(name, seconds):
    return Timing(name, "float32", True, seconds, seconds, 5, 0.0)


def test_ratios_and_fractions():
    row = Comparison(
        {"N": 8}, 1, 1000, 4000, 2, (timing("bitblas", 0.5), timing("torch float32", 1.5), timing("bad", None))
    )
    machine = machine_module.Machine("cpu", "isa", 2, 0, bandwidth=16000.0, fma=8000.0)
    assert row.speedup("torch float32") == 3.0
    assert row.speedup("bad") is None
    assert row.speedup("absent") is None
    assert row.bandwidth_fraction(machine) == 0.5
    assert row.fma_fraction(machine) == 0.25
    plain = json.loads(json.dumps(row.fields(machine)))
    assert plain["timings"][1]["speedup_of_bitblas"] == 3.0
    unknown = machine_module.Machine("cpu", "isa", 2, 0)
    assert row.bandwidth_fraction(unknown) is None
    assert row.fma_fraction(unknown) is None
    assert dataclasses.replace(row, timings=(timing("bitblas", None), timing("peer", 1.0))).speedup("peer") is None


def test_weights_are_rotated_far_beyond_the_cache_within_the_budget(monkeypatch):
    monkeypatch.setattr(measuring, "cache_bytes", lambda: 100 << 20)
    assert measuring.num_copies(10 << 20, 1 << 40) == 40
    assert measuring.num_copies(30 << 20, 1 << 40) == 14
    assert measuring.num_copies(10 << 20, 95 << 20) == 9
    assert measuring.num_copies(500 << 20, 1 << 40) == 1
    assert measuring.num_copies(300 << 20, 10 << 20) == 1
    assert measuring.num_copies(1, 1 << 40) == measuring.MAX_COPIES
    copies = measuring.rotate(torch.arange(10), 240)
    assert len(copies) == 3
    assert len({copy.data_ptr() for copy in copies}) == 3
    assert all(torch.equal(copy, copies[0]) for copy in copies)


def test_what_binds_is_what_takes_longest():
    row = Comparison(
        {"N": 8, "m": 1}, 1, 1000, 4000, 2, (timing("bitblas", 0.5), timing("peer", 1.0)), (), 3000, 3500,
        {"bandwidth": 20000.0, "decode table4": 7500.0, "fma": 5000.0},
    )  # fmt: skip
    assert row.limits() == {"bandwidth": 0.2, "decode table4": 0.4, "fma": 0.2}
    assert row.roofline() == ("decode table4", 0.8)
    assert row.fields()["binds"] == "decode table4"
    assert Comparison.parse(json.loads(json.dumps(row.fields()))) == row
    assert row.peak_fraction("fma") == pytest.approx(0.4)
    assert row.peak_fraction("int8") is None
    sliced = dataclasses.replace(row, ceilings={**row.ceilings, "int8": 6000.0}, unit="int8", products=3)
    assert sliced.limits() == {"bandwidth": 0.2, "decode table4": 0.4, "int8": 0.5}  # FMA is no limit any more
    assert sliced.roofline() == ("int8", 1.0)
    assert sliced.peak_fraction("fma") == pytest.approx(0.4)
    assert dataclasses.replace(row, ceilings={}).roofline() is None
    assert dataclasses.replace(row, timings=(timing("bitblas", None),)).roofline() is None


def test_threads():
    before = torch.get_num_threads()
    with use_threads(1) as threads:
        assert threads == torch.get_num_threads() == 1
    with use_threads(None) as threads:
        assert threads == before
    assert torch.get_num_threads() == before
    with pytest.raises(ArgumentError, match="threads is 0"), use_threads(0):
        pass


# -- workloads -------------------------------------------------------------------------------------------------------------


def config(W_dtype, **fields):
    fmt = FORMATS[W_dtype]
    scaling = {} if fmt.is_native else {"with_scaling": True, "group_size": 16}
    return MatmulConfig(**{"M": 3, "N": 24, "K": 48, "W_dtype": W_dtype, "accum_dtype": "float32", **scaling, **fields})


@pytest.mark.parametrize("a_dtype", ["float16", "int8"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_workload_is_right_by_itself_and_wrong_when_a_result_is_off(name, a_dtype):
    work = draw_workload(config(name, A_dtype=a_dtype, out_dtype="float32"), 3)
    assert int((work.a != 0).sum()) > work.a.numel() // 2
    assert work.weight.to(torch.float32).abs().sum() > 0
    dense = work.dense(torch.float64)
    out = (work.a.to(torch.float64) @ dense.T).to(torch.float32)
    verdict = work.check(out)
    assert verdict.right
    assert verdict.error < 1e-5
    for wrong in (out + 0.05 * out.abs().max(), torch.where(out == out.max(), math.nan, out), out[:, :-1], out * 0):
        assert not work.check(wrong).right
        assert not work.check_within(wrong, 1e-2).right
    assert work.check_within(out, 1e-3).right


@pytest.mark.parametrize("mode", ["original", "rescale", "quantized"])
@pytest.mark.parametrize("name", ["uint1", "uint3", "uint4", "uint8"])
def test_zero_points_are_what_the_operator_takes(name, mode):
    cfg = config(name, A_dtype="float32", with_zeros=True, zeros_mode=mode, with_bias=True, out_dtype="float32")
    work = draw_workload(cfg, 2)
    bits, groups = cfg.format.bits, cfg.num_groups
    if mode == "quantized":
        assert work.zeros.shape == (groups, (cfg.N * bits + 7) // 8)
        stream = [byte >> i & 1 for byte in work.zeros.view(torch.uint8)[1].tolist() for i in range(8)]
        codes = [sum(stream[n * bits + i] << i for i in range(bits)) for n in range(cfg.N)]
        assert codes == work.zero_points[:, 1].to(torch.int64).tolist()
    q, s = work.weight.to(torch.float64), work.scale.to(torch.float64).repeat_interleave(16, 1)
    z = work.zero_points.to(torch.float64).repeat_interleave(16, 1)
    dense = q * s - z if mode == "rescale" else (q - z) * s
    assert torch.equal(work.dense(torch.float64), dense)
    assert torch.allclose(work.expected, work.a.double() @ dense.T + work.bias.double())


def test_integers_must_be_exact():
    cfg = MatmulConfig(M=2, N=8, K=64, A_dtype="int8", W_dtype="int4", out_dtype="int32", accum_dtype="int32")
    work = draw_workload(cfg, 2)
    out = work.expected.to(torch.int32)
    assert work.check(out).right
    out[1, 3] += 1
    assert not work.check(out).right


def test_rows_differ_in_activations_alone():
    one, two = (draw_workload(config("uint4"), m) for m in (1, 2))
    assert one.weight is two.weight
    assert one.scale is two.scale
    assert not torch.equal(one.a[0], two.a[0])


def test_turned_copies_are_judged_one_by_one():
    work = draw_workload(config("uint4", A_dtype="float32", out_dtype="float32"), 3)
    out = work.expected.float()
    assert work.check_turned([out, out.roll(1, 1), out.roll(2, 1)], 1e-3).right
    assert not work.check_turned([out, out], 1e-3).right
    assert not work.check_turned([out, torch.full_like(out, math.nan).roll(1, 1)], 1e-3).right


def test_the_same_seed_gives_the_same_workload():
    one, two, other = (draw_workload(config("nf4"), 2, seed) for seed in (1, 1, 2))
    assert torch.equal(one.a, two.a)
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.a, other.a)


# -- machines --------------------------------------------------------------------------------------------------------------


def test_without_a_compiler_there_is_a_note(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = measure_machine(1)
    assert found.bandwidth is None
    assert found.fma is None
    assert "no C compiler" in found.notes[-1]
    json.dumps(found.fields())


def test_a_busy_machine_is_a_note(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(machine_module.os, "cpu_count", lambda: 4)
    for load, is_busy in ((0.3, False), (3.5, True)):
        monkeypatch.setattr(machine_module.os, "getloadavg", lambda load=load: (load, 0, 0))
        assert ("busy" in "".join(measure_machine(1).notes)) == is_busy


def test_a_compiler_that_fails_is_a_note(tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no luck >&2\nexit 1\n")
    broken.chmod(0o755)
    with env.scope(BITBLAS_CC=broken):
        assert "no luck" in measure_machine(1).notes[-1]


@pytest.fixture(scope="module")
def probes():
    try:
        return Probes()
    except BuildError as error:
        pytest.skip(str(error))


def test_peaks_and_bandwidth(monkeypatch, probes):
    monkeypatch.setattr(measuring, "READ_BYTES", 64 << 20)
    monkeypatch.setattr(machine_module, "_CALLS", 2)
    found = measure_machine(1, probes)
    assert 1e8 < found.bandwidth < 1e13
    assert 1e8 < found.fma < 1e12
    assert found.cache_bytes >= 0


DECODE_LOOPS = (
    *("table1", "table2", "table4", "codebook4", "planes3", "planes5", "planes6", "planes7", "uint8", "int8"),
    *("float8_e4m3", "float8_e5m2", "pairs4"),
    *(f"dots{bits}{slices}" for bits in range(1, 9) for slices in ("", "x3")),
)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("kind", DECODE_LOOPS)
def test_decode_loops(probes, kind, wide):
    features = host_features()
    asks = {"dots": "avx512vnni", "pair": "avx512bf16"}.get(kind[:4], "avx512bw")
    narrow = kind in ("table1", "table2", "table4", "uint8", "int8") and "avx2" in features
    found = probes.decode(kind, 1, wide)
    if not (wide and asks in features) and not narrow:
        assert found is None
        return
    assert found.name == f"decode {kind}"
    assert 1e8 < found.rate(3) < 1e12  # bytes of weights per second; a loop that was computed ahead would do more
    assert found.work % 64 == 0
    assert probes.decode(kind, 1, wide) is found


def test_a_loop_that_does_not_exist(probes):
    assert probes.decode("table9", 1) is None


def test_a_decode_loop_takes_longer_than_its_multiplications(probes):
    if "avx512bw" not in host_features():
        pytest.skip("there is no AVX-512")
    peak = probes.unit("fma", 1).rate(20)
    rates = {bits: probes.decode(f"table{bits}", 1).rate(20) / bits * 8 for bits in (1, 2, 4)}
    assert all(rate < 1.1 * peak for rate in rates.values())  # weights a second, each multiplied once


@pytest.mark.parametrize(
    ("cpu", "fields", "unit", "products", "kind"),
    [
        ("skylake-avx512", {"W_dtype": "uint4"}, "fma", 1, "table4"),
        ("skylake-avx512", {"W_dtype": "nf4"}, "fma", 1, "codebook4"),
        ("skylake-avx512", {"W_dtype": "int3"}, "fma", 1, "planes3"),
        ("skylake-avx512", {"W_dtype": "int8"}, "fma", 1, "int8"),
        ("icelake-server", {"W_dtype": "float8_e5m2"}, "fma", 1, "float8_e5m2"),
        ("icelake-server", {"W_dtype": "float16", "with_scaling": False, "group_size": -1}, "fma", 1, ""),
        ("icelake-server", {"W_dtype": "int2", "A_dtype": "int8", "out_dtype": "float32"}, "int8", 1, "dots2"),
        ("icelake-server", {"W_dtype": "uint4"}, "int8", 3, "dots4x3"),
        ("znver4", {"M": 16, "W_dtype": "uint4", "A_dtype": "bfloat16", "out_dtype": "bfloat16"}, "bf16", 1, "pairs4"),
    ],
)
def test_what_a_kernel_is_held_against(cpu, fields, unit, products, kind):
    asked = {"M": (1, 16), "N": 64, "K": 256, "with_scaling": True, "group_size": 128, "accum_dtype": "float32"}
    op = Matmul(MatmulConfig(**{**asked, **fields}), target=f"llvm -mcpu={cpu}", from_database=True)
    assert (unit_of(op, 1), products_of(op, 1), decode_kind(op, 1)) == (unit, products, kind)
    assert (unit_of(op, 16), products_of(op, 16)) == (unit, products)


def test_an_avx2_kernel_is_held_against_avx2(probes):
    if "avx2" not in host_features():
        pytest.skip("there is no AVX2")
    cfg = MatmulConfig(M=(1, 64), N=64, K=256, W_dtype="uint4", with_scaling=True, accum_dtype="float32")
    op = Matmul(cfg, target="llvm -mcpu=haswell", from_database=True)
    names = [ceiling.name for ceiling in probes.of(op, 1, 1 << 20, 1)]
    assert names == ["bandwidth", "decode table4", "fma"]
    assert probes.of(op, 1, 1 << 20, 1)[1] is probes.decode("table4", 1, wide=False)
    assert [ceiling.name for ceiling in probes.of(op, 64, 1 << 20, 1)] == ["fma"]
