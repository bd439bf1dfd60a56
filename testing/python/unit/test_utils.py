"""The target detector answers everywhere, and `import bitblas` reaches the doors without loading them."""

import sys

import pytest
import torch

import bitblas
from bitblas import utils
from bitblas.target import resolve_target
from bitblas.utils import target_detector
from scripts import report


def pretend(monkeypatch, *, cuda="12.8", available=True, count=1, capability=(9, 0)):
    """Let torch see devices that are not there."""

    def tell(device):
        if isinstance(capability, Exception):
            raise capability
        return capability

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", tell)


def test_it_has_three_names():
    assert bitblas.auto_detect_nvidia_target is utils.auto_detect_nvidia_target
    assert bitblas.utils.auto_detect_nvidia_target is target_detector.auto_detect_nvidia_target


@pytest.mark.parametrize(
    ("devices", "gpu", "target"),
    [
        ({}, 0, "cuda -arch=sm_90"),
        ({"capability": (12, 0), "count": 2}, 1, "cuda -arch=sm_120"),
        ({"capability": (8, 6)}, 0, "cuda -arch=sm_86"),
        ({"available": False}, 0, "llvm"),
        ({"cuda": None}, 0, "llvm"),  # such as torch for ROCm, whose devices answer to torch.cuda
        ({}, 1, "llvm"),
        ({}, -1, "llvm"),
        ({}, None, "llvm"),
        ({"capability": RuntimeError("Cannot re-initialize CUDA in forked subprocess")}, 0, "llvm"),
    ],
)
def test_detection(monkeypatch, devices, gpu, target):
    pretend(monkeypatch, **devices)
    assert bitblas.auto_detect_nvidia_target(gpu) == target


def test_detection_never_raises(monkeypatch):
    def broken():
        raise RuntimeError("the driver is older than the library")

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert bitblas.auto_detect_nvidia_target(gpu_id=0) == "llvm"


def test_what_is_detected_here_is_a_target(monkeypatch):
    pretend(monkeypatch, available=False)
    assert resolve_target(bitblas.auto_detect_nvidia_target()).kind == "llvm"


def test_all_targets_are_targets():
    assert "nvidia/nvidia-a100" in utils.get_all_nvidia_targets()
    assert {resolve_target(name).kind for name in utils.get_all_nvidia_targets()} == {"cuda"}


def test_doors_are_attributes_and_import_no_tvm():
    script = (
        "import json, sys, torch, bitblas\n"
        "before = 'bitblas.cache' in sys.modules\n"
        "report = [before, bitblas.cache.global_operator_cache.size(), bitblas.utils.target_detector.__name__,\n"
        "          bitblas.ops.Matmul is bitblas.Matmul, 'tvm' in sys.modules, torch.cuda.is_initialized()]\n"
        "print(json.dumps(report))"
    )
    found, warnings = report(script)
    assert found == [False, 0, "bitblas.utils.target_detector", True, False, False]
    assert warnings == []


def test_an_unknown_attribute_is_an_error():
    with pytest.raises(AttributeError, match="no_such_thing"):
        bitblas.no_such_thing  # noqa: B018
    assert "bitblas.no_such_thing" not in sys.modules
