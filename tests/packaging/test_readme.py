"""The README's commands and the examples are run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def blocks() -> list[str]:
    """The shell blocks of the README, without those that call make, which CI runs itself."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    return [block for block in found if not block.lstrip().startswith("make")]


def test_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    made = re.findall(r"^make .*$", text, flags=re.MULTILINE)
    assert [line.split("#")[0].strip() for line in made] == ["make demo", "make test"]


def test_pictures_and_links_are_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in t]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.slow
def test_the_commands_work_in_this_order(tmp_path: Path) -> None:
    """Each block in one shell and one folder, the next after it, so that they may build on each other."""
    assert len(blocks()) >= 2
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for block in blocks():
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_the_closed_loop_example(tmp_path: Path) -> None:
    pytest.importorskip("robosuite", reason="the simulator is not installed: make sim")
    otau = Path(sys.executable).parent / "otau"
    for command in (
        [otau, "init", "--out", "checkpoint"],
        [otau, "compile", "checkpoint", "--out", "bundle", "--num-steps", "2"],
        [sys.executable, ROOT / "examples" / "01_closed_loop" / "closed_loop.py", "bundle", "15"],
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "after 0 steps: a chunk of 10" in done.stdout
    assert "after 10 steps" in done.stdout
