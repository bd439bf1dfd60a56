"""Measuring on another machine: a real tracker and real servers of TVM's RPC on the loopback interface."""

import json
import socket
import time
from dataclasses import replace

import pytest

from bad_kernels import library
from bitblas import (
    BuildError,
    FlashAtten,
    FlashAttenConfig,
    Matmul,
    MatmulConfig,
    RemoteError,
    UnsupportedError,
    cli,
    tuner,
)
from bitblas.target import host_target, resolve_target
from bitblas.tuner import local, remote
from bitblas.tuner.search import candidates, tiling_of

CONFIG = {"N": 64, "K": 128, "W_dtype": "uint4", "group_size": 64, "with_scaling": True, "with_zeros": True}
SECONDS = 300.0


def always():
    return True


def can_listen():
    try:
        with socket.create_server(("127.0.0.1", 0)):
            return True
    except OSError:
        return False


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not can_listen(), reason="there are no sockets here")]


@pytest.fixture(scope="module")
def address():
    """A tracker."""
    from tvm.rpc.tracker import Tracker

    tracker = Tracker(host="127.0.0.1", port=9190, port_end=9990, silent=True)
    yield f"127.0.0.1:{tracker.port}"
    tracker.terminate()


@pytest.fixture(scope="module")
def serve(address):
    """Starts servers by key, and waits until the tracker knows them."""
    from tvm import rpc

    host, port = remote.parse_address(address)
    servers = []

    def start(key):
        server = rpc.Server("127.0.0.1", port=9090, port_end=9990, key=key, tracker_addr=(host, port), silent=True)
        servers.append(server)
        deadline = time.monotonic() + 60
        while not any(
            row["key"] == f"server:{key}" for row in rpc.connect_tracker(host, port).summary()["server_info"]
        ):
            assert time.monotonic() < deadline, "the server does not report to its tracker"
            time.sleep(0.1)
        return server

    yield start
    for server in servers:
        server.terminate()


@pytest.fixture(scope="module")
def key(serve):
    serve("here")
    return "here"


@pytest.fixture(scope="module")
def built():
    """What builds, for all tests that need no children of their own."""
    with local.building(True) as found:
        yield found


@pytest.fixture
def bench(address, key, built):
    machine = remote.Remote(address, key)
    found = remote.RemoteBench(built, machine)
    yield found
    found.leave()
    machine.close()


# -- measuring -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        MatmulConfig(M=[1, 16], accum_dtype="float32", **CONFIG),
        MatmulConfig(M=[3], A_dtype="bfloat16", out_dtype="bfloat16", accum_dtype="float32", **CONFIG),
        MatmulConfig(M=[5], N=64, K=128, A_dtype="int8", W_dtype="int2", out_dtype="int32", accum_dtype="int32"),
        MatmulConfig(M=[64], N=512, K=512, W_dtype="uint4", accum_dtype="float32"),  # parallel
    ],
    ids=["float16", "bfloat16", "int8", "parallel"],
)
def test_tuning_over_there_is_kept_here(config, address, key, store):
    tuned, record = tuner.tune_there(config, host_target(), address, key, topk=2, seconds=SECONDS)
    assert tuned.ended == ""
    assert set(tuned.buckets) == set(config.buckets)
    for row in tuned.buckets.values():
        assert row.lost == ()
        assert len(row.seconds) == 2
        assert all(0 < seconds < 10 for _, seconds in row.seconds)
    assert record["machine"]["name"] == f"{key} of {address}"
    assert record["machine"]["cpu"]
    assert record["machine"]["system"].startswith(host_target().arch)
    op = Matmul(config)
    assert op.tuning_record == record
    assert op.plan.tilings == {m: row.tiling for m, row in tuned.buckets.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attentions_are_tuned_over_there(dtype, address, key, store):
    dtypes = dict.fromkeys(("Q_dtype", "K_dtype", "V_dtype", "Out_dtype"), dtype)
    config = FlashAttenConfig(heads=4, heads_kv=2, seq_len=8, dim=16, dim_v=24, is_causal=True, layout="ntn", **dtypes)
    tuned, record = tuner.tune_there(config, host_target(), address, key, topk=2, seconds=SECONDS)
    assert tuned.ended == ""
    (row,) = (tuned.buckets[m] for m in config.buckets)
    assert row.lost == ()
    assert len(row.seconds) == 2
    assert all(0 < seconds < 10 for _, seconds in row.seconds)
    op = FlashAtten(config, enable_tuning=True)
    assert op.tuning_record == record
    assert op.plan.tilings == {16: row.tiling}


def test_an_attention_that_lies_loses_itself(bench):
    """Built right, but without the mask: its results are those of another attention."""
    config = FlashAttenConfig(seq_len=16, dim=16, is_causal=True)
    good, bad = candidates(config, host_target(), 2)[16]
    other = replace(good, config=replace(good.config, is_causal=False))
    assert dict(bench.build([good, other], always)) == {good: "", other: ""}
    bench._built._built[bad] = bench._built._built[other]
    assert bench.turn(good, 16, None)
    with pytest.raises(tuner.LostError, match="gives other results"):
        bench.turn(bad, 16, good)


def test_times_are_those_of_the_kernel(bench):
    """A hundred times the work takes more than ten times as long; what a call over the network costs is no part of it."""
    times = []
    for size in (128, 2048):
        config = MatmulConfig(M=[1], N=size, K=size, W_dtype="uint4", accum_dtype="float32")
        (plan,) = candidates(config, host_target(), 1)[1]
        assert dict(bench.build([plan], always)) == {plan: ""}
        times.append(min(bench.turn(plan, 1, None)))
    assert times[0] < 1e-3
    assert times[1] > 10 * times[0]


def test_slabs_are_timed_together(bench):
    config = MatmulConfig(M=[1200], N=64, K=64, W_dtype="uint4", accum_dtype="float32")
    (plan,) = candidates(config, host_target(), 1)[1200]
    assert tiling_of(plan).slab_m < 1200
    assert dict(bench.build([plan], always)) == {plan: ""}
    assert bench.turn(plan, 1200, None)
    assert [array.shape[0] for array in bench._arrays[1][:1]] == [400]


def test_a_kernel_that_lies_loses_itself(bench, tmp_path):
    good, bad = candidates(MatmulConfig(M=[16], **CONFIG), host_target(), 2)[16]
    assert dict(bench.build([good, bad], always)) == {good: "", bad: ""}
    bench._built._built[bad] = library(tmp_path, "lies")
    assert bench.turn(good, 16, None)
    with pytest.raises(tuner.LostError, match="gives other results"):
        bench.turn(bad, 16, good)
    assert bench.turn(good, 16, None)


def test_a_kernel_that_hangs_loses_itself(bench, tmp_path, monkeypatch):
    bench.leave()
    monkeypatch.setattr(remote, "SESSION_SECONDS", 6.0)
    good, bad = candidates(MatmulConfig(M=[16], **CONFIG), host_target(), 2)[16]
    assert dict(bench.build([good, bad], always)) == {good: "", bad: ""}
    bench._built._built[bad] = library(tmp_path, "hangs")
    assert bench.turn(good, 16, None)
    with pytest.raises(tuner.LostError, match="failed on 'here'"):
        bench.turn(bad, 16, good)
    assert bench.turn(good, 16, None)


def test_a_kernel_that_crashes_leaves_what_was_found(address, serve, tmp_path, monkeypatch, store, caplog):
    """TVM's server does not survive it: the search ends, and keeps the bucket before."""
    serve("fragile")
    monkeypatch.setattr(remote, "FREE_SECONDS", 5.0)
    real = remote.RemoteBench.turn

    def turn(self, plan, m, like):
        if m == 16:
            self._built._built[plan] = library(tmp_path, "segfaults")
        return real(self, plan, m, like)

    monkeypatch.setattr(remote.RemoteBench, "turn", turn)
    config = MatmulConfig(M=[1, 16], **CONFIG)
    tuned, record = tuner.tune_there(config, host_target(), address, "fragile", topk=2, seconds=SECONDS)
    assert list(tuned.buckets) == [1]
    assert "fragile" in tuned.ended
    assert list(record["buckets"]) == ["1"]
    assert "tuning ended early" in caplog.text


def test_a_library_that_cannot_be_loaded(bench, tmp_path):
    (plan,) = candidates(MatmulConfig(M=[1], **CONFIG), host_target(), 1)[1]
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    bench._built._built[plan] = broken
    with pytest.raises(tuner.LostError, match="failed on 'here'"):
        bench.turn(plan, 1, None)


# -- what can be wrong -----------------------------------------------------------------------------------------------------


def test_a_key_that_nobody_serves(address, key):
    with pytest.raises(
        RemoteError, match=rf"no machine serves the key 'nobody' to the tracker {address}; it has .*here"
    ):
        tuner.tune_there(MatmulConfig(M=[1], **CONFIG), host_target(), address, "nobody")


def test_no_tracker_at_all():
    with pytest.raises(RemoteError, match=r"the tracker 127\.0\.0\.1:1 cannot be reached: .*refused"):
        tuner.tune_there(MatmulConfig(M=[1], **CONFIG), host_target(), "127.0.0.1:1", "here")


def test_something_else_that_listens(monkeypatch):
    monkeypatch.setattr(remote, "ANSWER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(RemoteError, match="does not answer as a TVM tracker does"):
            remote.Remote(address, "here")


def test_a_machine_that_others_use(address, key, monkeypatch):
    monkeypatch.setattr(remote, "FREE_SECONDS", 2.0)
    other = remote.Remote(address, key)
    session = other.session()
    try:
        with pytest.raises(RemoteError, match=r"no machine for 'here' became free within 2 s"):
            remote.Remote(address, key).session()
    finally:
        del session
        other.close()


def test_a_target_that_the_machine_lacks(address, key, monkeypatch):
    foreign = "neoverse-n1" if host_target().arch == "x86_64" else "x86-64-v3"
    with pytest.raises(UnsupportedError, match=r"cannot run on the machine for 'here'"):
        tuner.tune_there(MatmulConfig(M=[1], **CONFIG), resolve_target(foreign), address, key)
    bench = remote.RemoteBench.__new__(remote.RemoteBench)
    bench._remote, bench.cpu, bench.triple = remote.Remote(address, key), "haswell", "x86_64-linux-gnu"
    with pytest.raises(UnsupportedError, match=r"a haswell, which lacks: avx512"):
        bench.check_runnable(resolve_target("x86-64-v4"))
    bench.check_runnable(resolve_target("x86-64-v3"))


def test_no_linker(address, key, monkeypatch):
    monkeypatch.setattr("bitblas.tuner.local.find_compiler", lambda target=None: None)
    with pytest.raises(BuildError, match="needs a C compiler"):
        tuner.tune_there(MatmulConfig(M=[1], **CONFIG), host_target(), address, key)


@pytest.mark.parametrize("address", ["", "host", "host:", ":9190", "host:x", "host:0", "host:65536", "host:-1"])
def test_addresses(address):
    with pytest.raises(ValueError, match="it must be of the form host:port"):
        remote.parse_address(address)
    assert remote.parse_address("[::1]:9190") == ("::1", 9190)


# -- the command -----------------------------------------------------------------------------------------------------------


def test_the_command(address, key, store, tmp_path, capsys):
    out = tmp_path / "record.json"
    arguments = f"tune --rpc {address} --key {key} --N 64 --K 64 --M 2 --topk 1 --seconds 300 --out {out}"
    assert cli.main(arguments.split()) == 0
    assert f"measured on {key} of {address}" in capsys.readouterr().out
    assert json.loads(out.read_text())["machine"]["name"] == f"{key} of {address}"
    assert cli.main(f"tune --rpc {address} --key nobody --N 64 --K 64".split()) == 2
    output = capsys.readouterr()
    assert output.err.startswith("bitblas: error: no machine serves the key 'nobody'")
    assert output.err.count("\n") == 1
