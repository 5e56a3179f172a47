"""What every test relies on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# No test asserts an absolute time, and a busy machine is no failure.
settings.register_profile("otau", deadline=None)
settings.load_profile("otau")

# A shell starts what runs in the background with Ctrl-C ignored, and the commands under test inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One compile cache for all tests, and not the user's; commands that tests start see it, too."""
    root = tmp_path_factory.mktemp("compile_cache")
    before = os.environ.get("OTAU_CACHE")
    os.environ["OTAU_CACHE"] = str(root)
    yield root
    if before is None:
        del os.environ["OTAU_CACHE"]
    else:
        os.environ["OTAU_CACHE"] = before
