"""Bundles: what is written, what comes back, and everything that is refused without a trace."""

import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import bitblas
import fake_store
from bitblas import env
from bitblas.artifacts import ArtifactStore, artifact_key
from bitblas.artifacts import process as process_module
from bitblas.artifacts import store as store_module
from bitblas.build import COMPILER, LIBRARY
from bitblas.cache import bundle as bundle_module
from bitblas.cache.bundle import INDEX, export_bundle, export_store
from bitblas.cache.importing import import_bundle
from bitblas.errors import ArgumentError, ArtifactError, BuildError
from bitblas.ops import provider
from bitblas.plan import make_plan, plan_matmul
from bitblas.target import resolve_target
from bitblas.tuner.record import load_record, record_path
from fake_store import OTHER_TARGET, TARGET, attention, config, put, tune, without_tvm

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def clean():
    """Nothing is in memory."""
    process_module.this_process.reset()


@pytest.fixture
def bundle(store, tmp_path):
    """A bundle of two operators and a tuning record."""
    put(store, config(64))
    put(store, config(128), tuned=tune(config(128)))
    path = tmp_path / "two.tar"
    assert len(export_store(path).operators) == 2
    return path


@pytest.fixture
def elsewhere_path(tmp_path):
    return tmp_path / "elsewhere"


@pytest.fixture
def elsewhere(elsewhere_path):
    """An empty store of another machine."""
    path = elsewhere_path
    with env.scope(BITBLAS_CACHE_DIR=path):
        yield path


def test_attentions_go_along(store, tmp_path, elsewhere_path):
    """Found by their configs, with their tilings, and with all of the store."""
    cfg = attention(is_causal=True)
    with env.scope(BITBLAS_CACHE_DIR=store):
        tilings = tune(cfg)
        made = put(store, cfg, tuned=tilings)
        path = tmp_path / "attention.tar"
        exported = export_bundle(path, [cfg, config()] if put(store, config()) else [], [TARGET])
        assert made.key in {artifact.key for artifact in exported.operators}
        assert (len(exported.operators), exported.tuning) == (2, 1)
        assert {a.key for a in export_store(tmp_path / "all.tar").operators} == {a.key for a in exported.operators}
    with env.scope(BITBLAS_CACHE_DIR=elsewhere_path):
        imported = import_bundle(path)
        assert made.key in imported.added
        assert imported.manifests[made.key]["plan"]["operator"] == "attention"
        assert load_record(cfg, TARGET) == tilings
        assert provider.store().load(provider.plan_key(make_plan(cfg, TARGET, tilings))).key == made.key


def tree(root):
    """Content and mode of each file below a directory, but for locks."""
    return {
        path.relative_to(root).as_posix(): (path.read_bytes(), path.stat().st_mode)
        for path in root.rglob("*")
        if path.is_file() and path.suffix != ".lock" and path.name != ".lock"
    }


def members(path):
    with tarfile.open(path, "r:") as archive:
        return [(member, archive.extractfile(member).read()) for member in archive]


def rewrite(path, change):
    """Write a bundle anew after `change` has had its list of (member, content)."""
    found = members(path)
    change(found)
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for member, content in found:
            archive.addfile(member, io.BytesIO(content) if member.isreg() else None)


def reindexed(change):
    """A change of the index, by somebody who knows how to make its checksum."""

    def changed(found):
        index = json.loads(found[0][1])
        index.pop("checksum")
        change(index)
        content = json.dumps({**index, "checksum": artifact_key(index)}).encode()
        found[0][0].size = len(content)
        found[0] = (found[0][0], content)

    return changed


def place_of(found, ending):
    return next(i for i, (member, _) in enumerate(found) if member.name.endswith(ending))


# -- there and back --------------------------------------------------------------------------------------------------------


def test_what_is_exported_is_imported(store, bundle, elsewhere):
    found = import_bundle(bundle)
    assert (len(found.added), found.kept, found.tuning, found.saved) == (2, (), 1, 0)
    assert tree(elsewhere) == tree(store)
    assert [a.key for a in ArtifactStore(elsewhere).entries()] == sorted(found.added)
    assert load_record(config(128), TARGET) == fake_store.other_tilings(config(128))


def test_a_bundle_is_the_same_at_any_time_and_place(store, bundle, elsewhere, tmp_path):
    import_bundle(bundle)
    again = tmp_path / "again.tar"
    export_store(again)
    assert again.read_bytes() == bundle.read_bytes()


def test_a_bundle_is_plain(bundle):
    (index, content), *rest = members(bundle)
    assert index.name == INDEX
    listed = json.loads(content)["members"]
    assert [member.name for member, _ in rest] == sorted(listed)
    for member, content in rest:
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
        assert member.mode == (0o555 if member.name.endswith(".so") else 0o444)
        assert listed[member.name]["sha256"] == hashlib.sha256(content).hexdigest()


def test_what_is_there_is_kept(bundle, elsewhere):
    import_bundle(bundle)
    before = {path: path.stat().st_mtime_ns for path in elsewhere.rglob("*.*") if path.is_file()}
    found = import_bundle(bundle)
    assert (found.added, len(found.kept), found.tuning) == ((), 2, 0)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_is_damaged_is_replaced(bundle, elsewhere, caplog):
    first, *_ = import_bundle(bundle).added
    library = elsewhere / "artifacts" / first / LIBRARY
    library.chmod(0o644)
    library.write_bytes(b"rubbish")
    (record,) = elsewhere.glob("tuning/*.json")
    record.write_text("rubbish")
    found = import_bundle(bundle)
    assert (found.added, len(found.kept), found.tuning) == ((first,), 1, 1)
    assert library.read_bytes() == fake_store.files(first)[LIBRARY]
    assert "damaged" in caplog.text


def test_the_index_of_saved_operators_goes_along(store, elsewhere, tmp_path):
    artifact = put(store, config())
    plan = plan_matmul(config(), TARGET)
    op = bitblas.Matmul(config(), target=TARGET, from_database=True)
    database = bitblas.cache.database.Database(store)
    (store / "operators" / artifact_key(TARGET.fields())[:16]).mkdir(parents=True, mode=0o700)
    database._record(op, artifact)
    with env.scope(BITBLAS_CACHE_DIR=store):
        assert export_store(tmp_path / "one.tar").saved == 1
    assert import_bundle(tmp_path / "one.tar").saved == 1
    assert tree(elsewhere) == tree(store)
    assert plan_matmul(config(), TARGET) == plan


def test_only_what_serves_is_exported(store, tmp_path):
    kept = put(store, config(64))
    put(store, config(64), bitblas="0.0.1")
    other = put(store, config(64), OTHER_TARGET)
    found = export_store(tmp_path / "a.tar")
    assert [artifact.key for artifact in found.operators] == sorted([kept.key, other.key])
    assert found.left_out == 1
    assert [a.key for a in export_store(tmp_path / "b.tar", [OTHER_TARGET]).operators] == [other.key]
    with pytest.raises(ArgumentError, match="no operator of the installed versions for llvm -mcpu=haswell"):
        export_store(tmp_path / "c.tar", [resolve_target("haswell")])
    assert not (tmp_path / "c.tar").exists()


def test_configs_are_exported_with_their_records_and_nothing_is_built_twice(store, elsewhere, tmp_path, monkeypatch):
    def no_build(*_):
        raise BuildError("nothing is to be built")

    monkeypatch.setattr(provider, "build_library", no_build)
    with env.scope(BITBLAS_CACHE_DIR=store):
        default = put(store, config(64))
        put(store, config(128))  # which the record supersedes
        tuned = put(store, config(128), tuned=tune(config(128)))
        put(store, config(256))
        found = export_bundle(tmp_path / "a.tar", [config(64), config(128), config(64)], [TARGET])
        assert [artifact.key for artifact in found.operators] == sorted([default.key, tuned.key])
        assert found.tuning == 1
        with pytest.raises(BuildError, match="nothing is to be built"):
            export_bundle(tmp_path / "b.tar", [config(64), config(512)], [TARGET])
    assert sorted(path.name for path in tmp_path.glob("*.tar*")) == ["a.tar"]


# -- names that are no bundle's --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [("bundle.zip", "must end in .tar"), ("no/such/b.tar", "is no directory"), ("dir.tar", "is a directory")],
)
def test_names_that_cannot_be_written(store, tmp_path, name, message):
    put(store)
    (tmp_path / "dir.tar").mkdir()
    with pytest.raises(ArgumentError, match=message):
        export_store(tmp_path / name)


def test_a_disk_that_is_full_leaves_what_was_there(store, tmp_path, monkeypatch):
    put(store)
    (tmp_path / "a.tar").write_bytes(b"the last one")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundle_module, "_add", full)
    with pytest.raises(OSError, match="No space") as caught:
        export_store(tmp_path / "a.tar")
    assert caught.value.filename == str(tmp_path / "a.tar")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.tar"]
    assert (tmp_path / "a.tar").read_bytes() == b"the last one"


# -- bundles that are refused ----------------------------------------------------------------------------------------------


def cut(found):
    del found[-2:]


def swapped(found):
    i, j = place_of(found, "kernel.ll"), place_of(found, "schedule.py")
    found[i][0].name, found[j][0].name = found[j][0].name, found[i][0].name


def flipped(found):
    i = place_of(found, LIBRARY)
    content = bytearray(found[i][1])
    content[7] ^= 1
    found[i] = (found[i][0], bytes(content))


def twice(found):
    found.append(found[-1])


def surplus(found):
    found.append((tarfile.TarInfo("artifacts/evil.so"), b""))


def escaping(found):
    member = tarfile.TarInfo("../../evil")
    member.size, member.mode = 4, 0o444
    found.append((member, b"evil"))


def link(found, kind):
    i = place_of(found, LIBRARY)
    found[i][0].type, found[i][0].linkname, found[i][0].size = kind, "/etc/passwd", 0


def attribute(found, **changes):
    member = found[place_of(found, LIBRARY)][0]
    for name, value in changes.items():
        setattr(member, name, value)


def rename_in_index(index):
    name = next(name for name in index["members"] if name.endswith(LIBRARY))
    index["members"][name.replace(LIBRARY, "../../../evil.so")] = index["members"].pop(name)


def enlarge(index):
    name = next(name for name in index["members"] if name.endswith(LIBRARY))
    index["members"][name]["size"] = 1 << 40


def weaken(index):
    name = next(name for name in index["members"] if name.endswith(LIBRARY))
    index["members"][name]["mode"] = 0o4755


def forget(index):
    del index["members"][next(name for name in index["members"] if name.endswith(LIBRARY))]


def library_is_another(found):
    """A library, the index and the manifest's place changed alike: the manifest's checksum tells."""
    i = place_of(found, LIBRARY)
    member, content = found[i]
    found[i] = (member, bytes(reversed(content)))
    digest = hashlib.sha256(found[i][1]).hexdigest()
    reindexed(lambda index: index["members"][member.name].update(sha256=digest))(found)


def manifest_of_another_plan(found):
    """A whole manifest, with right checksums, of an operator that the key does not belong to."""
    i = place_of(found, "manifest.json")
    member = found[i][0]
    manifest = json.loads(found[i][1])
    manifest.pop("checksum")
    manifest["plan"]["config"]["N"] = 32
    content = json.dumps({**manifest, "checksum": artifact_key(manifest)}).encode()
    member.size = len(content)
    found[i] = (member, content)
    listed = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    reindexed(lambda index: index["members"][member.name].update(listed))(found)


def record_is_another(found):
    """A tuning record with another content and another line in the index: its own checksum tells."""
    i = next(i for i, (member, _) in enumerate(found) if member.name.startswith("tuning/"))
    member, content = found[i]
    record = json.loads(content)
    record["date"] = "never"
    content = json.dumps(record).encode()
    member.size = len(content)
    found[i] = (member, content)
    listed = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    reindexed(lambda index: index["members"][member.name].update(listed))(found)


BAD = {
    "cut": (cut, r"'tuning/\w+\.json' is missing|is missing: the bundle is cut off"),
    "swapped": (swapped, r"'artifacts/\w+/(kernel\.ll|schedule\.py)' "),
    "flipped": (flipped, r"'artifacts/\w+/kernel\.so' is not what was written"),
    "twice": (twice, r"'tuning/\w+\.json' is (there twice|not listed)"),
    "surplus": (surplus, r"'artifacts/evil\.so' is not listed"),
    "escaping": (escaping, r"'\.\./\.\./evil' is not listed"),
    "symlink": (lambda found: link(found, tarfile.SYMTYPE), r"'artifacts/\w+/kernel\.so' is no plain file"),
    "hard link": (lambda found: link(found, tarfile.LNKTYPE), r"'artifacts/\w+/kernel\.so' is no plain file"),
    "device": (lambda found: link(found, tarfile.CHRTYPE), r"'artifacts/\w+/kernel\.so' is no plain file"),
    "directory": (lambda found: link(found, tarfile.DIRTYPE), r"'artifacts/\w+/kernel\.so' is no plain file"),
    "extended": (
        lambda found: attribute(found, pax_headers={"SCHILY.xattr.user.x": "y"}),
        r"'\./\./@PaxHeader' is no plain file",
    ),
    "owner": (lambda found: attribute(found, uid=1000), r"'artifacts/\w+/kernel\.so' belongs to somebody \(1000\)"),
    "owner's name": (lambda found: attribute(found, uname="eve"), r"kernel\.so' belongs to somebody \(eve\)"),
    "setuid": (lambda found: attribute(found, mode=0o4555), r"kernel\.so' has mode 4555"),
    "writable": (lambda found: attribute(found, mode=0o666), r"kernel\.so' has mode 0666"),
    "another mode": (lambda found: attribute(found, mode=0o444), r"kernel\.so' has another size or mode"),
    "index escapes": (reindexed(rename_in_index), r"evil\.so' is no name of a bundle's member"),
    "index enlarges": (reindexed(enlarge), r"kernel\.so' has a size of 1099511627776"),
    "index weakens": (reindexed(weaken), r"kernel\.so' has a mode or checksum that is not allowed"),
    "index forgets": (reindexed(forget), r"kernel\.so' is not listed"),
    "kind": (reindexed(lambda index: index.update(kind="recipes")), "is of another kind or schema"),
    "schema": (reindexed(lambda index: index.update(schema=99)), "is of another kind or schema"),
    "no members": (reindexed(lambda index: index.update(members=[])), "'bundle.json' is not what was written"),
    "another library": (library_is_another, r"'artifacts/\w+/manifest\.json' lists other files"),
    "another plan": (manifest_of_another_plan, r"manifest\.json' describes another operator than its key says"),
    "another record": (record_is_another, r"'tuning/\w+\.json' is not what was written"),
    "bitblas": (reindexed(lambda index: index["toolchain"].update(bitblas="0.0.1")), r"bitblas 0\.0\.1, here"),
    "TVM": (reindexed(lambda index: index["toolchain"].update({COMPILER: "0.26.0"})), r"apache-tvm 0\.26\.0, here"),
    "sources": (reindexed(lambda index: index["toolchain"].update(sources="0")), "other kernel sources"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bundle_that_is_refused_leaves_no_trace(bundle, elsewhere, case):
    change, message = BAD[case]
    rewrite(bundle, change)
    with pytest.raises(ArtifactError, match=message):
        import_bundle(bundle)
    assert not elsewhere.exists()


def test_any_byte_that_changes_is_noticed_or_means_nothing(bundle, elsewhere, tmp_path):
    """Flips in headers, contents and padding: refused, or, where tar pads, without effect."""
    whole = bundle.read_bytes()
    import_bundle(bundle)
    wanted = tree(elsewhere)
    refused = 0
    for number, place in enumerate(range(0, len(whole), 1499)):
        changed = bytearray(whole)
        changed[place] ^= 0x11
        bundle.write_bytes(changed)
        target = tmp_path / f"flip{number}"
        with env.scope(BITBLAS_CACHE_DIR=target):
            try:
                import_bundle(bundle)
                assert tree(target) == wanted
            except ArtifactError:
                refused += 1
                assert not target.exists()
    assert refused > 10


@pytest.mark.parametrize("share", [0, 0.02, 0.3, 0.7, 0.97])
def test_a_bundle_that_is_cut_off(bundle, elsewhere, share):
    content = bundle.read_bytes().rstrip(b"\0")
    bundle.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ArtifactError, match=r"no bundle of operators|is cut off|is missing"):
        import_bundle(bundle)
    assert not elsewhere.exists()


@pytest.mark.parametrize("content", [b"", b"PK\3\4 a zip", b"\x1f\x8b" + bytes(40), bytes(10240), b"x" * 2048])
def test_a_file_that_is_no_bundle(tmp_path, elsewhere, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"a\.tar: it is no bundle of operators"):
        import_bundle(path)
    assert not elsewhere.exists()


def test_another_archive(tmp_path, elsewhere):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(__file__, "test.py")
    with pytest.raises(ArtifactError, match=r"does not begin with 'bundle\.json'"):
        import_bundle(tmp_path / "a.tar")


def nested(depth=100_000):
    return b'{"a":' + b"[" * depth + b"]" * depth + b"}"


def deep_member(ending):
    """A record that nests deeply, and that the index knows."""

    def change(found):
        place = place_of(found, ending)
        member, content = found[place][0], nested()
        member.size = len(content)
        found[place] = (member, content)
        listed = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        reindexed(lambda index: index["members"][member.name].update(listed))(found)

    return change


@pytest.mark.parametrize("ending", ["manifest.json", "tuning"])
def test_records_that_nest_deeply(bundle, elsewhere, ending):
    name = next(m.name for m, _ in members(bundle) if m.name.endswith(ending) or m.name.startswith(f"{ending}/"))
    rewrite(bundle, deep_member(name))
    with pytest.raises(ArtifactError, match=f"two.tar: '{name}' is not "):
        import_bundle(bundle)
    assert not elsewhere.exists()


def test_an_index_that_nests_deeply(tmp_path, elsewhere):
    content, path = nested(), tmp_path / "a.tar"
    with tarfile.open(path, "w:", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo(INDEX)
        member.size, member.mode = len(content), 0o444
        archive.addfile(member, io.BytesIO(content))
    with pytest.raises(ArtifactError, match=r"a\.tar: 'bundle\.json' is not the index of a bundle"):
        import_bundle(path)
    assert not elsewhere.exists()


@pytest.mark.parametrize("kind", "xgLKSVDNM", ids=str)
@pytest.mark.parametrize("place", ["first", "last"])
def test_headers_that_are_for_tarfile_alone(bundle, elsewhere, kind, place):
    """Names, sizes and maps of what follows are not even read, of whatever size they say they are."""
    whole = bundle.read_bytes()
    for size, content in (
        (1 << 40, b""),
        (-1, b""),
        (None, b"19 GNU.sparse.map=1,\n"),
        (None, b"22 GNU.sparse.size=x\n"),
        (None, b"12 size=abc\n"),
        (None, b"99999999999 path=a\n"),
    ):
        member = tarfile.TarInfo("header")
        member.type, member.size, member.mode = kind.encode(), len(content) if size is None else size, 0o444
        made = member.tobuf(tarfile.GNU_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")
        with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
            end = max(m.offset_data + -(-m.size // 512) * 512 for m in archive) if place == "last" else 0
        bundle.write_bytes(whole[:end] + made + whole[end:])
        with pytest.raises(ArtifactError, match=r"two\.tar: .*'header' is no plain file"):
            import_bundle(bundle)
        assert not elsewhere.exists()


def test_a_missing_file_is_an_os_error(tmp_path, elsewhere):
    with pytest.raises(FileNotFoundError):
        import_bundle(tmp_path / "none.tar")


# -- stores that do not take it --------------------------------------------------------------------------------------------


def test_a_store_that_others_may_write(bundle, elsewhere):
    elsewhere.mkdir(mode=0o777)
    elsewhere.chmod(0o777)
    with pytest.raises(ArtifactError, match="may be written by others"):
        import_bundle(bundle)
    assert list(elsewhere.iterdir()) == []


def test_a_store_without_room(bundle, elsewhere, monkeypatch):
    real = os.statvfs

    def small(path):
        found = list(real(path))
        found[4] = 1  # f_bavail
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", small)
    with pytest.raises(ArtifactError, match="the bundle needs"):
        import_bundle(bundle)
    assert not (elsewhere / "artifacts").exists()


def test_a_store_that_fills_up_keeps_what_is_whole(bundle, elsewhere, monkeypatch):
    """The second operator meets a full disk: the first stays, nothing half-written does, and a second try ends it."""
    real, calls = store_module._sync_tree, []

    def sync(directory):
        calls.append(directory)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(directory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "_sync_tree", sync)
        with pytest.raises(ArtifactError, match="is full: free some room"):
            import_bundle(bundle)
    assert len(ArtifactStore(elsewhere).entries()) == 1
    assert list((elsewhere / "staging").iterdir()) == []
    assert not (elsewhere / "tuning").exists()
    process_module.this_process.reset()
    found = import_bundle(bundle)
    assert (len(found.added), len(found.kept), found.tuning) == (1, 1, 1)


# -- machines without TVM --------------------------------------------------------------------------------------------------


def test_without_tvm_any_versions_bundle_serves(store, tmp_path, elsewhere, monkeypatch):
    with env.scope(BITBLAS_CACHE_DIR=store):
        tuned = tune(config())
        artifact = put(store, config(), tuned=tuned)
        export_store(tmp_path / "a.tar")
    without_tvm(monkeypatch)
    assert import_bundle(tmp_path / "a.tar").added == (artifact.key,)
    assert not record_path(config(), TARGET).exists()  # it has the name that TVM's version gave it …
    assert load_record(config(), TARGET) == tuned  # … and is found
    assert load_record(config(128), TARGET) is None
    assert load_record(config(), OTHER_TARGET) is None
    plan = plan_matmul(config(), TARGET, tuned)
    assert provider._load_of_any_compiler(plan, ArtifactStore(elsewhere)).key == artifact.key


def test_without_tvm_other_tilings_serve(store, monkeypatch):
    """An operator whose tuning record, or card, is not here: what there is computes the same."""
    put(store, config(128))
    artifact = put(store, config(), tuned=fake_store.other_tilings(config()))
    loaded = []
    monkeypatch.setattr(provider, "load_kernels", lambda library, plan: loaded.append((library, plan)))
    plan = plan_matmul(config(), TARGET)
    without_tvm(monkeypatch)
    found = provider.provide(plan)
    assert found.plan.tilings == fake_store.other_tilings(config()) != plan.tilings
    assert loaded == [(artifact.library, found.plan)]
    assert (found.plan.layout, found.plan.config) == (plan.layout, plan.config)
    monkeypatch.setattr(provider, "build_library", no_tvm)
    with pytest.raises(BuildError, match="no TVM here"):
        provider.provide(plan_matmul(config(256), TARGET))


def test_without_tvm_what_was_built_for_another_card_serves(store, monkeypatch):
    """Of the same capability: which tilings are the defaults depends on the card's numbers."""
    card, cfg = resolve_target("cuda -arch=sm_90"), config(4096, K=4096)
    plan = plan_matmul(cfg, fake_store.with_other_card(card))
    artifact = put(store, cfg, card)
    assert plan.tilings != plan_matmul(cfg, card).tilings
    monkeypatch.setattr(provider, "load_kernels", lambda library, plan: (library, plan))
    monkeypatch.setitem(provider.SOURCES, "cuda", "schedule.py")
    without_tvm(monkeypatch)
    found = provider.provide(plan)
    assert found.kernels == (artifact.library, found.plan)
    assert found.plan.tilings == plan_matmul(cfg, card).tilings
    assert found.plan.target == plan.target


IMPORT = """
import json, sys
from bitblas.cache import import_bundle
print("ready", flush=True)
sys.stdin.readline()
found = import_bundle(sys.argv[1])
print(json.dumps([len(found.added), len(found.kept)]), flush=True)
"""


def test_processes_that_import_the_same_bundle(bundle, elsewhere):
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "BITBLAS_CACHE_DIR": str(elsewhere)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": variables}
    processes = [subprocess.Popen([sys.executable, "-c", IMPORT, str(bundle)], **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    assert sum(added for added, _ in found) == 2
    assert all(added + kept == 2 for added, kept in found)
    assert len(ArtifactStore(elsewhere).entries()) == 2
    assert list((elsewhere / "staging").iterdir()) == []


def no_tvm(*_):
    raise BuildError("no TVM here")


def test_with_tvm_other_tilings_are_no_answer(store, monkeypatch):
    put(store, config(), tuned=fake_store.other_tilings(config()))
    monkeypatch.setattr(provider, "build_library", no_tvm)
    with pytest.raises(BuildError, match="no TVM here"):
        provider.provide(plan_matmul(config(), TARGET))
