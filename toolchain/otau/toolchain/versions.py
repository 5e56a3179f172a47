"""The versions that have a hand in a bundle."""

from __future__ import annotations

import platform
from importlib import metadata

__all__ = ["package_versions"]

_PACKAGES = ("otau", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that have a hand in a bundle."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}
