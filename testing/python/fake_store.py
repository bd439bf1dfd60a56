"""Operators in a store that no compiler made: as `provider` writes them, with made-up libraries."""

import dataclasses

from bitblas import FlashAttenConfig, MatmulConfig, tuner
from bitblas.artifacts import ArtifactStore
from bitblas.build import LIBRARY, toolchain
from bitblas.ops.provider import plan_key
from bitblas.plan import make_plan
from bitblas.schedule import RULES
from bitblas.target import resolve_target

TARGET = resolve_target("x86-64-v3")
OTHER_TARGET = resolve_target("x86-64-v4")


def config(N=64, **options):
    """A small operator; N tells them apart."""
    return MatmulConfig(**{"M": [1, 16], "N": N, "K": 64, "W_dtype": "uint4", **options})


def attention(**options):
    """An attention; its kernels are for any number of heads."""
    return FlashAttenConfig(**{"heads": 8, "dim": 64, **options})


def files(key):
    """The files of an operator."""
    return {LIBRARY: bytes.fromhex(key) * 40, "kernel.ll": b"; " + key.encode(), "schedule.py": b"# none"}


def put(root, cfg=None, target=TARGET, tuned=None, **versions):
    """Put an operator into the store in `root`, made by the versions that are here, or others; return its artifact."""
    plan = make_plan(cfg or config(), target, tuned)
    made = {**toolchain(), **versions}
    key = plan_key(plan) if not versions else _key_of(plan, made)

    def fill(staging):
        for name, content in files(key).items():
            (staging / name).write_bytes(content)
        (staging / LIBRARY).chmod(0o755)
        return {"library": LIBRARY, "linker": "none", "plan": plan.fields(), "toolchain": made}

    return ArtifactStore(root).get_or_build(key, fill)[0]


def _key_of(plan, made):
    from bitblas.artifacts import artifact_key

    return artifact_key({**plan.fields(), "toolchain": made})


def other_tilings(cfg, target=TARGET):
    """Tilings that are offered beside the defaults, by bucket."""
    plan = make_plan(cfg, target)
    found = {}
    for kernel in plan.kernels:
        (rule,) = [rule for rule in RULES if rule.name == kernel.rule]
        for m in kernel.buckets:
            offered = rule.tilings(plan.problem_of(m))
            found[m] = next(tiling for tiling in offered if tiling != kernel.tiling)
    return found


def tune(cfg, target=TARGET):
    """A tuning record in the store that BITBLAS_CACHE_DIR names, with other tilings than the defaults; returns these."""
    tilings = other_tilings(cfg, target)
    rows = {m: tuner.TunedBucket(tiling, ((tiling, 1e-6),), tiling) for m, tiling in tilings.items()}
    tuner.save_record(cfg, target, rows)
    return tilings


def without_tvm(patch):
    """Be a machine where TVM is not installed."""
    from bitblas import build, cache
    from bitblas.cache import bundle, database, importing, inventory
    from bitblas.ops import provider
    from bitblas.tuner import record

    found = {**toolchain(), build.COMPILER: ""}
    for module in (build, provider, record, database, bundle, importing, inventory, cache):
        if hasattr(module, "toolchain"):
            patch.setattr(module, "toolchain", lambda: found)


def with_other_card(target):
    """A target for cards, for one of the same capability that has other numbers."""
    return dataclasses.replace(target, card=dataclasses.replace(target.card, num_sms=7, memory_gbs=100))
