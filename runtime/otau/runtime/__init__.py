"""Runs a bundle: the part of otau that is on the robot."""

from __future__ import annotations

from otau.runtime.bundle import Bundle
from otau.runtime.errors import OtauError
from otau.runtime.observation import Observation
from otau.runtime.policy import ActionChunk, Policy
from otau.runtime.prefix import KVCache

__all__ = ["ActionChunk", "Bundle", "KVCache", "Observation", "OtauError", "Policy"]
