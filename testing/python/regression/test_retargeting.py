"""Tuning for a target of another weight layout misread weights, and timing failed where the default device was meta."""

import pytest
import torch

from bitblas import ArgumentError, Matmul, MatmulConfig
from bitblas.plan import native_layout
from bitblas.target import resolve_target


def test_a_target_of_another_layout_is_refused(store):
    config = MatmulConfig(1, 32, 64, "int8", "int4", "int32", "int32")
    op = Matmul(config, from_database=True)
    other = resolve_target("x86-64-v2")
    if op.layout == native_layout(config, other):
        pytest.skip("this CPU reads the layout of x86-64-v2")
    with pytest.raises(ArgumentError, match="in the layout 'lanes'; those of this operator lie in 'dots'"):
        op.hardware_aware_finetune(topk=1, target="x86-64-v2")
    assert op.target == resolve_target()


def test_timing_where_the_default_device_is_meta(store):
    with torch.device("meta"):
        op = Matmul(MatmulConfig(1, 32, 64, "float16", "uint4", with_scaling=True, with_zeros=True))
        assert op.profile_latency() > 0
        assert op.hardware_aware_finetune(topk=1)
