"""Layers for tests: each holds the weight of a problem of `reference`."""

import copy
import io
import pickle

import torch

import bitblas
import reference
from bitblas import MatmulConfig

#: What most tests are about: groups, packed zero points, a bias.
USUAL = {
    "A_dtype": "float32", "W_dtype": "uint4", "out_dtype": "float32", "accum_dtype": "float32", "group_size": 16,
    "with_scaling": True, "with_zeros": True, "zeros_mode": "quantized", "with_bias": True,
}  # fmt: skip


def config(N=32, K=64, M=(1,), **fields):
    """The usual config, or another."""
    return MatmulConfig(**{**USUAL, "M": M, "N": N, "K": K, **fields})


def build(cfg, **options):
    """A layer without its weight."""
    names = (*USUAL.keys() - {"with_bias"}, "dynamic_quantization")
    return bitblas.Linear(
        cfg.K,
        cfg.N,
        cfg.with_bias,
        **{name: getattr(cfg, name) for name in names},
        opt_M=cfg.M,
        **options,
    )


def fill(layer, problem):
    """The layer, with the weight of a problem."""
    layer.load_and_transform_weight(problem.weights, problem.scale, problem.zeros, problem.bias)
    return layer


def layer_and_problem(m=3, seed=0, exact=False, cfg=None, bias_dtype=None, **fields):
    """A layer that holds the weight of a problem, and the problem."""
    cfg = cfg or config(**fields)
    problem = reference.draw(cfg, m, seed=seed, exact=exact, bias_dtype=bias_dtype)
    return fill(build(cfg), problem), problem


def ran(layer, problem):
    """What the layer makes of the problem's activations, without a gradient."""
    with torch.no_grad():
        return layer(problem.A)


def saved(layer):
    """A module after `torch.save` and `torch.load`."""
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


#: How a module may be copied.
COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "save": saved,
}
