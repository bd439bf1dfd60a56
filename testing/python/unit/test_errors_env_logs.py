"""Exceptions, environment variables and logging: what they promise, and that nothing happens at import."""

import io
import logging
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitblas import env, errors, logs, sources

PACKAGE = str(Path(env.__file__).parent)
CHILDREN = {
    errors.ConfigError: ValueError,
    errors.ArgumentError: ValueError,
    errors.UnsupportedError: NotImplementedError,
    errors.ArtifactError: RuntimeError,
    errors.BuildError: RuntimeError,
    errors.CheckpointError: RuntimeError,
    errors.RemoteError: RuntimeError,
}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """An environment without our variables, and a logger as after the import."""
    for variable in env.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    logger = logging.getLogger("bitblas")
    before = logger.level
    logger.setLevel(logging.NOTSET)
    yield
    logger.setLevel(before)


def run_python(code, **variables):
    """Run code in a fresh process which leaves the package's own `__init__`, and with it torch, out."""
    bare = f"import sys, types; sys.modules['bitblas'] = p = types.ModuleType('bitblas'); p.__path__ = [{PACKAGE!r}]"
    return subprocess.run(
        [sys.executable, "-c", f"{bare}\n{code}"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "builtin"), CHILDREN.items(), ids=lambda kind: kind.__name__)
def test_errors_are_ours_and_builtin(error, builtin):
    assert issubclass(error, errors.BitBLASError)
    assert issubclass(error, builtin)
    assert not issubclass(error, OSError)
    assert str(error("M is 0: expected at least 1")) == "M is 0: expected at least 1"


def test_build_error_shows_command_and_output():
    error = errors.BuildError("cannot link", "cc -shared k.o", "ld: no such file\n")
    assert (error.command, error.output) == ("cc -shared k.o", "ld: no such file\n")
    assert str(error) == "cannot link\ncommand: cc -shared k.o\noutput:\nld: no such file"


def test_build_error_survives_pickling():
    error = pickle.loads(pickle.dumps(errors.BuildError("cannot link", "cc", "bad")))
    assert (str(error), error.command, error.output) == ("cannot link\ncommand: cc\noutput:\nbad", "cc", "bad")


# ---- env -------------------------------------------------------------------------------------------------------------


def test_variables_are_a_proper_table():
    names = [variable.name for variable in env.VARIABLES]
    assert len(set(names)) == len(names)
    assert all(name.startswith("BITBLAS_") for name in names)
    assert all(variable.doc and "\n" not in variable.doc for variable in env.VARIABLES)


def test_defaults():
    assert env.TARGET.get() == ""
    assert env.CACHE_DIR.get() == Path("~/.cache/bitblas").expanduser()
    assert env.LOG_LEVEL.get() == "WARNING"
    assert env.CC.get() == ""
    assert env.KEEP_BUILD.get() is False


def test_the_environment_is_read_on_use(monkeypatch, tmp_path):
    monkeypatch.setenv("BITBLAS_CACHE_DIR", str(tmp_path))
    assert env.CACHE_DIR.get() == tmp_path
    monkeypatch.setenv("BITBLAS_CACHE_DIR", "")
    assert env.CACHE_DIR.get() == Path("~/.cache/bitblas").expanduser()


def test_a_relative_path_becomes_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with env.scope(BITBLAS_CACHE_DIR="here"):
        assert env.CACHE_DIR.get() == tmp_path / "here"


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("TRUE", True), ("Yes", True), (" on ", True), ("0", False), ("off", False)]
)
def test_bools(monkeypatch, text, value):
    monkeypatch.setenv("BITBLAS_KEEP_BUILD", text)
    assert env.KEEP_BUILD.get() is value


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("BITBLAS_KEEP_BUILD", "maybe", "1, 0, true, false"),
        ("BITBLAS_LOG_LEVEL", "loud", "DEBUG, INFO, WARNING"),
    ],
)
def test_a_malformed_value_is_refused(monkeypatch, name, text, allowed):
    monkeypatch.setenv(name, text)
    variable = next(variable for variable in env.VARIABLES if variable.name == name)
    with pytest.raises(errors.ConfigError, match=rf"{name}='{text}' is not allowed: expected {allowed}"):
        variable.get()


def test_a_malformed_path_is_refused():
    with (
        pytest.raises(errors.ConfigError, match=r"BITBLAS_CACHE_DIR='a\\x00b' is not allowed: expected the path"),
        env.scope(BITBLAS_CACHE_DIR="a\0b"),
    ):
        pass


def test_scopes_nest_and_restore(monkeypatch, tmp_path):
    monkeypatch.setenv("BITBLAS_TARGET", "cuda")
    with env.scope(BITBLAS_TARGET="llvm", BITBLAS_KEEP_BUILD=True):
        assert (env.TARGET.get(), env.KEEP_BUILD.get()) == ("llvm", True)
        with env.scope(BITBLAS_TARGET=None, BITBLAS_CACHE_DIR=tmp_path):
            assert (env.TARGET.get(), env.KEEP_BUILD.get(), env.CACHE_DIR.get()) == ("", True, tmp_path)
        assert env.TARGET.get() == "llvm"
    assert (env.TARGET.get(), env.KEEP_BUILD.get()) == ("cuda", False)


def test_a_scope_restores_after_an_exception():
    with pytest.raises(KeyError), env.scope(BITBLAS_TARGET="llvm"):
        raise KeyError("x")
    assert env.TARGET.get() == ""


def test_a_scope_refuses_an_unknown_name():
    with pytest.raises(errors.ConfigError, match="unknown variable BITBLAS_TARGT: expected one of BITBLAS_TARGET, "):
        env.scope(BITBLAS_TARGT="llvm").__enter__()


def test_a_scope_refuses_a_malformed_value_and_restores():
    with pytest.raises(errors.ConfigError, match="BITBLAS_LOG_LEVEL='loud'"):
        env.scope(BITBLAS_LOG_LEVEL="loud").__enter__()
    assert env.LOG_LEVEL.get() == "WARNING"


def test_settings_lists_everything_and_never_raises(monkeypatch):
    monkeypatch.setenv("BITBLAS_KEEP_BUILD", "maybe")
    rows = {row.name: row for row in env.settings()}
    assert list(rows) == [variable.name for variable in env.VARIABLES]
    assert (rows["BITBLAS_KEEP_BUILD"].value, rows["BITBLAS_KEEP_BUILD"].is_default) == ("maybe", False)
    assert (rows["BITBLAS_CC"].value, rows["BITBLAS_CC"].is_default) == ("", True)


# ---- logs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("debug", logging.DEBUG),
        ("Warning", logging.WARNING),
        ("WARN", logging.WARNING),
        (" error ", logging.ERROR),
        ("critical", logging.CRITICAL),
        ("chatty", logging.INFO),
        ("", logging.INFO),
        (logging.ERROR, logging.ERROR),
        (15, 15),
    ],
)
def test_set_log_level(level, expected):
    logs.set_log_level(level)
    assert logs.get_logger().level == expected


def test_quiet_by_default():
    assert logs.get_logger().getEffectiveLevel() == logging.WARNING


def test_the_level_comes_from_the_environment_at_first_use():
    with env.scope(BITBLAS_LOG_LEVEL="debug"):
        assert logs.get_logger().level == logging.DEBUG


def test_a_level_that_is_set_outlives_the_environment():
    logging.getLogger("bitblas").setLevel(logging.ERROR)
    with env.scope(BITBLAS_LOG_LEVEL="debug"):
        assert logs.get_logger().level == logging.ERROR


def test_a_misspelt_level_is_reported_and_does_no_harm(monkeypatch, caplog):
    monkeypatch.setenv("BITBLAS_LOG_LEVEL", "loud")
    assert logs.get_logger().level == logging.WARNING
    assert "BITBLAS_LOG_LEVEL='loud' is not allowed" in caplog.text


def test_warn_once(caplog):
    for number in range(3):
        logs.warn_once("a", "first %d", number)
    logs.warn_once("b", "second")
    assert [record.getMessage() for record in caplog.records] == ["first 0", "second"]
    assert caplog.records[0].filename == Path(__file__).name


CODE = "from bitblas import logs; {}; logs.get_logger().info('hello'); logs.get_logger().warning('careful')"


def test_warnings_reach_standard_error_without_any_configuration():
    result = run_python(CODE.format("pass"))
    assert (result.stdout, result.stderr) == ("", "bitblas WARNING: careful\n")


def test_a_lower_level_reaches_standard_error_too():
    result = run_python(CODE.format("logs.set_log_level('info')"))
    assert result.stderr == "bitblas INFO: hello\nbitblas WARNING: careful\n"


def test_the_handlers_of_the_application_take_over():
    result = run_python(CODE.format("import logging; logging.basicConfig(format='app %(message)s')"))
    assert result.stderr == "app careful\n"


def test_the_import_configures_nothing():
    code = (
        "import logging, bitblas.logs; logger = logging.getLogger('bitblas');"
        "assert logger.level == logging.NOTSET and not logging.getLogger().handlers"
    )
    assert run_python(code, BITBLAS_LOG_LEVEL="nonsense", BITBLAS_CACHE_DIR="").stderr == ""


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_the_sources_of_the_checkout_are_found():
    assert (sources.source_dir() / "README.md").is_file()
    assert len(sources.source_digest()) == 64


def test_the_packaged_sources_come_first(monkeypatch, tmp_path):
    packaged = tmp_path / "lib" / "bitblas" / "src"
    for directory in (packaged, tmp_path / "src"):
        directory.mkdir(parents=True)
        (directory / "README.md").write_text("sources")
    monkeypatch.setattr(sources, "__file__", str(packaged.parent / "sources.py"))
    assert sources.source_dir() == packaged


def test_missing_sources_are_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "lib" / "bitblas" / "sources.py"))
    with pytest.raises(errors.BitBLASError, match="the installation is incomplete, reinstall it"):
        sources.source_dir()


def test_the_digest_follows_names_and_contents_but_not_documentation(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "source_dir", lambda: tmp_path)
    digest = sources.source_digest.__wrapped__

    def write(name, text):
        (tmp_path / name).write_text(text)
        return digest()

    first = write("a.c", "int x;")
    assert write("README.md", "words") == first
    changed = {
        first,
        write("a.c", "int y;"),
        write("b.c", ""),
        (tmp_path / "b.c").rename(tmp_path / "c.c") and digest(),
    }
    assert len(changed) == 4


# -- progress --------------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
@pytest.mark.parametrize("patience", [0, 3600])
def test_bars_are_for_terminals_and_for_what_takes_long(monkeypatch, stream, patience):
    monkeypatch.setattr(logs, "_PATIENCE_SECONDS", patience)
    monkeypatch.setattr(sys, "stderr", stream())
    with logs.progress("building it", 2) as step:
        for name in ("first", "second"):
            step(name)
            time.sleep(0.15)  # a bar is not drawn more often than every 0.1 s
    assert list(logs.tracked([3, 4], "walking")) == [3, 4]
    shown = sys.stderr.getvalue()
    if stream is Terminal and patience == 0:
        for text in ("building it", "1/2", "second", "2/2", "walking"):
            assert text in shown
    else:
        assert shown == ""
