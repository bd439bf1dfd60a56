"""How an operator comes by its kernels: loaded from the store, else built into it, else compiled in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import env
from ..artifacts import Artifact, ArtifactStore, artifact_key
from ..build import COMPILER, SOURCES, build_library, compile_plan, find_compiler, toolchain
from ..config import MatmulConfig
from ..locks import ForkLock
from ..logs import get_logger, warn_once
from ..plan import MatmulPlan
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
    artifact : Artifact or None
        Where the library is; None for what was compiled in memory.
    """

    kernels: Kernels
    origin: str
    seconds: float
    source: Path | str
    artifact: Artifact | None = None


def store(root: Path | None = None) -> ArtifactStore:
    """The artifact store in `root`, or the one that BITBLAS_CACHE_DIR names now."""
    root = root or env.CACHE_DIR.get()
    # one atomic step: no lock, which a fork could leave held
    return _stores.get(root) or _stores.setdefault(root, ArtifactStore(root))


#: Finds a saved operator by config and target: its plan, and its kernels. `bitblas.cache` puts itself here when it is loaded.
find_saved: Callable[[MatmulConfig, Target], tuple[MatmulPlan, Provided] | None] | None = None


def plan_key(plan: MatmulPlan) -> str:
    """The artifact key of a plan under the installed toolchain."""
    return artifact_key({**plan.fields(), "toolchain": toolchain()})


def provide(plan: MatmulPlan) -> Provided:
    """Load the plan's kernels, building them first where the store has none.

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
    found = load(plan)
    if found is not None:
        return found
    key, target_store, compiler = plan_key(plan), store(), find_compiler(plan.target)
    if compiler is None:
        return _compile_in_memory(plan, key, began)

    def build(staging: Path) -> Mapping[str, object]:
        get_logger().info("building %s into %s", plan.describe(), target_store.root)
        made = build_library(plan, staging, compiler)
        return {**made, "plan": plan.fields(), "toolchain": toolchain()}

    artifact, built = target_store.get_or_build(key, build)
    return _provided(plan, artifact, "compiled" if built else "loaded", began)


def load(plan: MatmulPlan, root: Path | None = None) -> Provided | None:
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
    return None if artifact is None else _provided(plan, artifact, "loaded", began)


def _provided(plan: MatmulPlan, artifact: Artifact, origin: str, began: float) -> Provided:
    kernels = load_kernels(artifact.library, plan)
    seconds = time.perf_counter() - began
    get_logger().info("%s %s in %.3f s, kept in %s", origin, plan.describe(), seconds, artifact.path)
    return Provided(kernels, origin, seconds, artifact.file(SOURCES[plan.target.kind]), artifact)


def _load_of_any_compiler(plan: MatmulPlan, target_store: ArtifactStore) -> Artifact | None:
    """Where TVM is not installed, the library that some version of it built from the same plan by the same sources."""
    here = toolchain()
    if here[COMPILER]:
        return None
    for entry in target_store.entries():
        built = dict(entry.manifest.get("toolchain", {}), **{COMPILER: here[COMPILER]})
        if built == here and entry.manifest.get("plan") == plan.fields():
            return target_store.load(entry.key)
    return None


def _compile_in_memory(plan: MatmulPlan, key: str, began: float) -> Provided:
    with _compiling.held():
        if key not in _in_memory:
            _in_memory[key] = _compile(plan, began)
        return _in_memory[key]


def _compile(plan: MatmulPlan, began: float) -> Provided:
    warn_once(
        "no C compiler",
        "there is no C compiler (cc, gcc or clang) to link compiled operators with: they are compiled in memory by every "
        "process, and use TVM's threads instead of torch's. Install one, such as Debian's gcc, or name one in BITBLAS_CC.",
    )
    executable, _ = compile_plan(plan)
    kernels = wrap_executable(executable, plan)
    source = executable.mod.inspect_source("ll")
    return Provided(kernels, "in memory", time.perf_counter() - began, source)
