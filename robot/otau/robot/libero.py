"""The LIBERO benchmark: `--robot libero:libero_object/0`, forty tasks in four suites."""

from __future__ import annotations

import logging
import os
import re
from importlib.metadata import version
from typing import Any

import numpy as np

from otau.robot.libero_files import ASSETS_VARIABLE, import_libero, libero_assets, load_init_states
from otau.robot.panda import PandaRobot, panda_spec
from otau.robot.simulator import require_package
from otau.runtime.errors import MissingDependencyError, UsageError, nearest_name

__all__ = ["LIBERO_SUITES", "LiberoRobot"]

LIBERO_SUITES = {"libero_spatial": 280, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
"""Suite -> actions after which an episode has failed, as published evaluations count."""

_SETTLING = np.array([0.0] * 6 + [-1.0])
"""Standing still with the gripper open."""

_SETTLING_STEPS = 10

_LAST_FAITHFUL_MUJOCO = (3, 3, 2)

_LOG = logging.getLogger(__name__)


class LiberoRobot(PandaRobot):
    """A Panda arm in a task of LIBERO, from the benchmark's own initial states."""

    def __init__(self, task: str, assets: str | os.PathLike[str] | None = None) -> None:
        """Build the task's environment.

        Args:
            task: `SUITE/INDEX` or `SUITE/NAME`, such as `libero_spatial/0`.
            assets: Folder of meshes and textures; None: `$OTAU_LIBERO_ASSETS`, else the originals,
                fetched from the hub once.

        Raises:
            UsageError: There is no such suite or task, or the folder is not one of assets.
            MissingDependencyError: LIBERO, robosuite, OpenGL or the assets are not there.
        """
        suite, _, which = task.partition("/")
        if suite not in LIBERO_SUITES:
            raise UsageError(
                f"LIBERO has no suite {suite!r}",
                where="--robot libero:SUITE/TASK",
                fix=nearest_name(suite, LIBERO_SUITES),
            )
        named = assets or os.environ.get(ASSETS_VARIABLE)
        self._assets = libero_assets(named)
        tasks = import_libero(self._assets).benchmark.task_maps[suite]
        _warn_of_unfaithful_mujoco()
        found = tasks[_task_name(suite, which, list(tasks))]
        package = require_package("libero") / "libero"
        self._definition = package / "bddl_files" / suite / found.bddl_file
        self._init_states = load_init_states(package / "init_files" / suite / found.init_states_file)
        origin = str(self._assets) if named else "hub"
        super().__init__(panda_spec(f"libero:{task}", found.language, LIBERO_SUITES[suite], origin))

    def _make(self) -> Any:
        from libero.libero.envs import OffScreenRenderEnv

        # Its wrapper is used for what it sets up. Its `reset` is not: a `continue` in a `finally`
        # swallows every exception, Ctrl-C too, and tries again for ever.
        try:
            self._wrapper = OffScreenRenderEnv(
                bddl_file_name=str(self._definition), **self._environment_options
            )
        except (OSError, ValueError) as error:  # of the parser of XML and of MuJoCo, where a file lacks
            raise MissingDependencyError(
                "the scene cannot be built from these LIBERO assets",
                where=self._assets,
                got=str(error).splitlines()[0],
                fix="name a complete folder, or none to fetch the originals",
            ) from error
        return self._wrapper.env

    def _begin(self, seed: int | None) -> None:
        """Reset, then set the benchmark's initial state `seed` (modulo their number), then let it settle.

        In this order: a reset after it would draw a state of its own.
        """
        super()._begin(seed)
        count = len(self._init_states)
        index = int(np.random.default_rng().integers(count)) if seed is None else seed % count
        self._wrapper.set_init_state(self._init_states[index])
        for _ in range(_SETTLING_STEPS):
            self._env.step(_SETTLING)


def _task_name(suite: str, which: str, names: list[str]) -> str:
    """The task's full name, from its index or its name."""
    if which.isascii() and which.isdigit() and int(which) < len(names):
        return names[int(which)]
    if which in names:
        return which
    indices = f"0 to {len(names) - 1}"
    fix = f"an index, {indices}" if which.isdigit() or not which else nearest_name(which, names)
    raise UsageError(f"the suite {suite} has no task {which!r}", where="--robot libero:SUITE/TASK", fix=fix)


def _warn_of_unfaithful_mujoco() -> None:
    """Say so where MuJoCo is newer than the one that plays LIBERO as it was recorded.

    From 3.3.3 on it draws LIBERO a quarter darker (Lifelong-Robot-Learning/LIBERO#88), and from 3.4.0
    on the bowl of libero_spatial/5 slides off its ramekin while settling (huggingface/lerobot#4390).
    """
    found = version("mujoco")
    if tuple(int(part) for part in re.findall(r"\d+", found)[:3]) > _LAST_FAITHFUL_MUJOCO:
        newest = ".".join(map(str, _LAST_FAITHFUL_MUJOCO))
        _LOG.warning("MuJoCo %s shows LIBERO otherwise than it was recorded; use mujoco==%s", found, newest)
