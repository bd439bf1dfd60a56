"""The artifact store: keys, verification, races, killed builds, damage, full disks, directories of others."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from bitblas import env
from bitblas.artifacts import Artifact, ArtifactStore, artifact_key
from bitblas.artifacts import process as process_module
from bitblas.artifacts import store as store_module
from bitblas.errors import ArgumentError, ArtifactError

KEY = artifact_key({"name": "first"})
OTHER = artifact_key({"name": "other"})
LIBRARY = bytes(range(256)) * 40
DEADLINE = 30
WORKER = Path(__file__).with_name("artifact_worker.py")


def wait_for(path):
    deadline = time.monotonic() + DEADLINE
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)


class Builder:
    """A build that counts its calls, and remembers where it ran."""

    def __init__(self, content=LIBRARY, **metadata):
        self.content, self.metadata, self.places = content, metadata, []

    @property
    def calls(self):
        return len(self.places)

    def __call__(self, directory):
        self.places.append(directory)
        (directory / "kernel.so").write_bytes(self.content)
        (directory / "kernel.ll").write_text("; source")
        return {"library": "kernel.so", "entry": "main", **self.metadata}


@pytest.fixture(autouse=True)
def clean():
    """Nothing is in memory."""
    process_module.this_process.reset()


@pytest.fixture
def root(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(root):
    return ArtifactStore(root)


def refuse(monkeypatch, owner, name, code, when=lambda *_: True):
    """Let `owner.name` fail with an OSError where `when` holds of its arguments."""
    original = getattr(owner, name)

    def failing(*args, **kwargs):
        if when(*args):
            raise OSError(code, os.strerror(code))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


def unwritable_warnings(caplog):
    return [record for record in caplog.records if "cannot be kept in" in record.getMessage()]


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_is_the_hash_of_canonical_json():
    import hashlib

    canonical = b'{"a":[1,true,null,"\\u00e9"],"b":{"x":0.5}}'
    assert artifact_key({"b": {"x": 0.5}, "a": (1, True, None, "é")}) == hashlib.sha256(canonical).hexdigest()


@pytest.mark.parametrize(
    "other", [{"a": 2}, {"a": "1"}, {"a": True}, {"a": 1.0}, {"a": None}, {"a": [1]}, {"a": {}}, {"b": 1}, {}]
)
def test_other_fields_give_another_key(other):
    assert artifact_key(other) != artifact_key({"a": 1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"a": object()}, r"fields\['a'\] is <object .* of type object: expected a str"),
        ({"a": [1, {2}]}, r"fields\['a'\]\[1\] is \{2\} of type set"),
        ({"a": {"b": b"x"}}, r"fields\['a'\]\['b'\] is b'x' of type bytes"),
        ({"a": float("nan")}, r"fields\['a'\] is nan of type float: expected .* finite float"),
        ({"a": float("inf")}, r"fields\['a'\] is inf"),
        ({"a": Path("x")}, r"of type PosixPath"),
        ({"a": {1: 2}}, r"fields\['a'\] has the key 1: expected a str"),
        ({"a": errno.errorcode}, r"has the key \d+: expected a str"),
    ],
)
def test_a_key_refuses_what_json_cannot_hold(fields, message):
    with pytest.raises(ArgumentError, match=message):
        artifact_key(fields)


@pytest.mark.parametrize("key", ["", "abc", "../../etc", KEY.upper(), KEY + "0", KEY[:-1] + "\n", None, 7])
@pytest.mark.parametrize("call", ["load", "remove", "get_or_build"])
def test_a_store_refuses_what_is_no_key(store, key, call):
    arguments = (key, Builder()) if call == "get_or_build" else (key,)
    with pytest.raises(ArgumentError, match="expected 64 hexadecimal digits"):
        getattr(store, call)(*arguments)


# ---- build and load --------------------------------------------------------------------------------------------------


def test_a_build_is_published_and_loaded(store, root):
    build = Builder(tiling=(16, 32))
    artifact, built = store.get_or_build(KEY, build)
    assert built
    assert artifact.library.read_bytes() == LIBRARY
    assert artifact.path == root / "artifacts" / KEY
    assert artifact.file("kernel.ll").read_text() == "; source"
    assert artifact.files == ("kernel.ll", "kernel.so")

    again, built = ArtifactStore(root).get_or_build(KEY, build)
    assert (again, built, build.calls) == (artifact, False, 1)
    loaded = ArtifactStore(root).load(KEY)
    assert loaded == artifact
    assert dict(loaded.manifest) == dict(artifact.manifest)
    assert (loaded.manifest["entry"], loaded.manifest["tiling"]) == ("main", [16, 32])


def test_a_build_leaves_nothing_else(store, root):
    store.get_or_build(KEY, Builder())
    assert list((root / "staging").iterdir()) == list((root / "quarantine").iterdir()) == []


def test_published_files_are_read_only_and_directories_private(store, root):
    before = os.umask(0)
    try:
        artifact, _ = store.get_or_build(KEY, Builder())
    finally:
        os.umask(before)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    for path in [artifact.path, *artifact.path.iterdir()]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o022 == 0
    assert stat.S_IMODE(artifact.library.stat().st_mode) == 0o444


def test_a_missing_artifact_creates_nothing(store, root):
    assert store.load(KEY) is None
    assert not root.exists()


def test_a_missing_file_is_reported(store):
    artifact, _ = store.get_or_build(KEY, Builder())
    with pytest.raises(ArtifactError, match=r"has no file 'kernel.cu': it has kernel.ll, kernel.so"):
        artifact.file("kernel.cu")


def test_an_artifact_without_a_library_says_so(store):
    artifact, _ = store.get_or_build(KEY, Builder(library=None))
    with pytest.raises(ArtifactError, match="names no library"):
        _ = artifact.library


def test_folders_within_an_artifact(store, root):
    def build(directory):
        (directory / "include").mkdir()
        (directory / "include" / "a.h").write_text("x")
        return {}

    store.get_or_build(KEY, build)
    assert ArtifactStore(root).load(KEY).file("include/a.h").read_text() == "x"


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda directory: {}, ArtifactError, "wrote no file"),
        (Builder(library="k.dll"), ArtifactError, "wrote no file 'k.dll', its library: it wrote kernel.ll, kernel.so"),
        (Builder(files={}), ArtifactError, "reserved name 'files'"),
        (Builder(made=object()), ArgumentError, r"metadata\['made'\] is"),
        (lambda d: (d / "x").symlink_to("/etc/passwd") or {}, ArtifactError, "left 'x', which is not a regular file"),
        (lambda d: (d / "manifest.json").write_text("{}") and {}, ArtifactError, "left 'manifest.json'"),
    ],
)
def test_a_build_that_leaves_no_artifact_is_refused(store, root, build, error, message):
    with pytest.raises(error, match=message):
        store.get_or_build(KEY, build)
    assert list((root / "staging").iterdir()) == list((root / "artifacts").iterdir()) == []
    assert store.get_or_build(KEY, Builder())[1]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, FileNotFoundError])
def test_an_exception_in_a_build_comes_through(store, root, error):
    def build(directory):
        (directory / "half").write_text("x")
        raise error("broken")

    with pytest.raises(error, match="broken"):
        store.get_or_build(KEY, build)
    assert list((root / "staging").iterdir()) == []
    assert store.load(KEY) is None


def test_a_failed_build_is_kept_when_asked_for(store, root, caplog):
    def build(directory):
        (directory / "half").write_text("x")
        raise RuntimeError("broken")

    with env.scope(BITBLAS_KEEP_BUILD=True), pytest.raises(RuntimeError, match="broken"):
        store.get_or_build(KEY, build)
    (kept,) = (root / "failed").iterdir()
    assert (kept / "half").read_text() == "x"
    assert str(kept) in caplog.text
    assert store.size() == 1
    store.clear()
    assert not (root / "failed").exists()


def test_a_build_may_build_another(store):
    inner = Builder()

    def outer(directory):
        store.get_or_build(OTHER, inner)
        return Builder()(directory)

    assert store.get_or_build(KEY, outer)[1]
    assert inner.calls == 1


def test_entries_remove_clear_and_size(store):
    assert (store.entries(), store.size(), store.clear(), store.remove(KEY)) == ([], 0, 0, False)
    first, _ = store.get_or_build(KEY, Builder())
    other, _ = store.get_or_build(OTHER, Builder())
    assert store.entries() == sorted([first, other], key=lambda artifact: artifact.key)
    assert store.size() > 2 * len(LIBRARY)
    assert store.remove(KEY)
    assert not store.remove(KEY)
    assert store.load(KEY) is None
    assert store.load(OTHER) == other
    assert store.clear() == 1
    assert (store.entries(), store.size()) == ([], 0)
    assert store.get_or_build(KEY, Builder())[1]


def test_foreign_files_in_the_store_are_left_alone(store, root):
    store.get_or_build(KEY, Builder())
    (root / "artifacts" / "notes").write_text("mine")
    (root / "tuning.json").write_text("{}")
    assert len(store.entries()) == 1
    assert store.clear() == 1
    assert (root / "artifacts" / "notes").exists()
    assert (root / "tuning.json").exists()


def test_a_symlinked_root(tmp_path, store):
    (tmp_path / "link").symlink_to(tmp_path / "store")
    linked = ArtifactStore(tmp_path / "link")
    artifact, built = linked.get_or_build(KEY, Builder())
    assert built
    assert store.load(KEY) == artifact


# ---- damage ----------------------------------------------------------------------------------------------------------


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.chmod(0o644)
    path.write_bytes(content)


def truncate(path, size):
    path.chmod(0o644)
    os.truncate(path, size)


def rewrite(entry, change):
    """Change the manifest and give it the checksum that fits, so that what is checked next is reached."""
    from bitblas.artifacts import record

    path = entry / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    change(manifest)
    path.unlink()
    record.write_manifest(entry, manifest)


DAMAGE = {
    "truncated library": lambda entry: truncate(entry / "kernel.so", 100),
    "empty library": lambda entry: truncate(entry / "kernel.so", 0),
    "bit flipped in the library": lambda entry: flip(entry / "kernel.so", 5000),
    "bit flipped in the source": lambda entry: flip(entry / "kernel.ll", 0),
    "library missing": lambda entry: (entry / "kernel.so").unlink(),
    "library is a directory": lambda entry: (entry / "kernel.so").unlink() or (entry / "kernel.so").mkdir(),
    "library is a link": lambda entry: (
        (entry / "kernel.so").rename(entry.parent / "elsewhere")
        and (entry / "kernel.so").symlink_to(entry.parent / "elsewhere")
    ),
    "library is a pipe": lambda entry: (entry / "kernel.so").unlink() or os.mkfifo(entry / "kernel.so"),
    "manifest missing": lambda entry: (entry / "manifest.json").unlink(),
    "empty manifest": lambda entry: truncate(entry / "manifest.json", 0),
    "truncated manifest": lambda entry: truncate(entry / "manifest.json", 60),
    "bit flipped in the manifest": lambda entry: flip(
        entry / "manifest.json", (entry / "manifest.json").read_bytes().index(b'"main"') + 1
    ),
    "manifest is a list": lambda entry: (
        (entry / "manifest.json").unlink() or (entry / "manifest.json").write_text("[]")
    ),
    "manifest of another key": lambda entry: rewrite(entry, lambda manifest: manifest.update(key=OTHER)),
    "manifest of another schema": lambda entry: rewrite(entry, lambda manifest: manifest.update(schema=99)),
    "no files": lambda entry: rewrite(entry, lambda manifest: manifest.update(files={})),
    "malformed files": lambda entry: rewrite(entry, lambda manifest: manifest.update(files={"kernel.so": None})),
    "empty directory": lambda entry: [path.unlink() for path in entry.iterdir()],
    "a file in its place": lambda entry: shutil.rmtree(entry) or entry.write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_set_aside_and_built_again(store, root, caplog, damage):
    build = Builder()
    artifact, _ = store.get_or_build(KEY, build)
    damage(artifact.path)
    assert ArtifactStore(root).load(KEY) is None
    assert f"artifact {KEY} is damaged" in caplog.text
    assert len(list((root / "quarantine").iterdir())) == 1
    mended, built = ArtifactStore(root).get_or_build(KEY, build)
    assert (built, build.calls, mended.library.read_bytes()) == (True, 2, LIBRARY)
    assert ArtifactStore(root).load(KEY) == mended


def test_extra_files_do_no_harm(store, root):
    artifact, _ = store.get_or_build(KEY, Builder())
    (artifact.path / "core").write_text("x")
    loaded = ArtifactStore(root).load(KEY)
    assert loaded == artifact
    assert "core" not in loaded.files


def test_too_many_open_files_is_no_damage(store, root, monkeypatch):
    artifact, _ = store.get_or_build(KEY, Builder())
    with monkeypatch.context() as patch:
        refuse(patch, Path, "read_bytes", errno.EMFILE)
        with pytest.raises(OSError, match="Too many open files"):
            store.load(KEY)
    assert store.load(KEY) == artifact


def test_an_entry_that_another_process_has_mended_is_not_set_aside(store, root, monkeypatch):
    build = Builder()
    artifact, _ = store.get_or_build(KEY, build)
    flip(artifact.library, 3)
    lock = ArtifactStore._lock

    @contextmanager
    def late_lock(self, key):
        monkeypatch.setattr(ArtifactStore, "_lock", lock)
        ArtifactStore(root).get_or_build(KEY, build)  # the other process, between our first look and our lock
        with lock(self, key):
            yield

    monkeypatch.setattr(ArtifactStore, "_lock", late_lock)
    assert store.load(KEY).library.read_bytes() == LIBRARY
    assert len(list((root / "quarantine").iterdir())) == 1


def test_a_damaged_entry_on_a_read_only_disk_is_not_loaded(store, monkeypatch, caplog):
    artifact, _ = store.get_or_build(KEY, Builder())
    flip(artifact.library, 3)
    refuse(monkeypatch, Path, "rename", errno.EROFS)
    assert store.load(KEY) is None
    assert "cannot be set aside" in caplog.text
    build = Builder()
    mended, built = store.get_or_build(KEY, build)
    assert (built, build.calls, mended.library.read_bytes()) == (True, 1, LIBRARY)
    assert store.load(KEY) == mended


# ---- threads and processes -------------------------------------------------------------------------------------------


def start(role, root, **variables):
    command = [sys.executable, "-W", "ignore", WORKER, role, Path(env.__file__).parent, root, KEY]
    environment = {**os.environ, **variables}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, code=0):
    """Return what a worker reports, and what it wrote to standard error."""
    output, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == code, errors
    return json.loads(output), errors


def run_race(root, count):
    beside = root.parent
    processes = [start("race", root) for _ in range(count)]
    for process in processes:
        wait_for(beside / f"ready.{process.pid}")
    (beside / "go").touch()
    return sorted(finish(process)[0] for process in processes)


def test_processes_racing_for_a_cold_key_build_it_once(root, tmp_path):
    assert run_race(root, 8) == [[False, "library"]] * 7 + [[True, "library"]]
    assert len(list(tmp_path.glob("built.*"))) == 1
    assert list((root / "staging").iterdir()) == []


def test_processes_racing_for_a_damaged_entry_mend_it_once(root, store, tmp_path):
    artifact, _ = store.get_or_build(KEY, Builder())
    flip(artifact.library, 9)
    assert run_race(root, 4) == [[False, "library"]] * 3 + [[True, "library"]]
    assert len(list(tmp_path.glob("built.*"))) == len(list((root / "quarantine").iterdir())) == 1


def run_threads(count, target):
    threads = [threading.Thread(target=target, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)


def test_threads_racing_for_a_cold_key_build_it_once(root):
    build, outcomes = Builder(), []

    def slow(directory):
        time.sleep(0.1)
        return build(directory)

    run_threads(8, lambda number: outcomes.append(ArtifactStore(root).get_or_build(KEY, slow)[1]))
    assert sorted(outcomes) == [False] * 7 + [True]
    assert build.calls == 1


def test_different_keys_are_built_at_the_same_time(store):
    barrier = threading.Barrier(2, timeout=10)

    def build(directory):
        barrier.wait()  # breaks unless both builds are at work
        return Builder()(directory)

    run_threads(2, lambda number: store.get_or_build((KEY, OTHER)[number], build))
    assert len(store.entries()) == 2


@pytest.fixture
def killed(root, tmp_path):
    """A store in which a process was killed in the middle of building KEY."""
    process = start("hang", root)
    wait_for(tmp_path / "started")
    process.kill()
    process.communicate(timeout=DEADLINE)
    assert process.returncode == -signal.SIGKILL
    (staging,) = (root / "staging").iterdir()
    assert staging.name.startswith(KEY)
    return ArtifactStore(root)


def test_a_killed_build_is_built_by_the_next(killed, root):
    assert killed.load(KEY) is None
    build = Builder()
    artifact, built = killed.get_or_build(KEY, build)
    assert (built, build.calls, artifact.library.read_bytes()) == (True, 1, LIBRARY)
    assert list((root / "staging").iterdir()) == []


def test_what_a_killed_build_left_is_swept_by_another(killed, root):
    killed.get_or_build(OTHER, Builder())
    assert list((root / "staging").iterdir()) == []


def test_a_build_at_work_is_not_swept(store, root):
    at_work, go_on = threading.Event(), threading.Event()

    def build(directory):
        result = Builder()(directory)
        at_work.set()
        assert go_on.wait(DEADLINE)
        return result

    thread = threading.Thread(target=store.get_or_build, args=(KEY, build))
    thread.start()
    assert at_work.wait(DEADLINE)
    store.get_or_build(OTHER, Builder())
    (staging,) = (root / "staging").iterdir()
    assert staging.name.startswith(KEY)
    go_on.set()
    thread.join(DEADLINE)
    assert store.load(KEY) is not None


def test_a_fork_while_another_thread_builds(root):
    assert finish(start("fork_and_live", root))[0] == [False, "parent"]


def test_a_fork_while_another_thread_builds_and_dies(root):
    assert finish(start("fork_and_die", root), code=3)[0] == [True, "child"]


def test_the_entry_of_a_faster_process_wins(store, root, monkeypatch):
    """Where the locks of two machines do not see each other, the first to rename wins."""
    theirs, ours = Builder(b"theirs"), Builder(b"ours")

    def build(directory):
        with monkeypatch.context() as patch:
            patch.setattr(ArtifactStore, "_lock", lambda self, key: contextmanager(lambda: iter([None]))())
            patch.setattr(
                process_module.this_process, "building", lambda root, key: contextmanager(lambda: iter([None]))()
            )
            patch.setattr(ArtifactStore, "_sweep", lambda self, key: None)
            store.get_or_build(KEY, theirs)
        return ours(directory)

    artifact, _ = store.get_or_build(KEY, build)
    assert artifact.library.read_bytes() == b"theirs"
    assert list((root / "staging").iterdir()) == []


# ---- disks that do not take files ------------------------------------------------------------------------------------


def check_memory(store, caplog, expected_calls=1):
    """A store that cannot be written serves from memory: one build a key, one warning a process."""
    build = Builder()
    artifact, built = store.get_or_build(KEY, build)
    assert (built, build.calls) == (True, expected_calls)
    assert artifact.library.read_bytes() == LIBRARY
    assert store.root not in artifact.path.parents
    assert store.get_or_build(KEY, build) == (artifact, False)
    assert ArtifactStore(store.root).get_or_build(KEY, build) == (artifact, False)
    assert store.load(KEY) == artifact
    assert build.calls == expected_calls
    store.get_or_build(OTHER, Builder())
    (warning,) = unwritable_warnings(caplog)
    assert warning.levelname == "WARNING"
    assert str(store.root) in warning.getMessage()
    assert "BITBLAS_CACHE_DIR" in warning.getMessage()
    return artifact


def test_a_root_below_a_file(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    check_memory(ArtifactStore(tmp_path / "file" / "store"), caplog)


def test_a_root_that_is_a_file(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    check_memory(ArtifactStore(tmp_path / "file"), caplog)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_root_that_cannot_be_created(store, monkeypatch, caplog, code):
    refuse(monkeypatch, Path, "mkdir", code, lambda path, *_: store.root in (path, *path.parents))
    check_memory(store, caplog)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("step", ["write_manifest", "_sync_tree"])
def test_a_disk_that_is_full_when_publishing_keeps_the_build(store, root, monkeypatch, caplog, code, step):
    refuse(monkeypatch, store_module, step, code)
    check_memory(store, caplog)
    assert list((root / "staging").iterdir()) == list((root / "artifacts").iterdir()) == []


def test_a_disk_that_refuses_the_rename_keeps_the_build(store, monkeypatch, caplog):
    refuse(monkeypatch, Path, "rename", errno.ENOSPC)
    check_memory(store, caplog)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("ld: No space left on device")])
def test_a_disk_that_is_full_when_building(store, root, monkeypatch, caplog, error):
    """A compiler reports a full disk in its own words; what counts is that the disk takes no files."""
    monkeypatch.setattr(store_module, "takes_files", lambda directory: root not in directory.parents)
    build = Builder()

    def failing(directory):
        if root in directory.parents:
            raise error
        return build(directory)

    artifact, built = store.get_or_build(KEY, failing)
    assert (built, build.calls) == (True, 1)
    assert artifact.library.read_bytes() == LIBRARY
    assert len(unwritable_warnings(caplog)) == 1


def test_a_broken_build_on_a_good_disk_is_not_repeated(store):
    calls = []

    def failing(directory):
        calls.append(directory)
        raise OSError(errno.ENOSPC, "not of this disk")

    with pytest.raises(OSError, match="not of this disk"):
        store.get_or_build(KEY, failing)
    assert len(calls) == 1


def test_a_store_that_was_removed_under_a_build(store, root, caplog):
    build = Builder()

    def removing(directory):
        if build.calls == 0:
            build.places.append(directory)
            shutil.rmtree(root)
            raise FileNotFoundError(directory)
        return build(directory)

    artifact, _ = store.get_or_build(KEY, removing)
    assert artifact.library.read_bytes() == LIBRARY


def test_threads_build_once_in_memory_too(tmp_path):
    (tmp_path / "file").write_text("")
    store, build, outcomes = ArtifactStore(tmp_path / "file" / "store"), Builder(), []

    def slow(directory):
        time.sleep(0.1)
        return build(directory)

    run_threads(4, lambda number: outcomes.append(store.get_or_build(KEY, slow)[1]))
    assert (sorted(outcomes), build.calls) == ([False, False, False, True], 1)


def test_artifacts_in_memory_can_be_removed(tmp_path):
    (tmp_path / "file").write_text("")
    store = ArtifactStore(tmp_path / "file" / "store")
    artifact, _ = store.get_or_build(KEY, Builder())
    store.get_or_build(OTHER, Builder())
    assert store.remove(KEY)
    assert not store.remove(KEY)
    assert not artifact.path.exists()
    assert store.clear() == 1
    assert store.get_or_build(KEY, Builder())[1]


def test_what_a_cleaner_of_temporary_files_took_is_built_again(tmp_path):
    (tmp_path / "file").write_text("")
    store, build = ArtifactStore(tmp_path / "file" / "store"), Builder()
    artifact, _ = store.get_or_build(KEY, build)
    shutil.rmtree(artifact.path)
    assert store.load(KEY) is None
    assert store.get_or_build(KEY, build)[1]
    assert build.calls == 2


def test_artifacts_in_memory_end_with_their_process_and_not_with_a_child(tmp_path):
    (tmp_path / "file").write_text("")
    (there, path), errors = finish(start("keep_in_memory", tmp_path / "file" / "store", TMPDIR=str(tmp_path)))
    assert there
    assert Path(path).is_relative_to(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    assert errors.count("cannot be kept") == 1


def test_no_place_at_all(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(process_module, "takes_files", lambda directory: False)
    with pytest.raises(ArtifactError, match=r"no place for temporary files: .*; set TMPDIR"):
        ArtifactStore(tmp_path / "file" / "store").get_or_build(KEY, Builder())


@contextmanager
def tmpfs(path, size):
    """Mount a small file system; skip where that is not permitted."""
    path.mkdir(mode=0o700)
    mount = shutil.which("mount")
    options = f"size={size},mode=0700"
    done = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True, check=False
    )
    if not done or done.returncode:
        pytest.skip(f"cannot mount a tmpfs to test a real full disk: {done.stderr.strip() if done else 'no mount'}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_disk_that_is_really_full(tmp_path, caplog):
    with tmpfs(tmp_path / "small", "64k") as small:
        store = ArtifactStore(small / "store")
        build = Builder(bytes(300_000))
        artifact, built = store.get_or_build(KEY, build)
        assert (built, build.calls) == (True, 2)  # the first did not fit
        assert artifact.library.read_bytes() == bytes(300_000)
        assert len(unwritable_warnings(caplog)) == 1
        fits, _ = store.get_or_build(OTHER, Builder(b"tiny"))
        assert small in fits.path.parents


def test_a_disk_that_is_really_read_only(tmp_path, caplog):
    with tmpfs(tmp_path / "disk", "1m") as disk:
        store, build = ArtifactStore(disk / "store"), Builder()
        artifact, _ = store.get_or_build(KEY, build)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert ArtifactStore(disk / "store").get_or_build(KEY, build) == (artifact, False)
        assert caplog.records == []
        check_memory_only(store, OTHER, caplog)


def check_memory_only(store, key, caplog):
    artifact, built = store.get_or_build(key, Builder())
    assert built
    assert store.root not in artifact.path.parents
    assert len(unwritable_warnings(caplog)) == 1


def test_a_store_that_cannot_be_written_still_loads(store, root, monkeypatch, caplog):
    artifact, _ = store.get_or_build(KEY, Builder())
    before = sorted(root.rglob("*"))
    shutil.rmtree(root / "locks")
    for name in ("mkdir", "rename", "touch", "write_text", "write_bytes"):
        refuse(monkeypatch, Path, name, errno.EROFS)
    refuse(monkeypatch, os, "open", errno.EROFS, lambda path, flags, *_: flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    build = Builder()
    assert ArtifactStore(root).get_or_build(KEY, build) == (artifact, False)
    assert build.calls == 0
    assert caplog.records == []
    assert [path for path in before if path.exists() and "locks" not in path.parts] == sorted(root.rglob("*"))


# ---- directories that others may write -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777, 0o720])
@pytest.mark.parametrize("place", ["", "artifacts", "staging"])
def test_a_directory_that_others_may_write_is_refused(store, root, mode, place):
    build = Builder()
    store.get_or_build(KEY, build)
    (root / place).chmod(mode)
    message = rf"{root / place} may be written by others \(mode {mode:04o}\).*: run `chmod go-w {root / place}`"
    with pytest.raises(ArtifactError, match=message):
        store.load(KEY)
    with pytest.raises(ArtifactError, match=message):
        store.get_or_build(OTHER, build)
    with pytest.raises(ArtifactError, match=message):
        store.entries()
    assert build.calls == 1
    (root / place).chmod(mode & ~0o022)
    assert store.load(KEY) is not None


def test_an_existing_empty_directory_that_others_may_write_is_refused(store, root):
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(ArtifactError, match="may be written by others"):
        store.get_or_build(KEY, Builder())
    assert list(root.iterdir()) == []


def test_a_directory_of_ours_in_one_that_all_may_write(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    assert ArtifactStore(tmp_path / "shared" / "mine").get_or_build(KEY, Builder())[1]


def test_a_directory_that_others_may_read_is_fine(store, root):
    root.mkdir(mode=0o755)
    assert store.get_or_build(KEY, Builder())[1]


def test_a_directory_of_another_user_is_refused(store, root, monkeypatch):
    store.get_or_build(KEY, Builder())
    if os.geteuid() == 0:
        os.chown(root, 12345, -1)
        owner = 12345
    else:
        owner = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(
        ArtifactError, match=rf"belongs to user {owner} \(mode 0700\).*chown -R .* set BITBLAS_CACHE_DIR"
    ):
        store.load(KEY)


def test_a_directory_of_root_is_fine(store, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("needs a directory of root")
    store.get_or_build(KEY, Builder())
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert store.load(KEY) is not None


def test_an_artifact_is_a_value(store):
    artifact, _ = store.get_or_build(KEY, Builder())
    assert artifact == Artifact(KEY, artifact.path, {})
    assert len({artifact, store.load(KEY)}) == 1
    with pytest.raises(AttributeError, match="cannot assign"):
        artifact.key = OTHER
