"""How an operator comes by its kernels: loaded from the store, else built into it, else compiled in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .. import env
from ..artifacts import Artifact, ArtifactStore, artifact_key
from ..artifacts.survey import toolchains
from ..build import COMPILER, SOURCES, build_library, compile_plan, find_compiler, is_usable, toolchain
from ..config import Config
from ..errors import BuildError
from ..locks import ForkLock
from ..logs import get_logger, warn_once
from ..plan import AnyPlan, KernelPlan
from ..runtime import Kernels, load_kernels, wrap_executable
from ..target import Target

#: What was compiled without a linker, by key.
_in_memory: dict[str, Provided] = {}
_compiling = ForkLock()
_stores: dict[Path, ArtifactStore] = {}


@dataclass(frozen=True)
class Provided:
    """Kernels, and where they came from.

    Attributes
    ----------
    kernels : Kernels
        Ready to be called.
    origin : str
        ``"loaded"``, ``"compiled"`` (and stored), or ``"in memory"``.
    seconds : float
        How long it took.
    source : Path or str
        The generated code: a file of the artifact, or its text.
    plan : AnyPlan
        What they were built from.
    artifact : Artifact or None
        Where the library is; None for what was compiled in memory.
    """

    kernels: Kernels
    origin: str
    seconds: float
    source: Path | str
    plan: AnyPlan
    artifact: Artifact | None = None


def store(root: Path | None = None) -> ArtifactStore:
    """The artifact store in `root`, or the one that BITBLAS_CACHE_DIR names now."""
    root = root or env.CACHE_DIR.get()
    # one atomic step: no lock, which a fork could leave held
    return _stores.get(root) or _stores.setdefault(root, ArtifactStore(root))


#: Finds a saved operator by config and target: its kernels. `bitblas.cache` puts itself here when it is loaded.
find_saved: Callable[[Config, Target], Provided | None] | None = None


def plan_key(plan: AnyPlan) -> str:
    """The artifact key of a plan under the installed toolchain."""
    return artifact_key({**plan.fields(), "toolchain": toolchain()})


def provide(plan: AnyPlan) -> Provided:
    """Load the plan's kernels, building them first where the store has none.

    Where TVM is not installed, kernels with other tilings serve that were built from the same config for the same target and
    layout: they compute the same. `Provided.plan` is theirs then.

    Raises
    ------
    BuildError
        TVM is missing where something has to be compiled, or a compiler failed.
    ArtifactError
        Others may write the store.
    UnsupportedError
        This machine cannot run code for the plan's target.
    """
    began = time.perf_counter()
    found = load(plan) or _load_other_tilings(plan, began)
    if found is not None:
        return found
    compiler = find_compiler(plan.target)
    if compiler is None:
        return _compile_in_memory(plan, plan_key(plan), began)
    artifact, built = _get_or_build(plan, compiler)
    return _provided(plan, artifact, "compiled" if built else "loaded", began)


def build(plan: AnyPlan) -> Artifact:
    """The plan's artifact in the store, built where it is missing; for any target, since nothing is loaded.

    Raises
    ------
    BuildError
        TVM or a compiler is missing where something has to be built, or a compiler failed.
    ArtifactError
        Others may write the store.
    """
    place = store()
    found = place.load(plan_key(plan)) or _load_of_any_compiler(plan, place)
    if found is not None:
        return found
    compiler = find_compiler(plan.target)
    if compiler is None:
        raise BuildError(f"there is no C compiler (cc, gcc or clang) to build {plan.describe()} with")
    return _get_or_build(plan, compiler)[0]


def _get_or_build(plan: AnyPlan, compiler: str) -> tuple[Artifact, bool]:
    target_store = store()

    def fill(staging: Path) -> Mapping[str, object]:
        get_logger().info("building %s into %s", plan.describe(), target_store.root)
        made = build_library(plan, staging, compiler)
        return {**made, "plan": plan.fields(), "toolchain": toolchain()}

    return target_store.get_or_build(plan_key(plan), fill)


def load(plan: AnyPlan, root: Path | None = None) -> Provided | None:
    """Load the plan's kernels from the store in `root`, or BITBLAS_CACHE_DIR's; None where there are none. Builds nothing.

    Raises
    ------
    ArtifactError
        Others may write the store.
    UnsupportedError
        This machine cannot run code for the plan's target.
    """
    began = time.perf_counter()
    plan.target.check_runnable()
    place = store(root)
    artifact = place.load(plan_key(plan)) or _load_of_any_compiler(plan, place)
    return None if artifact is None else _provided_unless_removed(plan, artifact, began)


def _provided_unless_removed(plan: AnyPlan, artifact: Artifact, began: float) -> Provided | None:
    """What was verified may be removed before it is loaded, by `bitblas cache prune` for example: None then."""
    try:
        return _provided(plan, artifact, "loaded", began)
    except (OSError, RuntimeError):  # which is what tvm_ffi raises
        if artifact.library.exists():
            raise
        return None


def _provided(plan: AnyPlan, artifact: Artifact, origin: str, began: float) -> Provided:
    kernels = load_kernels(artifact.library, plan)
    seconds = time.perf_counter() - began
    get_logger().info("%s %s in %.3f s, kept in %s", origin, plan.describe(), seconds, artifact.path)
    return Provided(kernels, origin, seconds, artifact.file(SOURCES[plan.target.kind]), plan, artifact)


def _load_of_any_compiler(plan: AnyPlan, target_store: ArtifactStore) -> Artifact | None:
    """Where TVM is not installed, the library that some version of it built from the same plan by the same sources."""
    if toolchain()[COMPILER]:
        return None
    made = filter(is_usable, toolchains(target_store))
    keys = (artifact_key({**plan.fields(), "toolchain": versions}) for versions in made)
    return next(filter(None, map(target_store.load, keys)), None)


def _load_other_tilings(plan: AnyPlan, began: float) -> Provided | None:
    """Where TVM is not installed: the same with the tilings of a record, or of a card, that is not here."""
    if toolchain()[COMPILER]:
        return None
    place, wanted = store(), plan.fields()
    for entry in place.entries():
        made = entry.manifest.get("plan", {})
        if is_usable(entry.manifest.get("toolchain", {})) and all(
            made.get(name) == value for name, value in wanted.items() if name != "kernels"
        ):
            kernels = tuple(KernelPlan.read(values) for values in made["kernels"])
            artifact = place.load(entry.key)
            if artifact is not None:
                return _provided_unless_removed(replace(plan, kernels=kernels), artifact, began)
    return None


def _compile_in_memory(plan: AnyPlan, key: str, began: float) -> Provided:
    with _compiling.held():
        if key not in _in_memory:
            _in_memory[key] = _compile(plan, began)
        return _in_memory[key]


def _compile(plan: AnyPlan, began: float) -> Provided:
    warn_once(
        "no C compiler",
        "there is no C compiler (cc, gcc or clang) to link compiled operators with: they are compiled in memory by every "
        "process, and use TVM's threads instead of torch's. Install one, such as Debian's gcc, or name one in BITBLAS_CC.",
    )
    executable, _ = compile_plan(plan)
    kernels = wrap_executable(executable, plan)
    source = executable.mod.inspect_source("ll")
    return Provided(kernels, "in memory", time.perf_counter() - began, source, plan)
