"""What all tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.world import World

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is there; see `torchrun_environment`
# Machines that run tests are busy: how long an example takes says nothing.
settings.register_profile("tplaunch", deadline=None)
settings.load_profile("tplaunch")

gc.disable()  # until all is collected: what so many modules leave would be looked through again and again

COLLECTED = pytest.StashKey[list[pytest.Item]]()  # all tests that pytest found, before markers leave some out


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = list(items)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def cache_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what tests make out of the user's cache; before `world`, whose processes inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPLAUNCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Makes small worlds."""
    from tests.world import World

    with World() as made:
        yield made
