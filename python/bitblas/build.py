"""From a plan to a shared library. TVM is imported when something is built, not when this is imported."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from . import env
from ._version import __version__
from .errors import BuildError
from .logs import progress
from .plan import MatmulPlan
from .sources import source_digest, source_dir
from .target import Target

if TYPE_CHECKING:
    import tvm


#: Files of an artifact.
LIBRARY, SCRIPT, SOURCE = "kernel.so", "schedule.py", "kernel.ll"

#: The distribution that compiles; a machine that only loads artifacts does without.
COMPILER = "apache-tvm"

#: What `compile_plan` goes through.
COMPILE_STEPS = ("loading TVM", "scheduling", "compiling")

_COMPILERS = ("cc", "gcc", "clang")


def find_compiler() -> str | None:
    """Command of the C compiler that links CPU libraries: BITBLAS_CC, else the first of cc, gcc, clang on the PATH; or None.

    Raises
    ------
    BuildError
        BITBLAS_CC names a program that is not there.
    """
    named = env.CC.get()
    if named:
        try:
            words = shlex.split(named)
        except ValueError as error:
            raise BuildError(f"BITBLAS_CC is {named!r}, which is no command: {error}") from None
        if shutil.which(words[0]) is None:
            raise BuildError(f"BITBLAS_CC is {named!r}, and there is no such program")
        return named
    return next((path for name in _COMPILERS if (path := shutil.which(name))), None)


@cache
def toolchain() -> dict[str, str]:
    """Versions of all that turns a plan into bytes, and digests of our own part; known without importing or running any."""
    versions = {"bitblas": __version__, "sources": source_digest(), "generator": _generator_digest()}
    for name in (COMPILER, "apache-tvm-ffi"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = ""
    return versions


def _generator_digest() -> str:
    """Digest of the modules that write kernels, so that a change to one of them never meets an older artifact."""
    package = Path(__file__).parent
    names = ("formats", "machines", "target", "config", "layout", "transform", "plan", "lowering", "build")
    modules = [package / f"{name}.py" for name in names]
    modules += [path for room in ("expr", "schedule") for path in sorted((package / room).rglob("*.py"))]
    digest = hashlib.sha256()
    for path in modules:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def expression_module(plan: MatmulPlan) -> tvm.IRModule:
    """The plan's kernels as unscheduled functions, each described for the schedule pass."""
    import tvm

    from .transform import described_func

    functions = {
        kernel.name: described_func(plan.problem(kernel), kernel.rule, kernel.tiling, kernel.name)
        for kernel in plan.kernels
    }
    return tvm.IRModule(functions)


def scheduled_module(plan: MatmulPlan) -> tvm.IRModule:
    """The plan's kernels, scheduled."""
    from .schedule import RULES
    from .transform import ApplyDefaultSchedule

    schedule: tvm.transform.Pass = ApplyDefaultSchedule(RULES, plan.target)
    return schedule(expression_module(plan))


def compile_plan(
    plan: MatmulPlan, step: Callable[[str], None] = lambda name: None
) -> tuple[tvm.runtime.Executable, str]:
    """Compile in this process.

    Parameters
    ----------
    plan : MatmulPlan
        What to compile.
    step : callable
        Told the name of each step of `COMPILE_STEPS` as it begins.

    Returns
    -------
    (tvm.runtime.Executable, str)
        The executable, and the scheduled module as a script.

    Raises
    ------
    BuildError
        TVM is not installed, or fails.
    """
    step("loading TVM")
    try:
        import tvm  # noqa: F401 - to find out whether it can be
    except ImportError as error:
        raise BuildError(
            f"compiling an operator needs TVM, which cannot be imported ({error}); install it with: "
            "pip install 'apache-tvm>=0.27,<0.28' 'apache-tvm-ffi>=0.1.14.post0,<0.1.15'"
        ) from error
    try:
        step("scheduling")
        mod = scheduled_module(plan)
        step("compiling")
        return compile_module(mod, plan.target), mod.script()
    except (RuntimeError, ValueError, TypeError) as error:  # what TVM's own errors derive from
        raise BuildError(f"TVM could not compile {plan.config} for {plan.target}", output=str(error)) from error


def compile_module(mod: tvm.IRModule, target: Target) -> tvm.runtime.Executable:
    """Compile scheduled functions in this process; TVM's own errors pass."""
    import tvm

    from .lowering import PIPELINE

    # operators check what users hand over; a second check of each tensor would cost as much as the launch
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        return tvm.compile(mod, target=target.as_tvm(), tir_pipeline=PIPELINE)


def build_library(plan: MatmulPlan, directory: Path, compiler: str) -> None:
    """Compile `plan` and write its library, its source and its scheduled script into `directory`.

    Raises
    ------
    BuildError
        TVM or the C compiler failed; with the command and its output.
    """
    with progress(f"building {plan.describe()}", len(COMPILE_STEPS) + 1) as step:
        executable, script = compile_plan(plan, step)
        step("linking")
        _write(executable, script, directory, compiler)


def _write(executable: tvm.runtime.Executable, script: str, directory: Path, compiler: str) -> None:
    (directory / SCRIPT).write_text(script)
    (directory / SOURCE).write_text(executable.mod.inspect_source("ll"))
    executable.export_library(str(directory / LIBRARY), fcompile=_linker(compiler))


def _linker(compiler: str) -> Callable[..., None]:
    def link(output: str, objects: list[str], **_options: object) -> None:
        shim = source_dir() / "cpu" / "parallel.c"
        command = [
            *shlex.split(compiler),
            "-shared",
            "-fPIC",
            "-O2",
            "-fopenmp",
            "-o",
            output,
            *objects,
            str(shim),
            "-lm",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError("the C compiler could not link an operator", " ".join(command), done.stdout + done.stderr)

    return link
