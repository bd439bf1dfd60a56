"""Other libraries' ways to compute a matmul with low-bit weights; one that is missing or cannot says so."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bitblas.bench import Peer, torch_dense, torch_int_mm

from .ggml_peers import NAME as GGML
from .ggml_peers import ggml
from .onnxruntime_peers import NAME as ORT
from .onnxruntime_peers import matmul_nbits
from .openvino_peers import BF16, DYNAMIC, EXACT, compressed_matmul
from .torch_peers import INT4PACK, int4pack

#: k of the activations that share a scale where OpenVINO quantizes them.
OPENVINO_GROUP = 128

#: Every peer, in the order of the tables. `torch float32` is what all are compared with.
PEERS: dict[str, Peer] = {
    "torch float32": torch_dense(torch.float32),
    "torch float16": torch_dense(torch.float16),
    "torch bfloat16": torch_dense(torch.bfloat16),
    INT4PACK: int4pack,
    "torch _int_mm": torch_int_mm,
    ORT.format(0): matmul_nbits(0),
    EXACT: compressed_matmul(EXACT),
    BF16: compressed_matmul(BF16, precision="bf16"),
    ORT.format(4): matmul_nbits(4),
    DYNAMIC.format(OPENVINO_GROUP): compressed_matmul(DYNAMIC.format(OPENVINO_GROUP), dynamic_group=OPENVINO_GROUP),
    **{GGML.format(kind): ggml(kind) for kind in ("Q4_0", "Q4_1", "Q8_0", "TQ2_0")},
}


def select(names: Callable[[str], bool] = lambda name: True) -> dict[str, Peer]:
    """The peers whose name passes."""
    return {name: peer for name, peer in PEERS.items() if names(name)}
