"""What every test relies on."""

from __future__ import annotations

import signal

# A shell starts what runs in the background with Ctrl-C ignored, and the commands under test inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
