import os
from pathlib import Path

import pytest

pytest.register_assert_rewrite("otau.robot.conformance")

SHARED_ASSETS = Path(__file__).parents[3] / "shared/libero/assets"

# Stand-ins replace some of the original textures and meshes there, so no success rate measured with
# them can be compared with published ones; none is measured here.
if SHARED_ASSETS.is_dir():
    os.environ.setdefault("OTAU_LIBERO_ASSETS", str(SHARED_ASSETS))
