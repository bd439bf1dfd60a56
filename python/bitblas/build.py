"""From a plan to a shared library. TVM is imported when something is built, not when this is imported."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from . import env
from ._version import __version__
from .cuda.compile import Compiled, find_cuda_compiler, write_cuda
from .errors import BuildError
from .logs import progress
from .plan import AnyPlan
from .sources import source_digest, source_dir
from .target import Target

if TYPE_CHECKING:
    import tvm


#: Files of an artifact: its library, the scheduled module, and the generated code by kind of target.
LIBRARY, SCRIPT = "kernel.so", "schedule.py"
SOURCES = {"llvm": "kernel.ll", "cuda": "kernel.cu"}

#: The distribution that compiles; a machine that only loads artifacts does without.
COMPILER = "apache-tvm"

#: What `compile_plan` goes through.
COMPILE_STEPS = ("loading TVM", "scheduling", "compiling")

_COMPILERS = ("cc", "gcc", "clang")


def find_compiler(target: Target | None = None) -> str | None:
    """What makes libraries for a target, a CPU where none is given.

    Returns
    -------
    str or None
        The command of the C compiler that links CPU libraries: BITBLAS_CC, else the first of cc, gcc, clang on the PATH, else
        None. For CUDA the command of nvcc (`cuda.nvcc.find_nvcc`), else the path of the library of NVRTC.

    Raises
    ------
    BuildError
        BITBLAS_CC or BITBLAS_NVCC names a program that is not there, or nothing compiles CUDA.
    """
    if target is not None and target.kind == "cuda":
        return find_cuda_compiler()
    if named := env.CC.command():
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


def is_usable(made: Mapping[str, str]) -> bool:
    """Whether what one toolchain made serves where this one is: the same, but any TVM's where none is installed."""
    here = toolchain()
    return dict(made) == here if here[COMPILER] else {**made, COMPILER: ""} == here


def differences(made: Mapping[str, str]) -> str:
    """What makes a toolchain another than ours, in words."""
    here = toolchain()
    ignored = {"sources", "generator"} | (set() if here[COMPILER] else {COMPILER})
    versions = [
        f"{name} {made.get(name) or 'missing'}, here {value or 'missing'}"
        for name, value in here.items()
        if made.get(name) != value and name not in ignored
    ]
    return ", ".join(versions) or "other kernel sources"


def _generator_digest() -> str:
    """Digest of the modules that write kernels, so that a change to one of them never meets an older artifact."""
    package = Path(__file__).parent
    names = ("formats", "machines", "target", "layout", "transform", "plan", "lowering", "build")
    modules = [package / f"{name}.py" for name in names]
    modules += [
        path for room in ("config", "expr", "schedule", "cuda") for path in sorted((package / room).rglob("*.py"))
    ]
    digest = hashlib.sha256()
    for path in modules:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def expression_module(plan: AnyPlan) -> tvm.IRModule:
    """The plan's kernels as unscheduled functions, each described for the schedule pass."""
    import tvm

    from .transform import described_func

    functions = {
        kernel.name: described_func(plan.problem(kernel), kernel.rule, kernel.tiling, kernel.name)
        for kernel in plan.kernels
    }
    return tvm.IRModule(functions)


def scheduled_module(plan: AnyPlan) -> tvm.IRModule:
    """The plan's kernels, scheduled."""
    from .schedule import RULES
    from .transform import ApplyDefaultSchedule

    schedule: tvm.transform.Pass = ApplyDefaultSchedule(RULES, plan.target)
    return schedule(expression_module(plan))


def compile_plan(plan: AnyPlan, step: Callable[[str], None] = lambda name: None) -> tuple[tvm.runtime.Executable, str]:
    """Compile in this process.

    Parameters
    ----------
    plan : AnyPlan
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
    _check_tvm()
    try:
        step("scheduling")
        mod = scheduled_module(plan)
        step("compiling")
        return compile_module(mod, plan.target), mod.script()
    except (RuntimeError, ValueError, TypeError) as error:  # what TVM's own errors derive from
        raise BuildError(f"TVM could not compile {plan.config} for {plan.target}", output=str(error)) from error


def _check_tvm() -> None:
    try:
        import tvm  # noqa: F401 - to find out whether it can be
    except ImportError as error:
        raise BuildError(
            f"compiling an operator needs TVM, which cannot be imported ({error}); install it with: "
            "pip install 'apache-tvm>=0.27,<0.28' 'apache-tvm-ffi>=0.1.14.post0,<0.1.15'"
        ) from error


def compile_module(mod: tvm.IRModule, target: Target) -> tvm.runtime.Executable:
    """Compile scheduled functions in this process; TVM's own errors pass."""
    import tvm

    from .lowering import PIPELINE

    # operators check what users hand over; a second check of each tensor would cost as much as the launch
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        return tvm.compile(mod, target=target.as_tvm(), tir_pipeline=PIPELINE)


def compile_module_for_card(mod: tvm.IRModule, target: Target) -> Compiled:
    """`compile_module` for a card, with what the text does not tell a program: how kernels are launched."""
    from .lowering import keep_host_functions

    with keep_host_functions() as hosts:
        executable = compile_module(mod, target)
    return Compiled(executable.mod, hosts[-1], target.arch)


def build_library(plan: AnyPlan, directory: Path, compiler: str) -> dict[str, object]:
    """Compile `plan` and write its library, its source and its scheduled script into `directory`.

    Parameters
    ----------
    plan : AnyPlan
        What to compile.
    directory : Path
        Where to.
    compiler : str
        What `find_compiler` gave for the plan's target.

    Returns
    -------
    dict
        For the manifest, as JSON values: ``"library"``, the name of the library among the files, and what made it.

    Raises
    ------
    BuildError
        TVM or the compiler failed; with the command and its output.
    UnsupportedError
        nvcc is too new for the card.
    """
    with progress(f"building {plan.describe()}", len(COMPILE_STEPS) + 1) as step:
        if plan.target.kind == "cuda":
            return _build_cuda(plan, directory, compiler, step)
        executable, script = compile_plan(plan, step)
        (directory / SCRIPT).write_text(script)
        step("linking")
        (directory / SOURCES["llvm"]).write_text(executable.mod.inspect_source("ll"))
        executable.export_library(str(directory / LIBRARY), fcompile=_linker(compiler))
        return {"library": LIBRARY, "linker": compiler}


def _build_cuda(plan: AnyPlan, directory: Path, compiler: str, step: Callable[[str], None]) -> dict[str, object]:
    compiled, script = compile_cuda(plan, step)
    (directory / SCRIPT).write_text(script)
    step("linking")
    return write_cuda(compiled, directory / SOURCES["cuda"], directory / LIBRARY, compiler)


def compile_cuda(plan: AnyPlan, step: Callable[[str], None] = lambda name: None) -> tuple[Compiled, str]:
    """`compile_plan` for a card, with what the text does not tell a program: how kernels are launched."""
    step("loading TVM")
    _check_tvm()
    from .lowering import keep_host_functions

    with keep_host_functions() as hosts:
        executable, script = compile_plan(plan, lambda name: None if name == "loading TVM" else step(name))
    return Compiled(executable.mod, hosts[-1], plan.target.arch), script


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
