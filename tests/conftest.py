"""What every test relies on."""

from __future__ import annotations

import signal

from hypothesis import settings

# No test asserts an absolute time, and a busy machine is no failure.
settings.register_profile("otau", deadline=None)
settings.load_profile("otau")

# A shell starts what runs in the background with Ctrl-C ignored, and the commands under test inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
