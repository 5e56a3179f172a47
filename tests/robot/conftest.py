import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.register_assert_rewrite("otau.robot.conformance")

SHARED_ASSETS = Path(__file__).parents[3] / "shared/libero/assets"

# Stand-ins replace some of the original textures and meshes there, so no success rate measured with
# them can be compared with published ones; none is measured here.
if SHARED_ASSETS.is_dir():
    os.environ.setdefault("OTAU_LIBERO_ASSETS", str(SHARED_ASSETS))


@pytest.fixture(scope="session")
def otau_script():
    """The console script that belongs to this Python."""
    return Path(sys.executable).with_name("otau")


@pytest.fixture(scope="session")
def otau(otau_script):
    """Run the command in a process of its own, as a user does."""

    def call(*arguments, **options):
        command = [otau_script, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)

    return call


@pytest.fixture(scope="session")
def bundle(tmp_path_factory, otau):
    """A bundle of a randomly initialised policy, made as a user makes one."""
    pytest.importorskip("onnxscript", reason="the toolchain is not installed")
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    otau("init", "--policy", "pi05", "--size", "tiny", "--out", checkpoint, check=True)
    otau("compile", checkpoint, "--target", "cpu", "-o", bundle, check=True)
    return bundle


@pytest.fixture(scope="session")
def decode_video():
    """Read a video back: its frames (h, w, 3) uint8, its rate [Hz], its codec."""
    av = pytest.importorskip("av", reason="PyAV is not installed: make sim")

    def decode(path):
        with av.open(str(path)) as container:
            (stream,) = container.streams
            frames = [picture.to_ndarray(format="rgb24") for picture in container.decode(stream)]
            return frames, float(stream.average_rate), stream.codec_context.name

    return decode
