"""What a process does to an artifact store in a test: `python artifact_worker.py ROLE PACKAGE ROOT KEY`.

The package's own `__init__` is left out, for a start in milliseconds; the store needs neither torch nor TVM.
Files beside the store are the signals between the test and its processes.
"""

import json
import os
import sys
import threading
import time
import types
from pathlib import Path

DEADLINE = 30
CONTENT = b"library"


def wait_for(path: Path) -> None:
    """Wait until a file is there."""
    deadline = time.monotonic() + DEADLINE
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.005)


def main(role: str, package: str, root: str, key: str) -> None:
    bare = types.ModuleType("bitblas")
    bare.__path__ = [package]
    sys.modules["bitblas"] = bare
    from bitblas.artifacts import ArtifactStore

    ROLES[role](ArtifactStore(root), Path(root).parent, key)


def report(outcome: object) -> None:
    sys.stdout.write(json.dumps(outcome))
    sys.stdout.flush()


def write_library(directory: Path, content: bytes = CONTENT) -> dict[str, str]:
    (directory / "kernel.so").write_bytes(content)
    return {"library": "kernel.so"}


def race(store, beside, key):
    """Start together with others; report whether this process built, and leave a mark for each build."""

    def build(directory):
        (beside / f"built.{os.getpid()}.{time.monotonic_ns()}").touch()
        time.sleep(0.1)
        return write_library(directory)

    (beside / f"ready.{os.getpid()}").touch()
    wait_for(beside / "go")
    artifact, built = store.get_or_build(key, build)
    report([built, artifact.library.read_text()])


def hang(store, beside, key):
    """Write the half of a library and wait to be killed."""

    def build(directory):
        (directory / "kernel.so").write_bytes(CONTENT[:3])
        (beside / "started").touch()
        time.sleep(DEADLINE)

    store.get_or_build(key, build)


def fork_and_live(store, beside, key, *, die=False):
    """Fork while another thread builds; the child reports what it got."""
    started, forked = threading.Event(), threading.Event()

    def build(directory):
        metadata = write_library(directory, b"parent")
        started.set()
        forked.wait(DEADLINE)
        if die:
            os._exit(3)
        time.sleep(0.1)
        return metadata

    thread = threading.Thread(target=store.get_or_build, args=(key, build))
    thread.start()
    started.wait(DEADLINE)
    child = os.fork()
    if child == 0:
        artifact, built = store.get_or_build(key, lambda directory: write_library(directory, b"child"))
        report([built, artifact.library.read_text()])
        os._exit(0)
    forked.set()
    thread.join(DEADLINE)
    os.waitpid(child, 0)


def fork_and_die(store, beside, key):
    fork_and_live(store, beside, key, die=True)


def keep_in_memory(store, beside, key):
    """Keep an artifact in memory while a child ends, which runs the exit functions that it has inherited."""
    artifact, _ = store.get_or_build(key, write_library)
    if os.fork() == 0:
        sys.exit(0)
    os.wait()
    report([artifact.library.is_file(), str(artifact.path)])


ROLES = {role.__name__: role for role in (race, hang, fork_and_live, fork_and_die, keep_in_memory)}

if __name__ == "__main__":
    main(*sys.argv[1:])
