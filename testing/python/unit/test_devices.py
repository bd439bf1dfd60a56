"""The tests' own way to cards: copies that are laid out alike, what is left out and why."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import devices

RUN = Path(__file__).parents[1] / "run"
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "marks", "expected"),
    [
        (None, "", "cpu"),
        (None, "cuda", "cuda"),
        (None, "cuda and not slow", "cuda"),
        (None, "not cuda", "cpu"),
        (None, "not slow and not cuda", "cpu"),
        ("mirrored", "cuda", "mirrored"),
        ("cuda", "", "cuda"),
    ],
)
def test_what_the_options_mean(device, marks, expected):
    assert devices.wanted(device, marks) == expected


def test_copies_are_laid_out_as_the_tensors_are():
    room = torch.arange(64.0)
    views = [
        room[1:25].view(6, 4),
        room[::2],
        room[:24].view(4, 6).mT,
        room[3:4].expand(5, 1),
        torch.nn.Parameter(room[40:].view(2, 12), requires_grad=False),
        torch._neg_view(room[8:16]),
        room[:0],
        room[2:].view(torch.int8)[5:],
    ]
    mirror = devices.Mirror(CPU)
    copies = [mirror.of(view) for view in views]
    for view, copy in zip(views, copies, strict=True):
        assert type(copy) is type(view)
        assert (copy.shape, copy.stride(), copy.storage_offset()) == (view.shape, view.stride(), view.storage_offset())
        assert torch.equal(copy, view)
        assert copy.is_neg() == view.is_neg()
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1  # one memory, and not the tensors'
    assert copies[0].untyped_storage().data_ptr() != room.untyped_storage().data_ptr()


def test_all_that_changed_comes_back():
    room, other = torch.zeros(8), torch.ones(3)
    mirror = devices.Mirror(CPU)
    copy, same = mirror.of(room[2:4]), mirror.of(other)
    copy.fill_(5)
    torch.empty(0).set_(copy.untyped_storage())[7] = 9  # beyond the view
    assert not room.any()
    mirror.bring_back()
    assert room.tolist() == [0, 0, 5, 5, 0, 0, 0, 9]
    assert torch.equal(same, other)


@pytest.mark.parametrize("value", [None, 1, "A", torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta")], ids=str)
def test_what_is_no_dense_tensor_is_handed_on(value):
    assert devices.Mirror(CPU).of(value) is value


def test_a_call_returns_what_the_caller_gave_or_a_copy():
    seen = []

    def forward(self, A, W, *, output=None):
        seen.extend([A, W, output])
        if output is None:
            return A + W
        return output.copy_(A + W)

    call = devices.mirrored_call(forward, CPU)
    A, W, out = torch.ones(3), torch.arange(3.0), torch.empty(4)[1:]
    result = call(None, A, W)
    assert torch.equal(result, A + W)
    assert call(None, A, W=W, output=out) is out
    assert torch.equal(out, A + W)
    assert not {tensor.data_ptr() for tensor in (A, W, out)} & {t.data_ptr() for t in seen if t is not None}


def test_what_is_left_out_exists():
    for place, reason in [*devices.NOT_ON_CARDS.items(), *((place, "time") for place in devices.NOT_EMULATED)]:
        path, _, name = place.partition("::")
        text = (RUN / path).read_text(encoding="utf-8")
        assert not name or re.search(rf"^def {name}\(", text, re.MULTILINE), place
        assert reason
    for path in RUN.glob("test_*.py"):
        if devices.ONLY_ON_CARDS.search(path.name):
            assert path.name not in devices.NOT_ON_CARDS


def test_tests_for_other_cpus_are_left_out():
    assert devices.why_not("test_matmul.py", "test_formats", {"name": "uint4"}) is None
    assert devices.why_not("test_matmul.py", "test_every_format", {"target": "llvm"}) is None
    assert devices.why_not("test_matmul.py", "test_every_format", {"target": "haswell"}) == "is for another CPU"
    assert "threads" in devices.why_not("test_threads_processes.py", "test_fork", {})


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_its_tests_are_skipped():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "cuda",
        str(RUN / "test_splitk.py"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=RUN.parents[2], check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "there is no CUDA device" in done.stdout
    assert re.search(r"^\d+ skipped in", done.stdout, re.MULTILINE)
