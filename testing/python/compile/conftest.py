"""What tests of compiled kernels share."""

import pytest

import neon


@pytest.fixture(scope="session")
def objects(tmp_path_factory):
    """The program that calls kernels for ARM, compiled: see `neon.link`."""
    return neon.compile_driver(tmp_path_factory.mktemp("driver"))
