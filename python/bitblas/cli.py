"""The `bitblas` command."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from . import env
from ._version import __version__
from .artifacts import ArtifactStore
from .build import find_compiler
from .config import A_DTYPES, OUT_DTYPES, ZEROS_MODES, MatmulConfig
from .errors import BitBLASError, ConfigError
from .formats import FORMATS, parse_format
from .target import host_features, resolve_target

if TYPE_CHECKING:
    from .bench import Comparison, Machine

#: What an installation consists of, with the command that gets it; only the versions of the ffi matter to the letter.
_PACKAGES = {
    "torch": "pip install torch",
    "apache-tvm": "pip install 'apache-tvm>=0.27,<0.28'; needed to compile operators, not to load compiled ones",
    "apache-tvm-ffi": "pip install 'apache-tvm-ffi>=0.1.14.post0,<0.1.15'",
    "numpy": "pip install numpy",
}
_VERSIONS = {"apache-tvm": "0.27.", "apache-tvm-ffi": "0.1.14."}
_GET_COMPILER = (
    "install one, such as Debian's gcc (apt install gcc), or name one in BITBLAS_CC; without it operators are compiled "
    "in memory by every process, and nothing is cached"
)
_PROBE = "#include <omp.h>\nint bitblas_probe(void) { return omp_get_max_threads(); }\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 2 where it was asked for something impossible, 130 when interrupted."""
    options = _parser().parse_args(argv)
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status
    except BitBLASError as error:
        print(f"bitblas: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `bitblas info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bitblas", description="Mixed-precision matrix multiplication for PyTorch.")
    parser.add_argument("--version", action="version", version=f"bitblas {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="what this installation is, what it can do, and what is missing")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)
    bench = commands.add_parser("bench", help="time an operator beside torch's dense matmul")
    bench.add_argument("--M", type=_positive, nargs="+", default=[1, 16, 128], metavar="M", help="rows (1 16 128)")
    bench.add_argument("--N", type=_positive, default=4096, help="output features (4096)")
    bench.add_argument("--K", type=_positive, default=4096, help="input features (4096)")
    bench.add_argument("--A-dtype", default="float16", help=f"{', '.join(A_DTYPES)} (float16)")
    bench.add_argument("--W-dtype", default="uint4", help=f"{', '.join(FORMATS)} (uint4)")
    bench.add_argument(
        "--out-dtype",
        help=f"{', '.join(OUT_DTYPES)} (A's; for an A of 8 bits and less int32 without scales, else float32)",
    )
    bench.add_argument("--group-size", type=int, help="k that share a scale (128 where it divides K, else -1: all)")
    bench.add_argument("--zeros", choices=("none", *ZEROS_MODES), default="none", help="kind of zero points (none)")
    bench.add_argument("--no-scale", action="store_true", help="without scales")
    bench.add_argument("--threads", type=_positive, help="threads (torch's number)")
    bench.add_argument("--target", help="what to compile for (BITBLAS_TARGET, else this machine)")
    bench.add_argument("--seconds", type=_seconds, default=0.5, help="time for each candidate (0.5)")
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.set_defaults(run=_bench)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: it must be at least 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: it must be between 0 and 3600")
    return value


# -- info ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """A line of `bitblas info`.

    Attributes
    ----------
    section, name, value : str
        What it is about, and what there is.
    hint : str
        What is wrong and how to mend it; empty where nothing is.
    """

    section: str
    name: str
    value: str
    hint: str = ""


def _info(options: argparse.Namespace) -> int:
    facts = [fact for part in (_versions, _target, _toolchain, _cache, _settings) for fact in _guarded(part)]
    if options.json:
        print(json.dumps([asdict(fact) for fact in facts], indent=1))
        return 0
    width = max(len(fact.name) for fact in facts)
    section = None
    for fact in facts:
        if fact.section != section:
            print(f"{'' if section is None else chr(10)}{fact.section}")
            section = fact.section
        print(f"  {fact.name:{width}}  {fact.value}")
        if fact.hint:
            print(f"  {'':{width}}  -> {fact.hint}")
    return 0


def _guarded(part: Callable[[], Iterator[Fact]]) -> Iterator[Fact]:
    """Run a part of the report to its first error, which becomes a line: a report on a broken installation must not fail."""
    try:
        yield from part()
    except Exception as error:  # noqa: BLE001 - whatever is broken here is what the user wants to know
        yield Fact(
            part.__name__.strip("_"), "error", f"{type(error).__name__}: {error}", "this part could not be examined"
        )


def _versions() -> Iterator[Fact]:
    yield Fact("versions", "bitblas", f"{__version__} ({Path(__file__).parent})")
    yield Fact("versions", "python", f"{platform.python_version()} ({sys.executable})")
    for name, command in _PACKAGES.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Fact("versions", name, "missing", command)
            continue
        wanted = _VERSIONS.get(name, "")
        hint = "" if version.startswith(wanted) else f"bitblas works with {wanted}*: {command}"
        yield Fact("versions", name, version, hint)


@contextmanager
def _without_tvm() -> Iterator[None]:
    """Let `import tvm` fail inside of a `with` block, unless that has happened already: it takes seconds."""
    name = "tvm"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def _target() -> Iterator[Fact]:
    import torch

    try:
        with _without_tvm():
            target = resolve_target(None)
            features = target.features
        yield Fact("target", "target", str(target))
        yield Fact("target", "instruction sets", target.isa)
        missing = features - host_features()
        lacks = f"this machine cannot run it: it lacks {', '.join(sorted(missing))}" if missing else ""
        yield Fact("target", "features", ", ".join(sorted(features)) or "none", lacks)
    except BitBLASError as error:
        hint = "set BITBLAS_TARGET to one that is allowed, or unset it" if env.TARGET.text() else ""
        yield Fact("target", "target", f"none: {error}", hint)
    except ImportError:
        yield Fact("target", "target", f"{env.TARGET.text()}, a CPU that only LLVM knows: looked up when TVM is loaded")
    yield Fact("target", "threads", f"{torch.get_num_threads()} of {os.cpu_count()} CPUs (torch.set_num_threads)")
    # asked of torch's build, not of the device: this looks at no GPU
    cuda = torch.version.cuda
    yield Fact("target", "cuda", f"torch is built for CUDA {cuda}; bitblas has no CUDA kernels yet" if cuda else "none")


def _toolchain() -> Iterator[Fact]:
    try:
        compiler = find_compiler()
    except BitBLASError as error:
        yield Fact("toolchain", "C compiler", f"none: {error}", "correct BITBLAS_CC, or unset it")
        return
    if compiler is None:
        yield Fact("toolchain", "C compiler", "none", _GET_COMPILER)
        return
    yield Fact("toolchain", "C compiler", compiler)
    problem = _try_link(compiler)
    if problem:
        hint = "operators cannot be linked: install its libraries, such as Debian's gcc and libc6-dev with libgomp"
        yield Fact("toolchain", "links OpenMP", f"no: {problem}", hint)
    else:
        yield Fact("toolchain", "links OpenMP", "yes")


def _try_link(compiler: str) -> str:
    """Link a small library as an operator is linked; return what went wrong, in one line, or nothing."""
    with tempfile.TemporaryDirectory(prefix="bitblas-info-") as name:
        source, library = Path(name) / "probe.c", Path(name) / "probe.so"
        source.write_text(_PROBE)
        command = [compiler, "-shared", "-fPIC", "-fopenmp", "-o", str(library), str(source)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode == 0:
            return ""
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return next(
            (line for line in lines if "error" in line.lower()), lines[0] if lines else f"exit {done.returncode}"
        )


def _cache() -> Iterator[Fact]:
    try:
        root = env.CACHE_DIR.get()
    except ConfigError as error:
        yield Fact("cache", "directory", f"none: {error}", "set BITBLAS_CACHE_DIR to a directory of your own")
        return
    store = ArtifactStore(root)
    yield Fact("cache", "directory", str(root))
    other = "or set BITBLAS_CACHE_DIR to a directory of your own"
    try:
        entries = len(store.entries())
        yield Fact("cache", "operators", f"{entries}, {store.size() / 1e6:.1f} MB")
    except (BitBLASError, OSError) as error:
        yield Fact("cache", "usable", f"no: {error}", "mend that, " + other)
        return
    problem = _unwritable(root)
    hint = f"operators are compiled again by every process: mend that, {other}" if problem else ""
    yield Fact("cache", "usable", f"only to read: {problem}" if problem else "yes", hint)


def _unwritable(root: Path) -> str:
    """Why nothing can be kept in a directory, which need not exist yet; empty where it can."""
    place = root
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return f"{place} is no directory"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} cannot be written"
    status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize
    if status.f_flag & getattr(os, "ST_NOEXEC", 0):
        return f"{place} is mounted noexec: no library can be loaded from it"
    return f"{free / 1e6:.1f} MB are free in {place}" if free < 16 << 20 else ""


def _settings() -> Iterator[Fact]:
    by_name = {variable.name: variable for variable in env.VARIABLES}
    for row in env.settings():
        hint = ""
        try:
            by_name[row.name].get()
        except ConfigError as error:
            hint = str(error)
        default = " (default)" if row.is_default else ""
        yield Fact("environment", row.name, f"{row.value or 'unset'}{default if row.value else ''}: {row.doc}", hint)


# -- bench -----------------------------------------------------------------------------------------------------------------


def _bench_config(options: argparse.Namespace) -> MatmulConfig:
    a_dtype, fmt = options.A_dtype, parse_format(options.W_dtype)
    scaling = not options.no_scale and not fmt.is_native
    out_dtype = options.out_dtype
    if out_dtype is None:
        integers = a_dtype in ("int8", "int4") and fmt.is_integer and not scaling
        out_dtype = a_dtype if a_dtype in OUT_DTYPES[:3] else "int32" if integers else "float32"
    group = options.group_size
    if group is None:
        group = 128 if options.K % 128 == 0 and (scaling or options.zeros != "none") else -1
    return MatmulConfig(
        M=tuple(options.M),
        N=options.N,
        K=options.K,
        A_dtype=a_dtype,
        W_dtype=options.W_dtype,
        out_dtype=out_dtype,
        accum_dtype="int32" if out_dtype == "int32" else "float32",
        group_size=group,
        with_scaling=scaling,
        with_zeros=options.zeros != "none",
        zeros_mode="original" if options.zeros == "none" else options.zeros,
    )


def _bench(options: argparse.Namespace) -> int:
    config = _bench_config(options)
    import torch

    from . import bench
    from .ops import Matmul

    op = Matmul(config, target=options.target)
    peers: list[bench.Peer] = [bench.torch_dense(torch.float32)]
    if config.A_dtype in ("float16", "bfloat16"):
        peers.append(bench.torch_dense(getattr(torch, config.A_dtype)))
    if config.A_dtype == "int8":
        peers.append(bench.torch_int_mm)
    with bench.use_threads(options.threads) as threads:
        machine = bench.measure_machine(threads)
        rows = [bench.compare(op, m, peers, options.seconds) for m in sorted(set(options.M))]
    if options.json:
        print(json.dumps({"machine": machine.fields(), "results": [row.fields(machine) for row in rows]}, indent=1))
    else:
        _print_bench(config, op.origin, machine, rows)
    wrong = [timing for row in rows for timing in row.timings[:1] if timing.seconds is None]
    if wrong:
        print(f"bitblas: error: wrong results, off by {wrong[0].error:.3g} of their size", file=sys.stderr)
    return 1 if wrong else 0


def _print_bench(config: MatmulConfig, origin: str, machine: Machine, rows: Sequence[Comparison]) -> None:
    group = "" if config.group_size == -1 else f", groups of {config.group_size}"
    zeros = f", {config.zeros_mode} zeros" if config.with_zeros else ""
    print(
        f"{config.A_dtype} x {config.W_dtype} -> {config.out_dtype}, N={config.N}, K={config.K}{group}{zeros}; {origin}"
    )
    print(f"{machine.cpu}, {machine.isa}, {machine.threads} threads")
    if machine.bandwidth and machine.fma:
        print(f"measured: {machine.bandwidth / 1e9:.1f} GB/s read, {machine.fma / 1e9:.0f} G float32 FMA/s")
    for note in machine.notes:
        print(f"note: {note}")
    print()
    header = ["M", "bitblas us", "of bandwidth", "of FMA peak"]
    header += [text for timing in rows[0].timings[1:] for text in (f"{timing.name} us", "times ours")]
    table = [header, *(_bench_row(row, machine) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    for line in table:
        print("  ".join(f"{text:>{width}}" for text, width in zip(line, widths, strict=True)))
    for peer in rows[0].skipped:
        print(f"skipped: {peer.name}: {peer.reason}")


def _bench_row(row: Comparison, machine: Machine) -> list[str]:
    def microseconds(seconds: float | None) -> str:
        return "wrong" if seconds is None else f"{seconds * 1e6:.1f}"

    def share(value: float | None, sign: str = "{:.0%}") -> str:
        return "-" if value is None else sign.format(value)

    bandwidth, fma = row.bandwidth_fraction(machine), row.fma_fraction(machine)
    cells = [str(row.m), microseconds(row.ours.seconds), share(bandwidth), share(fma)]
    for timing in row.timings[1:]:
        cells += [microseconds(timing.seconds), share(row.speedup(timing.name), "{:.2f}")]
    return cells


if __name__ == "__main__":
    sys.exit(main())
