"""What lies around CUDA kernels, without building one: reports of ptxas, compilers, launches, workspaces, cards as targets."""

import pickle
import stat
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import bitblas
from bitblas import MatmulConfig, env
from bitblas.cli import info
from bitblas.cuda import compile as compiling
from bitblas.cuda import driver, nvcc, nvrtc, workspaces
from bitblas.cuda.launches import Launch, evaluate
from bitblas.cuda.resources import KernelResources, parse_ptxas, read_resources
from bitblas.errors import ArgumentError, BuildError, ConfigError, UnsupportedError
from bitblas.machines import TYPICAL_CARDS, Card
from bitblas.ops.arguments import Door
from bitblas.ops.cuda_arguments import CudaDoor
from bitblas.plan import plan_matmul
from bitblas.target import Target, resolve_target, runs_on

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'matmul_1_kernel' for 'sm_90'
ptxas info    : Function properties for matmul_1_kernel
    24 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 24 bytes cumulative stack size, 4096 bytes smem
ptxas info    : Compile time = 1.0 ms
ptxas info    : Compiling entry function 'matmul_0_kernel' for 'sm_90'
ptxas info    : Function properties for matmul_0_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 29 registers, used 0 barriers
"""
#: Of CUDA 11, which has the constant banks in the line of registers.
OLDER = """\
ptxas info    : Compiling entry function 'k' for 'sm_80'
ptxas info    : Used 12 registers, 512 bytes smem, 372 bytes cmem[0]
"""


def test_reports_of_ptxas():
    found = parse_ptxas(PTXAS)
    assert found == {
        "matmul_0_kernel": KernelResources(29),
        "matmul_1_kernel": KernelResources(64, spill_stores=8, spill_loads=16, stack=24, shared=4096),
    }
    assert parse_ptxas(OLDER) == {"k": KernelResources(12, shared=512)}
    assert read_resources({"resources": {name: one.fields() for name, one in found.items()}}) == found
    assert read_resources({}) == {}


# -- compilers -------------------------------------------------------------------------------------------------------------


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def nothing(monkeypatch, tmp_path):
    """A machine without CUDA."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CUDA_HOME", "CUDA_PATH", "BITBLAS_NVCC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nvcc, "_USUAL", str(tmp_path / "usual"))
    monkeypatch.setattr(nvrtc, "_USUAL", str(tmp_path / "usual"))
    monkeypatch.setattr(nvcc.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    monkeypatch.setattr(nvrtc.ctypes.util, "find_library", lambda name: None)
    return tmp_path


def test_where_nvcc_is_looked_for(nothing, monkeypatch):
    assert nvcc.find_nvcc() is None
    places = ["site/nvidia/cu12/bin/nvcc", "site/nvidia/cu13/bin/nvcc", "usual/bin/nvcc", "home/bin/nvcc", "bin/nvcc"]
    monkeypatch.setenv("CUDA_HOME", str(nothing / "home"))
    for place in places:  # each comes before those before it
        path = program(nothing / place, "exit 0")
        assert nvcc.find_nvcc() == str(path)
    named = program(nothing / "a b" / "my-nvcc", "exit 0")
    with env.scope(BITBLAS_NVCC=f"'{named}' --option"):
        assert nvcc.find_nvcc() == f"'{named}' --option"
    with (
        env.scope(BITBLAS_NVCC="no-such-nvcc"),
        pytest.raises(BuildError, match="'no-such-nvcc', and there is no such"),
    ):
        nvcc.find_nvcc()
    with env.scope(BITBLAS_NVCC='"x'), pytest.raises(BuildError, match="which is no command"):
        nvcc.find_nvcc()


def test_where_nvrtc_is_looked_for(nothing, monkeypatch):
    with pytest.raises(BuildError, match="pip install nvidia-cuda-nvrtc nvidia-cuda-runtime"):
        compiling.find_cuda_compiler()
    libraries = {}
    for folder, version in (("usual", 11), ("site/nvidia/cuda_nvrtc", 12), ("site/nvidia/cu13", 13)):
        libraries[version] = nothing / folder / "lib" / f"libnvrtc.so.{version}"
        libraries[version].parent.mkdir(parents=True)
        libraries[version].touch()
    for version, found in (("12.8", 12), ("13.0", 13), (None, 13)):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert compiling.find_cuda_compiler() == str(libraries[found])
    assert compiling.is_nvrtc(str(libraries[12]))
    assert not compiling.is_nvrtc("/usr/local/cuda/bin/nvcc")
    with pytest.raises(BuildError, match="pip install nvidia-cuda-runtime"):
        nvrtc.find_headers(str(libraries[13]))
    header = nothing / "site/nvidia/cu13/include/cuda_fp16.h"
    header.parent.mkdir(parents=True)
    header.touch()
    assert nvrtc.find_headers(str(libraries[13])) == header.parent
    with pytest.raises(BuildError, match="NVRTC cannot be loaded"):
        nvrtc.compile_cubin(str(libraries[13]), "", "sm_90")
    nvcc_here = program(nothing / "bin" / "nvcc", "exit 0")
    assert compiling.find_cuda_compiler() == str(libraries[13])  # there is no C++ compiler for nvcc
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-ccbin /opt/g++")
    assert compiling.find_cuda_compiler() == str(nvcc_here)
    monkeypatch.delenv("NVCC_APPEND_FLAGS")
    program(nothing / "bin" / "g++", "exit 0")
    assert compiling.find_cuda_compiler() == str(nvcc_here)


def test_what_nvcc_compiles_for(tmp_path):
    listing = "compute_75 compute_80 compute_90 compute_100"
    new = str(program(tmp_path / "nvcc", f"printf '%s\\n' {listing} 'Cuda, release 13.0, V13.0.88'"))
    assert nvcc.nvcc_version(new) == "13.0.88"
    assert nvcc.code_option(new, "sm_90") == "arch=compute_90,code=sm_90"
    assert nvcc.code_option(new, "sm_90a") == "arch=compute_90a,code=sm_90a"
    # what is newer than nvcc is left to the driver
    assert nvcc.code_option(new, "sm_130") == "arch=compute_100,code=compute_100"
    with pytest.raises(
        UnsupportedError, match=r"compiles for compute capability 7\.5 and later, and the target is sm_70"
    ):
        nvcc.code_option(new, "sm_70")


# -- launches --------------------------------------------------------------------------------------------------------------


def test_expressions_of_launches():
    tensors = [torch.empty(13, 4), torch.empty(2)]
    m = ["dim", 0, 0]
    assert evaluate(7, tensors) == 7
    assert evaluate(["data", 1], tensors) == tensors[1].data_ptr()
    assert evaluate(["FloorDiv", ["Add", m, 7], 8], tensors) == 2
    assert evaluate(["Max", ["Min", m, 5], ["FloorMod", ["Sub", ["Mul", m, 2], 1], 7]], tensors) == 5
    launch = Launch("k", (("pointer", ["data", 0]), ("int32", m)), (m, 1, 1), (32, 1, 1), 0)
    assert Launch.parse(launch.fields()) == launch


# -- workspaces ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def streams(monkeypatch):
    """A device that is not there: what is on it lies on the CPU."""
    state = SimpleNamespace(stream=1, capture=0, waits=0)

    def wait(device):
        state.waits += 1

    monkeypatch.setattr(driver, "place", lambda device: torch.device("cpu"))
    monkeypatch.setattr(driver, "current_stream", lambda device: state.stream)
    monkeypatch.setattr(driver, "is_capturing", lambda device: bool(state.capture))
    monkeypatch.setattr(driver, "capture_id", lambda stream: state.capture)
    monkeypatch.setattr(driver, "synchronize", wait)
    return state


def test_one_workspace_for_a_device_and_a_stream(streams):
    room = workspaces.Workspaces()
    sums, counters = room.get(0, 5000, 7)
    assert (sums.dtype, counters.dtype) == (torch.float32, torch.int32)
    assert sums.numel() >= 5000
    assert counters.numel() >= 7
    assert not counters.any()
    again = room.get(0, 300, 5)
    assert [one.data_ptr() for one in again] == [sums.data_ptr(), counters.data_ptr()]
    grown = room.get(0, 9000, 7)
    assert grown[0].numel() >= 9000
    assert grown[1].data_ptr() == counters.data_ptr()
    assert room.get(0, 10, 10)[0].data_ptr() == grown[0].data_ptr()  # it does not shrink
    others = {room.get(1, 10, 10)[1].data_ptr()}
    streams.stream = 2
    others.add(room.get(0, 10, 10)[1].data_ptr())
    assert len(others | {counters.data_ptr()}) == 3


def test_captured_graphs_have_counters_of_their_own(streams):
    room = workspaces.Workspaces()
    _, eager = room.get(0, 10, 10)
    assert streams.waits == 1  # for the zeros that captures will take
    streams.capture = 1
    sums, first = room.get(0, 10, 10)
    other_sums, same = room.get(0, 20, 20)
    assert first.data_ptr() == same.data_ptr() != eager.data_ptr()
    assert sums.data_ptr() != other_sums.data_ptr()  # both from the graph's memory
    assert not first.any()
    streams.stream = 2  # a branch of the graph runs beside
    _, branch = room.get(0, 10, 10)
    streams.capture, streams.stream = 2, 1
    _, second = room.get(0, 10, 10)
    assert len({one.data_ptr() for one in (eager, first, branch, second)}) == 4
    _, large = room.get(0, 10, workspaces.SLICE + 1)
    assert large.numel() > workspaces.SLICE  # whose zeros are part of the graph
    assert not large.any()
    streams.capture = 0
    assert room.get(0, 10, 10)[1].data_ptr() == eager.data_ptr()
    assert streams.waits == 1


def test_slices_for_captures_are_made_before_there_are_few(streams):
    room = workspaces.Workspaces()
    streams.capture = 1
    _, unprepared = room.get(0, 10, 10)  # no call has been before: its zeros are part of the graph
    assert unprepared.numel() == 10
    found = []
    for number in range(2, 200):
        streams.capture = 0
        room.get(0, 10, 10)
        streams.capture = number
        found.append(room.get(0, 10, 10)[1])
    assert len({one.data_ptr() for one in found}) == len(found)
    assert all(one.numel() == workspaces.SLICE for one in found)


def test_a_capture_that_cannot_be_told_from_others(streams, monkeypatch):
    room = workspaces.Workspaces()
    room.get(0, 10, 10)
    streams.capture = 1
    monkeypatch.setattr(driver, "capture_id", lambda stream: 0)
    found = [room.get(0, 10, 10)[1] for _ in range(3)]
    assert len({one.data_ptr() for one in found}) == 3


# -- the door --------------------------------------------------------------------------------------------------------------


@dataclass
class OnCard:
    """What the door asks of a tensor on a card."""

    index: int = 0
    address: int = 4096
    kind: str = "cuda"

    @property
    def is_cuda(self):
        return self.kind == "cuda"

    @property
    def device(self):
        return torch.device(self.kind, self.index)

    def get_device(self):
        return self.index

    def data_ptr(self):
        return self.address

    def clone(self):
        return OnCard(self.index, 1 << 20, self.kind)


def enter(monkeypatch, operands, output=None, arch="sm_86"):
    config = MatmulConfig(M=1, N=16, K=16, W_dtype="uint4", with_scaling=True)
    door = CudaDoor(config, (16, 8), Target("cuda", "sm_80"))
    out = output or OnCard(operands[0].index)
    monkeypatch.setattr(Door, "enter", lambda self, *given: (1, list(operands), out))
    monkeypatch.setattr("bitblas.ops.cuda_arguments.device_arch", lambda index: arch)
    return door.enter(None, None, (), None, output)


def test_the_door_of_a_card_lets_in_what_lies_on_one(monkeypatch):
    given = [OnCard(1), OnCard(1, 4096 + 2), OnCard(1)]
    m, operands, _ = enter(monkeypatch, given, OnCard(1))
    assert m == 1
    assert operands[0] is given[0]
    assert operands[2] is given[2]
    assert operands[1].address == 1 << 20  # copied to where vectors can be read


@pytest.mark.parametrize(
    ("operands", "output", "arch", "error", "message"),
    [
        ([OnCard(0), OnCard(1), OnCard(0)], None, "sm_80", ArgumentError, "^W is on device cuda:1; expected cuda:0, where"),
        ([OnCard(1), OnCard(1), OnCard(0)], None, "sm_80", ArgumentError, "^scale is on device cuda:0; expected cuda:1"),
        ([OnCard(0), OnCard(0), OnCard(0)], OnCard(1), "sm_80", ArgumentError, "^output is on device cuda:1"),
        ([OnCard(0), OnCard(0), OnCard(0)], OnCard(0, 4098), "sm_80", ArgumentError, "^output begins at the address 0x1002"),
        ([OnCard(0, kind="xpu"), OnCard(0), OnCard(0)], None, "sm_80", ArgumentError, "^A is on device xpu:0; this operator"),
        (
            [OnCard(0), OnCard(0), OnCard(0)], None, "sm_90", UnsupportedError,
            r"^A is on cuda:0, of compute capability sm_90, .* was built for sm_80, .* target='cuda -arch=sm_90'$",
        ),
    ],
)  # fmt: skip
def test_the_door_of_a_card_refuses(monkeypatch, operands, output, arch, error, message):
    with pytest.raises(error, match=message):
        enter(monkeypatch, operands, output, arch)


# -- targets ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cards(monkeypatch):
    """Devices as torch tells of them: (major, minor), properties."""
    devices = [
        ((9, 0), {"multi_processor_count": 132, "shared_memory_per_block_optin": 232448, "L2_cache_size": 62914560}),
        ((8, 6), {"multi_processor_count": 28, "memory_clock_rate": 7501000, "memory_bus_width": 192}),
    ]
    state = SimpleNamespace(current=0, devices=devices)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.current)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: devices[index][0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**devices[index][1]))
    monkeypatch.delenv("BITBLAS_TARGET", raising=False)
    return state


H, A = TYPICAL_CARDS["sm_90"], TYPICAL_CARDS["sm_86"]
LARGE, SMALL = Card(132, 232448, 62914560, H.memory_gbs), Card(28, A.shared_bytes, A.l2_bytes, 360)


def test_targets_take_the_numbers_of_the_cards_that_are_here(cards):
    assert resolve_target() == resolve_target("cuda") == Target("cuda", "sm_90", card=LARGE)
    cards.current = 1
    assert resolve_target() == resolve_target("cuda") == Target("cuda", "sm_86", card=SMALL)
    assert resolve_target("cuda -arch=sm_90").card == LARGE
    assert resolve_target("cuda -arch=sm_90a").card == LARGE
    assert resolve_target("cuda -arch=sm_80").card == TYPICAL_CARDS["sm_80"]  # not here
    assert resolve_target("llvm").kind == "llvm"
    with env.scope(BITBLAS_TARGET="llvm"):
        assert resolve_target().kind == "llvm"
    assert bitblas.auto_detect_nvidia_target(1) == "cuda -arch=sm_86"


def test_info_shows_the_cards(cards, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    cards.devices.append(((7, 0), {"multi_processor_count": 80}))
    found = {fact.name: (fact.value, fact.hint) for fact in info._devices()}
    numbers = "132 multiprocessors, 227 KB of shared memory a block, 60 MB of L2, 3352 GB/s"
    assert found["cuda:0"] == (f"Card 0: sm_90, {numbers}", "")
    assert found["cuda:1"][0].startswith("Card 1: sm_86, 28 multiprocessors")
    assert found["cuda:2"][1] == "supported from compute capability 7.5 on"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (nothing,) = info._devices()
    assert nothing.value == "none: torch is built for CUDA 13.0, and sees no device"


def test_info_names_what_to_install(nothing, tmp_path):
    found = {fact.name: (fact.value, fact.hint) for fact in info._cuda_compilers()}
    assert found["nvcc"] == ("none", "")
    assert found["NVRTC"] == ("none", f"to build operators for cards: {compiling.GET_CUDA_COMPILER}")
    with env.scope(BITBLAS_NVCC="/no/such/nvcc"):
        (fact,) = info._cuda_compilers()
    assert "/no/such/nvcc" in fact.value
    assert "BITBLAS_NVCC" in fact.hint


def test_two_cards_of_one_kind_the_current_one_counts(cards):
    cards.devices[0] = ((8, 6), {"multi_processor_count": 84})
    cards.current = 1
    assert resolve_target("cuda -arch=sm_86").card.num_sms == 28
    cards.current = 0
    assert resolve_target("cuda -arch=sm_86").card.num_sms == 84


def test_cards_that_cannot_be_asked(cards, monkeypatch):
    def refuse(*args):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    for name in ("current_device", "get_device_properties", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    assert resolve_target("cuda -arch=sm_90").card == TYPICAL_CARDS["sm_90"]
    with pytest.raises(RuntimeError, match="re-initialize"):
        resolve_target("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)  # torch for ROCm answers to torch.cuda, too
    assert resolve_target().kind == "llvm"


def test_what_a_card_decides():
    here, there = Target("cuda", "sm_90", card=LARGE), Target("cuda", "sm_90")
    assert here != there
    assert here.fields() == there.fields()  # code is shared
    assert here.facts() != there.facts()  # measurements are not
    assert str(here) == str(there) == "cuda -arch=sm_90"
    assert pickle.loads(pickle.dumps(here)) == here
    assert here.as_tvm()["max_shared_memory_per_block"] == LARGE.shared_bytes
    here.check_runnable()  # machines compile for cards that they do not have


@pytest.mark.parametrize(
    ("built", "device", "runs"),
    [
        ("sm_80", "sm_80", True),
        ("sm_80", "sm_86", True),
        ("sm_86", "sm_80", False),
        ("sm_80", "sm_90", False),
        ("sm_90a", "sm_90", True),
        ("sm_100", "sm_120", False),
        ("sm_100a", "sm_103", False),
        ("sm_100f", "sm_103", True),
        ("sm_75", "sm_80", False),
        ("sm_120", "sm_121", True),
    ],
)
def test_which_devices_run_which_code(built, device, runs):
    assert runs_on(built, device) == runs


def test_cards_that_are_too_old():
    config = MatmulConfig(N=64, K=64, W_dtype="uint4")
    with pytest.raises(UnsupportedError, match=r"cuda -arch=sm_70: cards of compute capability 7\.5 and later"):
        plan_matmul(config, resolve_target("nvidia/tesla-v100"))
    plan_matmul(config, resolve_target("cuda -arch=sm_130"))  # newer than all that is known
    with pytest.raises(ConfigError, match="must be of the form sm_90"):
        resolve_target("cuda -arch=90")
