"""What is read of a checkpoint to show it."""

from __future__ import annotations

import pytest

from otau.runtime import checkpoint_facts
from otau.runtime.checkpoint_facts import read_checkpoint_facts
from otau.runtime.errors import CheckpointError


def test_a_configuration_beyond_bounds_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"type": "pi05"}')
    assert read_checkpoint_facts(tmp_path).policy == "pi05"
    monkeypatch.setattr(checkpoint_facts, "_MAX_CONFIG_BYTES", 15)
    with pytest.raises(CheckpointError, match="more than 15 bytes"):
        read_checkpoint_facts(tmp_path)
