"""Finding an OpenGL that draws without a screen, before MuJoCo is asked to."""

from __future__ import annotations

import ctypes
import logging
import os

from otau.runtime.errors import MissingDependencyError, UsageError

__all__ = ["choose_renderer"]

_LOG = logging.getLogger(__name__)

_PACKAGES = {"egl": "libegl1 libgl1-mesa-dri", "osmesa": "libosmesa6"}
"""Debian packages of each back end."""

_DEVICE = "MUJOCO_EGL_DEVICE_ID"
_EGL_PLATFORM_DEVICE = 0x313F
_MAX_DEVICES = 16


def choose_renderer() -> str:
    """Set `MUJOCO_GL` to a back end that works: EGL, else OSMesa, or the one already set there.

    Must run before robosuite is imported, which reads the variable once. Both back ends draw the same
    pictures to the byte; EGL uses a GPU where there is one.

    Returns:
        `egl` or `osmesa`.

    Raises:
        UsageError: `MUJOCO_GL` or `MUJOCO_EGL_DEVICE_ID` names something that robosuite cannot draw with.
        MissingDependencyError: The libraries are not there; the message names the packages.
    """
    asked = os.environ.get("MUJOCO_GL", "").lower().strip()
    if asked and asked not in _PACKAGES:
        raise UsageError(
            f"MUJOCO_GL={asked} is no renderer that works without a screen",
            expected="egl or osmesa",
            fix="unset MUJOCO_GL",
        )
    if asked != "osmesa":
        devices = _egl_devices()
        if devices:
            os.environ["MUJOCO_GL"] = "egl"
            if not os.environ.get("CUDA_VISIBLE_DEVICES"):
                # robosuite takes the first device blindly, and fails on an empty CUDA_VISIBLE_DEVICES.
                _check_device(os.environ.setdefault(_DEVICE, devices[0]), devices)
            return "egl"
    if asked != "egl" and _loads("libOSMesa.so.8"):
        if not asked:
            _LOG.warning("EGL has no usable device; drawing with OSMesa instead")
        os.environ["MUJOCO_GL"] = "osmesa"
        return "osmesa"
    raise MissingDependencyError(
        "the simulator cannot draw: no OpenGL that works without a screen",
        where=f"MUJOCO_GL={asked}" if asked else "egl and osmesa, both tried",
        fix=f"apt-get install {_PACKAGES[asked or 'egl']}",
    )


def _check_device(asked: str, devices: list[str]) -> None:
    """Refuse a device that is not there: robosuite would do so with tracebacks out of its destructors."""
    if asked not in devices:
        raise UsageError(
            "there is no such EGL device to draw on",
            where=_DEVICE,
            expected=" or ".join(devices),
            got=asked,
            fix=f"unset {_DEVICE}",
        )


def _egl_devices() -> list[str]:
    """Indices of the EGL devices that initialise, as text.

    Asked through ctypes: importing PyOpenGL's EGL would settle the process on it, working or not.
    """
    if not _loads("libEGL.so.1"):
        return []
    egl = ctypes.CDLL("libEGL.so.1")
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query_address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    display_address = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query_address or not display_address:
        return []
    query = ctypes.CFUNCTYPE(
        ctypes.c_uint, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int)
    )(query_address)
    get_display = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(
        display_address
    )
    egl.eglInitialize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    devices = (ctypes.c_void_p * _MAX_DEVICES)()
    count = ctypes.c_int()
    if not query(_MAX_DEVICES, devices, ctypes.byref(count)):
        return []
    displays = [get_display(_EGL_PLATFORM_DEVICE, devices[index], None) for index in range(count.value)]
    return [str(i) for i, shown in enumerate(displays) if shown and egl.eglInitialize(shown, None, None)]


def _loads(library: str) -> bool:
    """Whether the dynamic linker finds the library."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
