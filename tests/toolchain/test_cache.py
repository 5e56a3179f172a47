"""The compile cache: nothing is made twice, and nothing damaged is used."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from otau.runtime import Bundle
from otau.runtime.errors import GateError, UsageError
from otau.toolchain import pipeline
from otau.toolchain.cache.hashes import RememberedHashes
from otau.toolchain.cache.store import CompileCache
from otau.toolchain.compilation import Compilation
from otau.toolchain.pipeline import compile_bundle

New = Callable[..., Compilation]
Tiny = Callable[[str], Path]
OTAU = Path(sys.executable).parent / "otau"


def stages_that_ran(c: Compilation) -> list[str]:
    return [name for name, run in c.runs.items() if not run.cached]


@pytest.fixture
def source(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("pi0"), tmp_path / "checkpoint"))


@pytest.fixture
def recompile(new_compilation: New, source: Path, tmp_path: Path) -> New:
    """Compile with a cache of this test's own."""

    def again(out: str = "bundle", **options: object) -> Compilation:
        c = new_compilation(source, tmp_path / out, cache=tmp_path / "cache", **options)
        compile_bundle(c)
        return c

    return again


def test_nothing_is_made_twice(recompile: New, source: Path, tmp_path: Path) -> None:
    """One cache through a life of recompilations; a compilation takes seconds, so they share it."""
    first = recompile()
    everything = [stage.name for stage in pipeline.STAGES]
    assert stages_that_ran(first) == everything
    before = {path.name: path.stat().st_mtime_ns for path in first.destination.iterdir()}

    again = recompile()
    assert stages_that_ran(again) == []
    assert again.up_to_date
    assert again.manifest == first.manifest
    assert {path.name: path.stat().st_mtime_ns for path in again.destination.iterdir()} == before

    # The prefix knows nothing of steps; what it cost is not paid again.
    fewer = recompile(num_steps=3)
    assert stages_that_ran(fewer) == ["decoder_reference", "fold", "decoder_graph", "decoder_gate"]
    assert Bundle.open(fewer.destination).manifest.flow.num_steps == 3

    # Elsewhere the bundle is written again, out of the same results.
    elsewhere = recompile("elsewhere")
    assert stages_that_ran(elsewhere) == []
    assert not elsewhere.up_to_date
    Bundle.open(elsewhere.destination)

    # A stray file, with which the bundle would be refused, is no part of it.
    (elsewhere.destination / "notes.txt").write_text("stray")
    assert not recompile("elsewhere").up_to_date
    Bundle.open(elsewhere.destination)

    # A changed file of the bundle is mended.
    (elsewhere.destination / "README.md").write_text("changed")
    mended = recompile("elsewhere")
    assert not mended.up_to_date
    Bundle.open(mended.destination)

    # A damaged result is made again; the others are not.
    weights = tmp_path / "cache" / "stages" / first.folder("prefix_graph").name / "prefix.onnx.data"
    damaged = bytearray(weights.read_bytes())
    damaged[100] ^= 1
    weights.unlink()
    weights.write_bytes(damaged)
    rebuilt = recompile("rebuilt")
    assert stages_that_ran(rebuilt) == ["prefix_graph"]
    Bundle.open(rebuilt.destination)

    # Another weight is another checkpoint.
    tensors = load_file(source / "model.safetensors")
    tensors["model.action_out_proj.bias"] += 1
    save_file(tensors, source / "model.safetensors")
    assert stages_that_ran(recompile("other")) == everything


def test_a_file_is_hashed_again_when_it_was_touched(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    hashes = RememberedHashes(tmp_path / "hashes")
    first = hashes.sha256(path)
    hashes.remember(path, "0" * 64)
    assert hashes.sha256(path) == "0" * 64, "it is remembered"
    stat = path.stat()
    path.write_bytes(b"two")
    # The modification time can be set back; the change time cannot.
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hashes.sha256(path) not in ("0" * 64, first)


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip", "entry"])
def test_a_damaged_entry_is_not_found(tmp_path: Path, damage: str) -> None:
    cache = CompileCache(tmp_path)
    with cache.writing("stage", "ab" * 32) as (folder, keep):
        (folder / "file").write_bytes(b"x" * 1000)
        keep(1.0, 2.0)
    folder = cache.folder("stage", "ab" * 32)
    assert cache.find("stage", "ab" * 32).bytes == 1000
    file = folder / "file"
    if damage == "truncate":
        file.write_bytes(b"x" * 999)
    elif damage == "remove":
        file.unlink()
    elif damage == "flip":
        file.write_bytes(b"x" * 999 + b"y")
    else:
        (folder / "entry.json").write_text("{")
    assert cache.find("stage", "ab" * 32) is None
    assert not folder.exists()


def test_a_stage_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = CompileCache(tmp_path)

    def fail() -> None:
        with cache.writing("stage", "ab" * 32) as (folder, _):
            (folder / "file").write_bytes(b"half")
            raise GateError("made to fail")

    with pytest.raises(GateError):
        fail()
    assert list((tmp_path / "stages").iterdir()) == []


def test_pruning_waits_for_compilations(tmp_path: Path) -> None:
    cache = CompileCache(tmp_path)
    alone = CompileCache(tmp_path).in_use(alone=True)
    with cache.in_use(), pytest.raises(UsageError, match="is using the cache"), alone:
        pass
    with cache.in_use(alone=True):
        pass


def test_a_cache_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="OTAU_CACHE"), CompileCache(tmp_path / "file").in_use():
        pass


@pytest.mark.slow
def test_a_killed_compilation_goes_on_where_it_was(source: Path, tmp_path: Path) -> None:
    command = [OTAU, "compile", source, "-o", tmp_path / "bundle", "--cache", tmp_path / "cache", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    entries = tmp_path / "cache" / "stages"
    while process.poll() is None and not list(entries.glob("prefix_graph-*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "bundle").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    stages = {stage["name"]: stage["cached"] for stage in json.loads(done.stdout)["stages"]}
    assert stages["intake"]
    assert stages["prefix_graph"]
    assert not all(stages.values())
    Bundle.open(tmp_path / "bundle")


def test_the_verb_shows_and_prunes(tmp_path: Path) -> None:
    cache = CompileCache(tmp_path)
    for key in ("ab" * 32, "cd" * 32):
        with cache.writing("fold", key) as (folder, keep):
            (folder / "file").write_bytes(b"x" * 1000)
            keep(1.0, 2.0)
    old = cache.folder("fold", "ab" * 32) / "entry.json"
    entry = json.loads(old.read_text())
    old.write_text(json.dumps(entry | {"created": entry["created"] - 9 * 24 * 3600}))

    def verb(*arguments: str) -> dict:
        command = [OTAU, "cache", "--cache", tmp_path, "--json", *arguments]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)

    assert [entry["bytes"] for entry in verb()["entries"]] == [1000, 1000]
    assert len(verb("--prune", "--older-than", "7")["removed"]) == 1
    assert [path.name for path in (tmp_path / "stages").iterdir()] == ["fold-" + "cd" * 16]
    assert len(verb("--prune")["removed"]) == 1
    assert verb()["entries"] == []
    wrong = subprocess.run([OTAU, "cache", "--older-than", "7"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "--prune" in wrong.stderr
    mistyped = subprocess.run(
        [OTAU, "cache", "--cache", tmp_path / "nowhere"], capture_output=True, text=True, check=False
    )
    assert mistyped.returncode == 2
    assert "no such cache folder" in mistyped.stderr


def keys(new_compilation: New, source: Path, cache: Path, **options: object) -> dict[str, str]:
    return pipeline.stage_keys(new_compilation(source, source.parent / "bundle", cache=cache, **options))


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"precision": "bf16"}, "prefix_graph"),
        ({"num_steps": 3}, "decoder_reference"),
        ({"decoder": "unrolled"}, "decoder_graph"),
        ({"allow": "seed"}, "prefix_gate"),
        ({"overrides": {"norm_head": "0"}}, "intake"),
        ({"overrides": {"action_dims": 3}}, "intake"),
    ],
)
def test_each_option_changes_the_keys_from_its_stage_on(
    new_compilation: New, source: Path, tmp_path: Path, options: dict, first: str
) -> None:
    before = keys(new_compilation, source, tmp_path / "cache")
    after = keys(new_compilation, source, tmp_path / "cache", **options)
    assert next(name for name in before if before[name] != after[name]) == first
    assert before["decoder_gate"] != after["decoder_gate"]


def test_a_large_tokenizer_counts(new_compilation: New, source: Path, tmp_path: Path) -> None:
    """PaliGemma's has more than 16 MiB, and another one is another bundle."""
    before = keys(new_compilation, source, tmp_path / "cache")
    path = source / "tokenizer.json"
    path.write_text(path.read_text() + " " * (17 << 20))
    large = keys(new_compilation, source, tmp_path / "cache")
    path.write_text(path.read_text() + " ")
    other = keys(new_compilation, source, tmp_path / "cache")
    assert len({before["intake"], large["intake"], other["intake"]}) == 3


def test_a_bundle_in_the_checkpoints_folder_is_no_part_of_it(
    new_compilation: New, source: Path, tmp_path: Path
) -> None:
    before = keys(new_compilation, source, tmp_path / "cache")
    (source / "bundle").mkdir()
    (source / "bundle" / "manifest.json").write_text("{}")
    assert keys(new_compilation, source, tmp_path / "cache") == before


def test_what_a_killed_compilation_left_is_shown_and_pruned(tmp_path: Path) -> None:
    draft = tmp_path / "stages" / ".prefix_graph.abc"
    draft.mkdir(parents=True)
    (draft / "prefix.onnx.data").write_bytes(b"x" * 1000)
    command = [OTAU, "cache", "--cache", tmp_path, "--json"]
    shown = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert [entry["bytes"] for entry in shown["entries"]] == [1000]
    subprocess.run([*command, "--prune"], capture_output=True, check=True)
    assert not draft.exists()


def test_a_pipe_in_the_cache_does_not_hang(tmp_path: Path) -> None:
    cache = CompileCache(tmp_path)
    folder = cache.folder("stage", "ab" * 32)
    folder.mkdir(parents=True)
    os.mkfifo(folder / "entry.json")
    assert cache.find("stage", "ab" * 32) is None


def test_the_configuration_above_a_zero_tag_folder_counts(new_compilation: New, tmp_path: Path) -> None:
    golden = (
        Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "zero" / "opentau_shaped_zero2"
    )
    if not golden.is_dir():
        pytest.skip(f"no golden checkpoint at {golden}")
    folder = Path(shutil.copytree(golden, tmp_path / "checkpoint"))
    tag, config = folder / "pytorch_model", folder / "train_config.json"
    before = keys(new_compilation, tag, tmp_path / "cache")
    assert keys(new_compilation, tag, tmp_path / "cache") == before
    text = config.read_text()
    config.unlink()
    config.write_text(text + " ")
    assert keys(new_compilation, tag, tmp_path / "cache")["intake"] != before["intake"]
