"""`otau compile` and `otau init` as a user runs them: exit codes, messages, nothing left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

BIN = Path(sys.executable).parent
OUT = "model.action_out_proj.weight"


def otau(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "otau"), *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd
    )


@pytest.fixture
def checkpoint(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("pi05"), tmp_path / "checkpoint"))


def rename_key(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.action_out_projection.weight"] = tensors.pop(OUT)
    save_file(tensors, folder / "model.safetensors")


def change_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[OUT] = tensors[OUT][1:].clone()
    save_file(tensors, folder / "model.safetensors")


def poison(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[OUT][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_config(folder: Path) -> None:
    (folder / "train_config.json").unlink()


def unknown_type(folder: Path) -> None:
    path = folder / "train_config.json"
    path.write_text(path.read_text().replace('"pi05"', '"pi06"'))


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def big_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 5000
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (rename_key, 1, ["missing", "unexpected", OUT]),
        (change_shape, 1, ["of another shape", OUT, "[8, 48]"]),
        (poison, 1, ["not finite", OUT]),
        (truncate, 1, ["truncated", "model.safetensors"]),
        (remove_weights, 2, ["no weights", "model.safetensors"]),
        (remove_config, 2, ["no configuration", "train_config.json"]),
        (unknown_type, 2, ["unknown policy type 'pi06'", "pi0, pi05"]),
        (break_tokenizer, 1, ["tokenizer cannot be read"]),
        (big_tokenizer, 1, ["tokens that the policy does not know", "1024"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_bad_checkpoint_gets_one_clear_message(
    checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], code: int, words: list[str]
) -> None:
    damage(checkpoint)
    done = otau("compile", checkpoint, "--target", "cpu", "-o", tmp_path / "bundle", "--json")
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compile", "nowhere", "-o", "b"], ["no such checkpoint folder"]),
        (["compile", "checkpoint", "-o", "b", "--target", "jetsn"], ["unknown target", "cpu"]),
        (["compile", "checkpoint", "-o", "b", "--precision", "fp8"], ["no precision", "fp32"]),
        (["compile", "checkpoint", "-o", "b", "--num-steps", "0"], ["--num-steps"]),
        (["compile", "checkpoint", "-o", "b", "--decoder", "lop"], ["did you mean 'loop'"]),
        (["compile", "checkpoint", "-o", "b", "--allow", "seed"], ["fp32", "--allow"]),
        (["compile", "checkpoint", "-o", "checkpoint"], ["not a bundle"]),
        (["compile", "checkpoint", "-o", "b", "--tokenizer", "."], ["no tokenizer"]),
        (["compile", "checkpoint"], ["--out"]),
        (["init", "--out", "checkpoint"], ["taken"]),
        (["init", "--out", "new", "--size", "huge"], ["unknown name 'huge'", "tiny"]),
        (["init", "--out", "new", "--policy", "pi5"], ["did you mean"]),
    ],
)
def test_bad_arguments_are_usage_errors(
    checkpoint: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    before = sorted(path.name for path in checkpoint.iterdir())
    done = otau(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
    assert sorted(path.name for path in checkpoint.iterdir()) == before


def test_from_init_to_infer(tmp_path: Path) -> None:
    """The whole path in three commands, each with one JSON document on stdout."""
    made = otau("init", "--policy", "pi0", "--size", "tiny", "--out", "checkpoint", "--json", cwd=tmp_path)
    assert json.loads(made.stdout)["policy"] == "pi0"
    compiled = otau("compile", "checkpoint", "-o", "bundle", "--num-steps", "3", "--json", cwd=tmp_path)
    assert compiled.returncode == 0, compiled.stderr
    report = json.loads(compiled.stdout)
    assert {"bundle", "command", "policy", "checkpoint", "stages", "gates", "graphs"} < set(report)
    assert report["num_steps"] == 3
    assert set(report["stages"][0]) == {"name", "seconds", "cached", "peak_rss_mb", "disk_bytes"}
    assert set(report["gates"][0]) == {"name", "metric", "value", "limit", "passed", "control_failed"}
    assert set(report["graphs"]) == {"prefix", "ingest", "decoder", "decoder_step"}
    assert report["graphs"]["decoder"]["nodes_final"] < report["graphs"]["decoder"]["nodes_exported"]
    inferred = otau("infer", "bundle", "--dummy", "--save", "out.safetensors", "--json", cwd=tmp_path)
    assert inferred.returncode == 0, inferred.stderr
    assert load_file(tmp_path / "out.safetensors")["actions"].shape == (1, 10, 7)
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "pi0 for cpu" in card
    assert "3 steps" in card


def test_progress_stays_off_a_pipe(checkpoint: Path, tmp_path: Path) -> None:
    done = otau("compile", checkpoint, "-o", tmp_path / "bundle", "--num-steps", "2")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "every gate passed" in done.stdout
