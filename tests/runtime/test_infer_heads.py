"""`otau infer` with a bundle of several normalisation heads, as real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def infer(*arguments):
    command = [Path(sys.executable).with_name("otau"), "infer", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_head_is_the_recordings_or_the_one_that_is_named(bundle, tmp_path):
    rng = np.random.default_rng(0)
    both, without, out = (tmp_path / f"{name}.safetensors" for name in ("both", "without", "out"))
    inputs = {
        "image0": rng.random((2, 3, 8, 8), np.float32),
        "image1": rng.random((2, 3, 9, 7), np.float32),
        "state": rng.random((2, 3), np.float32),
        "lang_tokens": np.ones((2, 6), np.int64),
        "lang_masks": np.ones((2, 6), bool),
        "noise": rng.standard_normal((2, 5, 4), np.float32),
    }
    save_file(inputs, without)
    save_file(inputs | {"dataset_index": np.array([0, 1])}, both)
    done = infer(bundle, "--inputs", without)
    assert done.returncode == 2
    assert "several normalisation heads" in done.stderr
    assert "arm::joint, arm::pose" in done.stderr
    actions = []
    for options in (["--norm-head", "arm::joint"], ["--norm-head", "1"]):
        done = infer(bundle, "--inputs", without, "--save", out, *options)
        assert done.returncode == 0, done.stderr
        actions.append(load_file(out)["actions"])
    assert infer(bundle, "--inputs", both, "--save", out).returncode == 0
    np.testing.assert_array_equal(load_file(out)["actions"], [actions[0][0], actions[1][1]])
    assert not np.array_equal(actions[0], actions[1])
