"""Importing the clients whose code the interop tests run."""

import importlib
import importlib.util
import os
from types import ModuleType

import pytest


def require(package: str) -> None:
    """Skip the module that tests with a client, loudly, where that is absent.

    A client that is installed and cannot be imported is a failure.
    """
    if importlib.util.find_spec(package) is None:
        reason = f"{package} IS NOT INSTALLED, nothing was tested with it: `make interop` installs and tests it"
        pytest.skip(reason, allow_module_level=True)


def import_client(module: str) -> ModuleType:
    """A module of a client: when a test runs, since some take seconds and set variables of the environment."""
    environment = dict(os.environ)
    try:
        return importlib.import_module(module)
    finally:
        os.environ.clear()
        os.environ.update(environment)
