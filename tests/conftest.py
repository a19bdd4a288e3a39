"""Deterministic tests: hypothesis replays the same examples on every machine, and nothing has a deadline."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import cuda_tools

settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def emulated_objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Object files of everything but the kernels, for libraries in which the kernels run on an emulated device; one
    folder of them for all processes of a run of the tests."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    (folder / "emulated").mkdir(exist_ok=True)
    return cuda_tools.compile_hosts(folder / "emulated")


@pytest.fixture(scope="session")
def emulated_library(emulated_objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library without sanitizers."""
    return cuda_tools.link_kernels(emulated_objects, tmp_path_factory.mktemp("plain"))


LONG = ("test_core.py", "test_cuda_kernels.py", "test_cuda_static.py", "test_runs.py", "test_compare_end_to_end.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first: a worker that starts one of them last leaves the others idle."""
    items.sort(key=lambda item: item.path.name not in LONG)
