import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from otau.robot import libero, open_robot
from otau.robot.conformance import RobotConformance
from otau.robot.libero import LIBERO_SUITES, LiberoRobot
from otau.robot.libero_files import libero_assets, load_init_states
from otau.runtime.errors import MissingDependencyError, UsageError

if importlib.util.find_spec("libero") is None or importlib.util.find_spec("robosuite") is None:
    pytest.skip("LIBERO is not installed: make sim", allow_module_level=True)

needs_assets = pytest.mark.skipif(
    "OTAU_LIBERO_ASSETS" not in os.environ, reason="OTAU_LIBERO_ASSETS does not name LIBERO's assets"
)


@needs_assets
class TestLiberoObject(RobotConformance):
    @classmethod
    def open_robot(cls):
        return LiberoRobot("libero_object/0")


@needs_assets
@pytest.mark.parametrize(
    ("suite", "index"),
    [
        pytest.param(suite, index, marks=[pytest.mark.slow] if index else [])
        for suite in LIBERO_SUITES
        for index in range(10)
    ],
)
def test_every_task_starts_and_steps(suite, index):
    with LiberoRobot(f"{suite}/{index}") as robot:
        assert robot.spec.max_steps == LIBERO_SUITES[suite]
        assert robot.spec.prompt == robot.spec.prompt.lower()
        robot.reset(0)
        for _ in range(2):
            result = robot.act(np.zeros(7))
        assert not result.success


@needs_assets
def test_a_seed_is_an_initial_state_of_the_benchmark():
    with LiberoRobot("libero_spatial/0") as robot:
        states = robot._init_states
        settled = []
        for seed in (1, 1 + len(states), 2):
            robot.reset(seed)
            settled.append(robot._env.sim.get_state().flatten()[1:])
        assert np.array_equal(settled[0], settled[1])
        assert not np.array_equal(settled[0], settled[2])
        # After half a second of settling an object is where the benchmark's state has it, give or take
        # its fall; another state would be centimetres off.
        nq = robot._env.sim.model.nq
        plate = robot._env.sim.model.get_joint_qpos_addr("plate_1_joint0")[0]
        assert np.allclose(settled[0][plate : plate + 2], states[1][1 + plate : 3 + plate], atol=0.005)
        assert len(states[1]) == 1 + nq + robot._env.sim.model.nv


@needs_assets
@pytest.mark.skipif(
    int(version("mujoco").split(".")[1]) > 3, reason="from MuJoCo 3.4 on the bowl slides off its ramekin"
)
def test_the_bowl_stays_on_its_ramekin():
    with LiberoRobot("libero_spatial/5") as robot:
        robot.reset(0)
        positions, bodies = robot._env.sim.data.body_xpos, robot._env.obj_body_id
        bowl = positions[bodies["akita_black_bowl_1"]]
        ramekin = positions[bodies["glazed_rim_porcelain_ramekin_1"]]
        # 15 mm with MuJoCo 3.3, 37 mm, which is beside it, with 3.4 and later.
        assert np.linalg.norm((bowl - ramekin)[:2]) < 0.025
        assert bowl[2] > ramekin[2] + 0.02


@needs_assets
def test_a_missing_mesh_is_told(tmp_path):
    assets = tmp_path / "assets"
    shutil.copytree(os.environ["OTAU_LIBERO_ASSETS"], assets, copy_function=os.symlink)
    visual = assets / "stable_hope_objects/alphabet_soup/visual"
    visual.chmod(0o755)
    for mesh in visual.glob("*.msh"):
        mesh.unlink()
    with pytest.raises(MissingDependencyError, match="cannot be built") as failure:
        LiberoRobot("libero_object/0", assets)
    assert failure.value.where == assets


@needs_assets
def test_a_task_by_name_is_the_task_by_index():
    name = "pick_up_the_cream_cheese_and_place_it_in_the_basket"
    with LiberoRobot(f"libero_object/{name}") as by_name:
        assert by_name.spec.prompt == "pick up the cream cheese and place it in the basket"
        assert by_name.spec.name == f"libero:libero_object/{name}"


@needs_assets
@pytest.mark.parametrize(
    ("task", "hint"),
    [
        ("libero_objects/0", "did you mean 'libero_object'?"),
        ("libero_90/0", "libero_10"),
        ("libero_object", "0 to 9"),
        ("libero_object/10", "0 to 9"),
        ("libero_object/-1", "valid names"),
        ("libero_object/pick_up_the_milk", "did you mean 'pick_up_the_milk_and_place_it_in_the_basket'?"),
    ],
)
def test_unknown_tasks_are_refused_with_the_nearest_name(task, hint):
    with pytest.raises(UsageError) as refusal:
        LiberoRobot(task)
    assert hint in str(refusal.value)


def test_a_folder_that_holds_no_assets_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no folder of LIBERO assets") as refusal:
        open_robot("libero:libero_object/0", assets=tmp_path)
    assert "articulated_objects" in refusal.value.got


def test_assets_are_looked_for_in_order(tmp_path, monkeypatch):
    folders = {name: tmp_path / name for name in ("flag", "variable", "home/.cache/libero/assets")}
    for folder in folders.values():
        for name in ("articulated_objects", "scenes", "stable_scanned_objects", "turbosquid_objects"):
            (folder / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OTAU_LIBERO_ASSETS", str(folders["variable"]))
    assert libero_assets(folders["flag"]) == folders["flag"]
    assert libero_assets() == folders["variable"]
    monkeypatch.delenv("OTAU_LIBERO_ASSETS")
    assert libero_assets() == folders["home/.cache/libero/assets"]


@needs_assets
def test_a_robot_says_whether_its_assets_are_the_originals(monkeypatch):
    named = os.environ["OTAU_LIBERO_ASSETS"]
    with LiberoRobot("libero_object/0") as robot:
        assert robot.spec.assets == str(Path(named).resolve())
    monkeypatch.delenv("OTAU_LIBERO_ASSETS")
    monkeypatch.setattr(libero, "libero_assets", lambda folder: Path(folder or named))
    with LiberoRobot("libero_object/0", named) as robot:
        assert robot.spec.assets == named
    with LiberoRobot("libero_object/0") as robot:
        assert robot.spec.assets == "hub"


def test_without_assets_and_without_a_network_the_fix_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OTAU_LIBERO_ASSETS", raising=False)
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def unreachable(repository, **options):
        asked.update(options, repository=repository)
        raise OSError("no route to the hub")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(MissingDependencyError) as failure:
        libero_assets()
    assert "--libero-assets" in failure.value.fix
    assert "no route" in failure.value.got
    assert asked["repository"] == "lerobot/libero-assets"
    assert asked["repo_type"] == "dataset"
    assert not (tmp_path / ".cache/libero/assets").exists()


def test_fetched_assets_appear_only_when_complete(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OTAU_LIBERO_ASSETS", raising=False)
    hub = pytest.importorskip("huggingface_hub")

    def download(repository, *, repo_type, local_dir):
        assert not (tmp_path / ".cache/libero/assets").exists()
        for name in ("articulated_objects", "scenes", "stable_scanned_objects", "turbosquid_objects"):
            (local_dir / name).mkdir(parents=True)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert libero_assets() == tmp_path / ".cache/libero/assets"
    monkeypatch.setattr(hub, "snapshot_download", None)
    assert libero_assets() == tmp_path / ".cache/libero/assets"


@needs_assets
def test_importing_asks_nothing_and_touches_no_configuration_of_the_user(tmp_path):
    home = tmp_path / "home"
    (home / ".libero").mkdir(parents=True)
    (home / ".libero/config.yaml").write_text("benchmark_root: /elsewhere\n")
    code = (
        "from otau.robot.libero import LiberoRobot\n"
        "with LiberoRobot('libero_goal/0') as robot: print(robot.spec.prompt)"
    )
    environment = {**os.environ, "HOME": str(home)}
    environment.pop("LIBERO_CONFIG_PATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == "open the middle drawer of the cabinet\n"
    assert (home / ".libero/config.yaml").read_text() == "benchmark_root: /elsewhere\n"


@needs_assets
def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    code = (
        "from otau.robot.libero import LiberoRobot\n"
        "from otau.runtime.errors import MismatchError\n"
        "try: LiberoRobot('libero_goal/0')\n"
        "except MismatchError as error: print(error.fix)"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert "XDG_CACHE_HOME" in done.stdout


class _Payload:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_initial_states_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pruned_init"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Payload(), protocol=2))
        archive.writestr("archive/version", "3\n")
    with pytest.raises(UsageError, match="initial states"):
        load_init_states(path)
    assert not (tmp_path / "executed").exists()


def test_initial_states_of_another_kind_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "list.pruned_init"
    torch.save([1, 2], path)
    with pytest.raises(UsageError, match="not an array"):
        load_init_states(path)
    path.write_bytes(b"nothing of the sort")
    with pytest.raises(UsageError, match="cannot be read"):
        load_init_states(path)
