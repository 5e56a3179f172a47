"""Compiled bundles, run by the runtime, against OpenTau's tensors and against the PyTorch policies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from otau.runtime import Policy
from otau.runtime.engines import engine_class
from otau.runtime.recorded import read_recorded
from otau.toolchain.compilation import Compilation
from otau.toolchain.gate.metrics import relative_error
from otau.toolchain.graph.export import decoder_inputs, prefix_inputs
from otau.toolchain.graph.programs import Prefix
from otau.toolchain.intake import load_checkpoint
from otau.training.policies import lay_out

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
FOLDERS = ("pi05_discrete", "pi05_continuous", "pi0")
CASES = [
    f"{folder}/{file.name}"
    for folder in FOLDERS
    for file in sorted((GOLDEN / folder).glob("io*.safetensors"))
]

pytestmark = pytest.mark.skipif(not CASES, reason=f"no golden tensors at {GOLDEN}")

Compiled = Callable[..., Compilation]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def test_opentaus_tensors(case: str, compiled: Compiled) -> None:
    """Every variant of the golden set through `Policy`: actions and cache within the suggested bars."""
    tensors = load_file(GOLDEN / case)
    steps = int(tensors["inputs/num_steps"].item())
    bundle = compiled(GOLDEN / case.split("/")[0], steps).destination
    wanted = {k.removeprefix("outputs/"): v for k, v in tensors.items() if k.startswith("outputs/")}
    with Policy.open(bundle) as policy:
        recorded = read_recorded(GOLDEN / case, policy.manifest)
        cache = policy.prefix_batch(recorded.batch)
        chunk = policy.decode_batch(
            policy.ingest(cache),
            noise=recorded.noise,
            action_prefix=recorded.action_prefix,
            delay=recorded.delay,
        )
        mask, keys, values = cache.mask, cache.keys, cache.values
    # Masked placeholders are a choice of OpenTau's caller that the recording does not hold; they do not
    # change a valid token, so the rest must agree.
    facts = json.loads((GOLDEN / case.split("/")[0] / "cases.json").read_text())[Path(case).name]
    tokens = 0
    if facts["empty_cameras"]:
        tokens = wanted["prefix_pad_masks"].shape[1] - mask.shape[1]
        assert tokens > 0
    present = np.ones(wanted["prefix_pad_masks"].shape[1], bool)
    if tokens:
        present[tokens : 2 * tokens] = False
    assert np.array_equal(mask, wanted["prefix_pad_masks"][:, present])
    for layer in range(len(keys)):
        for got, name in ((keys[layer], "key"), (values[layer], "value")):
            reference = wanted[f"{name}_states_{layer}"][:, present]
            assert np.abs(got - reference)[mask].max() <= 2e-5
    assert np.abs(chunk.normalised - wanted["actions_norm"]).max() <= 2e-5
    assert np.abs(chunk.actions - wanted["actions"]).max() <= 2e-5


@pytest.mark.parametrize("folder", FOLDERS)
def test_pytorchs_actions_at_every_delay_and_unseen_prefix_lengths(folder: str, compiled: Compiled) -> None:
    """The chain of engines within 2e-6, at every delay of the chunk, with all kinds of batches and masks."""
    bundle = compiled(GOLDEN / folder).destination
    policy = load_checkpoint(GOLDEN / folder).load()
    kind = engine_class("onnxruntime")
    engines = {name: kind.open(bundle / f"{name}.onnx") for name in ("prefix", "ingest", "decoder")}
    shapes = [(1, 1, 1), (1, 2, 5), (2, 1, 16), (3, 3, 40)]
    chunk = policy.config.chunk_size
    lengths = set()
    for seed, (batch, cameras, tokens) in enumerate(shapes):
        inputs = prefix_inputs(policy, batch, cameras, tokens, seed=50 + seed)
        inputs["token_masks"][0, tokens // 2 + 1 :] = False
        with torch.no_grad():
            keys, values, mask = Prefix(policy)(**inputs)
        lengths.add(mask.shape[1])
        cache = engines["prefix"].run({name: tensor.numpy() for name, tensor in inputs.items()})
        laid_out = engines["ingest"].run({"keys": cache["keys"], "values": cache["values"]})
        for delay in range(chunk + 1) if policy.real_time_chunking else (0,):
            rest = decoder_inputs(policy, batch, seed=delay)
            if policy.real_time_chunking:
                rest["delay"] = (torch.arange(batch) + delay) % (chunk + 1)
            given = {name: tensor.numpy() for name, tensor in rest.items()}
            got = engines["decoder"].run({**laid_out, **given, "prefix_mask": cache["prefix_mask"]})[
                "actions"
            ]
            with torch.no_grad():
                wanted = policy.decode(lay_out(keys, values), mask, rest.pop("noise"), **rest).numpy()
            assert relative_error(got, wanted) <= 2e-6
    assert len(lengths) == len(shapes)


@pytest.mark.parametrize(
    ("folder", "route", "dtype", "texts"),
    [
        # The bins of a discrete prompt are bfloat16's, whatever the bundle's own precision.
        ("pi05_discrete", "prompt", "bfloat16", (None, None)),
        ("pi05_continuous", "prefix", "float32", ("State: ", ":\n")),
        ("pi0", "decoder", "float32", (None, None)),
    ],
)
def test_the_manifest(folder: str, route: str, dtype: str, texts: tuple, compiled: Compiled) -> None:
    manifest = compiled(GOLDEN / folder).manifest
    assert (manifest.state_route, manifest.norm.state_dtype) == (route, dtype)
    assert (manifest.prompt.state_open, manifest.prompt.state_close) == texts
    assert manifest.norm.centre_degenerate == (folder != "pi0")
    assert manifest.norm.eps == (1e-8 if folder == "pi0" else 1e-6)
    assert manifest.vocab == 512


def test_no_graph_carries_the_paths_of_this_machine(compiled: Compiled) -> None:
    bundle = compiled(GOLDEN / "pi0").destination
    here = str(Path(__file__).parents[2]).encode()
    for file in bundle.iterdir():
        assert here not in file.read_bytes(), file.name


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_report(folder: str, compiled: Compiled) -> None:
    compilation = compiled(GOLDEN / folder)
    report = json.loads((compilation.destination / "report.json").read_text())
    assert report["policy"] == folder.split("_")[0]
    names = [gate["name"] for gate in report["gates"]]
    assert names == ["prefix", "fold", "decoder", "decoder_step", "actions"]
    assert all(gate["passed"] and gate["control_failed"] for gate in report["gates"])
    assert set(report["graphs"]) == {"prefix", "ingest", "decoder", "decoder_step"}
    for graph in report["graphs"].values():
        assert 0 < graph["nodes_final"] < graph["nodes_exported"]
        assert all(step["error"] <= 1e-6 for step in graph["passes"])
    assert len(report["kv_error"]["keys"]) == len(report["noise_floor"]["values"]) == 3


@pytest.mark.parametrize("folder", ["pi05_discrete", "pi05_continuous"])
def test_adaptive_norm_layers_are_gone_from_the_decoder(folder: str, compiled: Compiled) -> None:
    """What is left are the other weights and a table of modulations, a row a step and one for frozen rows."""
    import onnx

    compilation = compiled(GOLDEN / folder)
    policy = load_checkpoint(GOLDEN / folder).load()
    dense = [
        name for name, _ in policy.expert.named_parameters() if ".dense." in name or name.startswith("norm.")
    ]
    others = sum(p.numel() for name, p in policy.expert.named_parameters() if name not in dense)
    others += sum(p.numel() for m in (policy.action_in_proj, policy.action_out_proj) for p in m.parameters())
    norms, width = 2 * policy.dims.expert.layers + 1, policy.dims.expert.hidden
    table = (policy.config.num_steps + 1) * norms * 3 * width
    parameters = compilation.graphs()["decoder"].spec.parameters
    assert others + table <= parameters < others + table + 100
    model = onnx.load(compilation.destination / "decoder.onnx", load_external_data=False)
    assert not any(list(tensor.dims) == [3 * width, width] for tensor in model.graph.initializer)
    assert not any(list(tensor.dims) == [width, 3 * width] for tensor in model.graph.initializer)
