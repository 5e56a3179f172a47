import subprocess
import sys

NOISE = """
import ctypes, os, sys
from otau.robot.streams import stdout_to_stderr

print("before")
try:
    with stdout_to_stderr():
        print("noise of Python")
        ctypes.CDLL(None).puts(b"noise of C")
        os.write(1, b"noise of the system\\n")
        os.system("echo noise of a child")
        {failure}
except RuntimeError:
    pass
print("after")
"""


def test_only_what_is_printed_outside_reaches_stdout():
    for failure in ("pass", "raise RuntimeError"):
        done = subprocess.run(
            [sys.executable, "-c", NOISE.format(failure=failure)], capture_output=True, text=True, check=True
        )
        assert done.stdout == "before\nafter\n"
        assert sorted(line.split()[-1] for line in done.stderr.splitlines()) == [
            "C",
            "Python",
            "child",
            "system",
        ]
