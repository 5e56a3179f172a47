"""`otau verify` on real bundles: sound, tampered with, and without PyTorch."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from otau.runtime.errors import BundleError, CheckpointError, GateError, MismatchError, UsageError
from otau.runtime.manifest import MANIFEST_NAME, decode_manifest, encode_manifest, manifest_fingerprint
from otau.runtime.spec import FileSpec, Manifest
from otau.toolchain.gate.answer_file import PROBES_NAME
from otau.toolchain.gate.cli import verify
from otau.toolchain.gate.verify import Verification, verify_bundle
from otau.toolchain.thresholds import FP32

GATES = ["prefix", "decoder", "decoder_step", "actions"]

WITHOUT_TORCH = """
import sys
for name in ("torch", "onnx", "onnx_ir", "onnxscript", "transformers"):
    sys.modules[name] = None
from pathlib import Path
from otau.toolchain.gate.cli import verify
verify(Path(sys.argv[1]), json_output=True)
"""


@pytest.fixture(params=["pi05", "pi0"])
def policy(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def bundle(compiled: Callable, tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(compiled(tiny("pi05")).destination, tmp_path / "bundle"))


def reseal(bundle: Path, edit: Callable[[Manifest], Manifest] = lambda manifest: manifest) -> None:
    """Write the manifest anew, as one would who may change a bundle and its hashes."""
    where = bundle / MANIFEST_NAME
    manifest = edit(decode_manifest(where.read_bytes(), where))
    files = {
        name: FileSpec(
            bytes=(bundle / name).stat().st_size,
            sha256=hashlib.sha256((bundle / name).read_bytes()).hexdigest(),
        )
        for name in manifest.files
        if (bundle / name).exists()
    }
    manifest = msgspec.structs.replace(manifest, files=files)
    manifest = msgspec.structs.replace(manifest, fingerprint=manifest_fingerprint(manifest))
    where.write_bytes(encode_manifest(manifest))


def change_probes(bundle: Path, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    tensors = dict(load_file(bundle / PROBES_NAME))
    tensors[name] = edit(tensors[name].copy())
    save_file(tensors, bundle / PROBES_NAME)
    reseal(bundle)


def failed(found: Verification) -> set[str]:
    return {gate.name for gate in found.gates if not gate.passed}


def test_a_sound_bundle_passes_without_torch(
    policy: str, compiled: Callable, tiny: Callable[[str], Path]
) -> None:
    bundle = compiled(tiny(policy)).destination
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(bundle)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert document["passed"] is True
    assert [gate["name"] for gate in document["gates"]] == GATES
    assert all(gate["value"] <= gate["limit"] and gate["control_failed"] for gate in document["gates"])
    assert all(gate["value"] == gate["when_compiled"] for gate in document["gates"]), "on the same machine"
    assert set(document["providers"]) == {"prefix", "ingest", "decoder", "decoder_step"}
    assert set(document["providers"].values()) == {"CPUExecutionProvider"}
    assert document["checkpoint"] is None
    assert 0 < document["noise_floor"]["actions"] < document["noise_floor"]["seed_spread"]


def test_new_probes_with_the_checkpoint(policy: str, compiled: Callable, tiny: Callable[[str], Path]) -> None:
    bundle = compiled(tiny(policy)).destination
    stored = verify_bundle(bundle)
    stages: list[str] = []
    renewed = verify_bundle(bundle, tiny(policy), 7, stages.append)
    assert failed(renewed) == set()
    assert all(gate.control_failed for gate in renewed.gates)
    one, other = (found.reference.probe("full").prefix["images"] for found in (stored, renewed))
    assert one.shape == other.shape
    assert not np.array_equal(one, other)
    assert stages.index("answer with the prefix in PyTorch") < stages.index("run the prefix")


def test_the_table(
    compiled: Callable, tiny: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    verify(compiled(tiny("pi05")).destination)
    out = capsys.readouterr().out
    assert all(name in out for name in GATES)
    assert "every gate passed" in out
    assert "CPUExecutionProvider" in out


def test_a_bundle_without_probes_says_what_to_do(bundle: Path, tiny: Callable[[str], Path]) -> None:
    (bundle / PROBES_NAME).unlink()
    reseal(bundle)
    with pytest.raises(UsageError, match="no probes") as caught:
        verify_bundle(bundle)
    assert "--checkpoint" in str(caught.value)
    assert failed(verify_bundle(bundle, tiny("pi05"))) == set()


def test_a_seed_needs_a_checkpoint(bundle: Path) -> None:
    with pytest.raises(UsageError, match="--seed"):
        verify(bundle, seed=3)


@pytest.mark.parametrize(
    ("name", "failing"),
    [
        ("cache/full/keys", {"prefix", "decoder"}),
        ("cache/padded/values", {"prefix", "decoder"}),
        ("actions/full", {"decoder", "actions"}),
        ("actions/short", {"decoder", "decoder_step", "actions"}),
        ("decoder/short/noise", {"decoder", "decoder_step", "actions"}),
        ("prefix/padded/images", {"prefix", "actions"}),
    ],
)
def test_other_answers_fail(name: str, failing: set[str], bundle: Path) -> None:
    change_probes(bundle, name, lambda value: value * np.float32(1.05))
    assert failing <= failed(verify_bundle(bundle)) <= failing | {"decoder_step"}


def test_a_failed_gate_prints_and_exits_with_1(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_probes(bundle, "actions/full", lambda value: value + np.float32(0.001))
    with pytest.raises(GateError, match="decoder, actions failed") as caught:
        verify(bundle, json_output=True)
    assert caught.value.exit_code == 1
    assert "do not run this bundle" in str(caught.value)
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is False


@pytest.mark.parametrize(
    ("graph", "failing"),
    [
        ("prefix", {"prefix", "actions"}),
        ("decoder", {"decoder", "actions"}),
        ("decoder_step", {"decoder_step"}),
    ],
)
def test_a_damaged_graph_fails(graph: str, failing: set[str], bundle: Path) -> None:
    """A constant in the graph itself: decoder and step share their file of weights."""
    path = bundle / f"{graph}.onnx"
    model = onnx.load(path, load_external_data=False)
    graphs = [model.graph]
    graphs += [a.g for node in model.graph.node for a in node.attribute if a.name == "body"]
    floats = [
        tensor
        for part in graphs
        for tensor in part.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.raw_data
    ]
    largest = max(floats, key=lambda tensor: np.prod(tensor.dims))
    largest.raw_data = (np.frombuffer(largest.raw_data, np.float32) * np.float32(1.01)).tobytes()
    onnx.save(model, path)
    reseal(bundle)
    assert failed(verify_bundle(bundle)) == failing


def test_nan_in_the_probes_is_refused(bundle: Path) -> None:
    change_probes(bundle, "cache/full/keys", lambda value: value * np.float32(np.nan))
    with pytest.raises(BundleError, match="not finite"):
        verify_bundle(bundle)


def test_a_changed_byte_is_refused(bundle: Path) -> None:
    data = bytearray((bundle / PROBES_NAME).read_bytes())
    data[-1] ^= 1
    (bundle / PROBES_NAME).write_bytes(data)
    with pytest.raises(BundleError):
        verify_bundle(bundle)


def test_a_bundle_cannot_widen_its_limits(bundle: Path) -> None:
    def widen(manifest: Manifest) -> Manifest:
        gates = tuple(msgspec.structs.replace(gate, limit=1e6) for gate in manifest.gates)
        return msgspec.structs.replace(manifest, gates=gates)

    reseal(bundle, widen)
    limits = {gate.name: gate.limit for gate in verify_bundle(bundle).gates}
    assert limits["prefix"] == FP32.prefix.value
    assert limits["actions"] == limits["decoder"] == FP32.decoder.value
    change_probes(bundle, "actions/full", lambda value: value + np.float32(0.001))
    assert failed(verify_bundle(bundle)) == {"decoder", "actions"}


def test_a_narrower_limit_of_the_bundle_holds(bundle: Path) -> None:
    def narrow(manifest: Manifest) -> Manifest:
        gates = tuple(msgspec.structs.replace(gate, value=0.0, limit=1e-12) for gate in manifest.gates)
        return msgspec.structs.replace(manifest, gates=gates)

    reseal(bundle, narrow)
    assert failed(verify_bundle(bundle)) == set(GATES)


@pytest.mark.parametrize("what", ["metric", "missing"])
def test_a_bundle_that_does_not_say_how_to_judge_it(what: str, bundle: Path) -> None:
    def edit(manifest: Manifest) -> Manifest:
        if what == "missing":
            gates = tuple(gate for gate in manifest.gates if gate.name != "actions")
        else:
            gates = tuple(msgspec.structs.replace(gate, metric="by eye") for gate in manifest.gates)
        return msgspec.structs.replace(manifest, gates=gates)

    reseal(bundle, edit)
    with pytest.raises(BundleError, match="does not say how its gate"):
        verify_bundle(bundle)


def test_an_engine_that_is_not_here(bundle: Path) -> None:
    reseal(bundle, lambda manifest: msgspec.structs.replace(manifest, engine="abacus"))
    with pytest.raises(MismatchError, match="engine"):
        verify_bundle(bundle)


def test_a_graph_without_its_output_is_refused(bundle: Path) -> None:
    model = onnx.load(bundle / "decoder.onnx", load_external_data=False)
    (output,) = model.graph.output
    (node,) = [node for node in model.graph.node if output.name in node.output]
    node.output[list(node.output).index(output.name)] = "verbs"
    output.name = "verbs"
    onnx.save(model, bundle / "decoder.onnx")
    reseal(bundle)
    with pytest.raises(BundleError, match="lacks an output"):
        verify_bundle(bundle)


@pytest.fixture
def checkpoint(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(tiny("pi05"), tmp_path / "checkpoint"))


def change_weights(checkpoint: Path, ending: str, factor: float) -> None:
    tensors = dict(load_file(checkpoint / "model.safetensors"))
    names = [name for name in tensors if name.endswith(ending)]
    assert names
    for name in names:
        tensors[name] = tensors[name] * np.float32(factor)
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("weight", "failing"),
    [
        ("language_model.layers.0.mlp.down_proj.weight", {"prefix", "actions"}),
        ("gemma_expert.model.layers.0.mlp.down_proj.weight", {"decoder", "decoder_step", "actions"}),
    ],
)
def test_another_training_step_fails(weight: str, failing: set[str], bundle: Path, checkpoint: Path) -> None:
    change_weights(checkpoint, weight, 1.05)
    assert failed(verify_bundle(bundle, checkpoint)) == failing


def test_other_statistics_are_another_policy(bundle: Path, checkpoint: Path) -> None:
    for ending in ("buffer_actions.mean", "buffer_actions.max", "buffer_state.min", "buffer_state.mean"):
        names = load_file(checkpoint / "model.safetensors").keys()
        if any(name.endswith(ending) for name in names):
            change_weights(checkpoint, ending, 2.0)
    with pytest.raises(CheckpointError, match="statistics"):
        verify_bundle(bundle, checkpoint)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [("max_delay", 1, "flow"), ("n_action_steps", 2, "flow"), ("config_version", 0, "norm")],
)
def test_another_configuration_is_another_policy(
    key: str, value: object, named: str, bundle: Path, checkpoint: Path
) -> None:
    path = next(
        checkpoint / name for name in ("config.json", "train_config.json") if (checkpoint / name).exists()
    )
    document = json.loads(path.read_text())
    policy = document.get("policy", document)
    assert policy.get(key) != value
    policy[key] = value
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=f"not the one that was compiled: its {named}"):
        verify_bundle(bundle, checkpoint)


def test_another_tokenizer_is_another_policy(bundle: Path, checkpoint: Path) -> None:
    path = checkpoint / "tokenizer.json"
    document = json.loads(path.read_text())
    document["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="its tokenizer differs"):
        verify_bundle(bundle, checkpoint)
    path.unlink()
    assert not failed(verify_bundle(bundle, checkpoint))


def test_another_family_is_another_policy(bundle: Path, tiny: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match="policy type"):
        verify_bundle(bundle, tiny("pi0"))


def test_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        verify_bundle(tmp_path)
