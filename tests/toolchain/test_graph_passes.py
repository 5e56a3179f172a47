"""The list of passes on real policies, proved on a twin; and what the runner refuses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch

from otau.runtime.errors import GateError
from otau.toolchain.graph.export import (
    DecoderStepFromPolicy,
    IngestFromPolicy,
    PrefixFromPolicy,
    decoder_inputs,
    prefix_inputs,
    weights_of,
)
from otau.toolchain.graph.loop import LoopDenoiseSteps, UnrollDenoiseSteps
from otau.toolchain.graph.passes import PASS_LIMIT, STORE_LIMIT, graph_passes, run_passes
from otau.toolchain.graph.programs import DenoiseStep
from otau.toolchain.graph.simplify import FoldWeightExpressions, RemoveUnused, ShareCommonSubexpressions
from otau.toolchain.graph.twin import decoder_answer, ingest_answer, narrow_twin, prefix_answer, run_graph
from otau.toolchain.graph.weights import is_weight
from otau.training.policies import FlowPolicy, build_policy
from otau.training.policies.weights import StoredTensor, Weights
from otau.training.random_checkpoint import SIZES, random_config

STEPS = 3


def unreadable(weights: Weights) -> Weights:
    def fail() -> torch.Tensor:
        raise AssertionError("a weight was read while a graph was compiled")

    return {name: StoredTensor(tensor.shape, tensor.dtype, fail) for name, tensor in weights.items()}


def tables(policy: FlowPolicy) -> Weights:
    """The folded flow time of a policy that has weights."""
    return {
        name: StoredTensor(tuple(table.shape), table.dtype, lambda table=table: table)
        for name, table in DenoiseStep(policy, STEPS).tables().items()
    }


def numpy(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


class Exported:
    """The graphs of a tiny policy that has no weights, its twin's, and the twin's answers."""

    def __init__(self, family: str) -> None:
        size = SIZES["tiny"]
        policy = build_policy(random_config(family, size), size.dims)
        self.policy, self.twin = policy, narrow_twin(policy)
        weights, own = unreadable(weights_of(policy)), weights_of(self.twin)
        schedule = tables(self.twin)
        scale = size.dims.expert.hidden // self.twin.dims.expert.hidden
        wide = {
            name: StoredTensor((*table.shape[:-1], table.shape[-1] * scale), table.dtype, table.read)
            for name, table in schedule.items()
        }
        self._exports = {
            "prefix": lambda: (PrefixFromPolicy(policy, weights), PrefixFromPolicy(self.twin, own)),
            "ingest": lambda: (IngestFromPolicy(policy), IngestFromPolicy(self.twin)),
            "step": lambda: (
                DecoderStepFromPolicy(policy, weights, unreadable(wide), STEPS),
                DecoderStepFromPolicy(self.twin, own, schedule, STEPS),
            ),
        }
        self._models: dict[str, tuple[ir.Model, ir.Model]] = {}
        prefix, decoder = prefix_inputs(self.twin, 2, 2, 9), decoder_inputs(self.twin, 2)
        prefix["token_masks"][0, 5:] = False
        prefix["image_masks"][1, 1:] = False
        if "delay" in decoder:
            decoder["delay"] = torch.tensor([0, 4])
        self.answers = {
            "prefix": prefix_answer(numpy(prefix)),
            "ingest": ingest_answer(self.twin),
            "step": decoder_answer(self.twin, numpy(decoder), STEPS),
        }

    def pair(self, name: str) -> tuple[ir.Model, ir.Model]:
        """Copies of a graph and its twin, exported when they are first asked for."""
        if name not in self._models:
            self._models[name] = self._exports[name]()
        model, twin = self._models[name]
        return model.clone(), twin.clone()


@pytest.fixture(scope="module")
def exported() -> Callable[[str], Exported]:
    done: dict[str, Exported] = {}

    def export(family: str) -> Exported:
        if family not in done:
            done[family] = Exported(family)
        return done[family]

    return export


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prefix", "ingest", "step"])
@pytest.mark.parametrize("family", ["pi05", "pi0"])
def test_every_pass_keeps_what_the_graph_computes(exported, family: str, name: str) -> None:
    """The weights are unreadable. In the prefix, padding and an absent camera are among the inputs."""
    given = exported(family)
    model, twin = given.pair(name)
    reports = run_passes(model, twin, graph_passes(fuse=True), given.answers[name], name)
    assert [report.name for report in reports] == [type(step).__name__ for step in graph_passes(fuse=True)]
    assert max(report.error for report in reports) <= PASS_LIMIT
    assert reports[-1].nodes_after < 0.6 * reports[0].nodes_before
    folded = {name: report for report in reports for name in [report.name]}
    if name == "prefix":
        assert folded["StraightenKeyTransposes"].nodes_after < folded["StraightenKeyTransposes"].nodes_before
        last = len(given.policy.vlm.layers) - 1
        kept = [
            value.name for value in model.graph.initializers.values() if f"vlm.layers.{last}." in value.name
        ]
        assert not any("mlp" in weight or "o_proj" in weight for weight in kept), "the cache needs neither"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["pi05", "pi0"])
def test_loop_unrolled_and_single_step_come_from_one_export(exported, family: str) -> None:
    given = exported(family)
    step, twin = given.pair("step")
    answer = given.answers["step"]
    run_passes(step, twin, graph_passes(), answer, "step")
    loop, loop_twin = step.clone(), twin.clone()
    run_passes(loop, loop_twin, [LoopDenoiseSteps(STEPS)], answer, "decoder")
    flat, flat_twin = step.clone(), twin.clone()
    unroll = [UnrollDenoiseSteps(STEPS), FoldWeightExpressions(), RemoveUnused()]
    run_passes(flat, flat_twin, unroll, answer, "decoder")
    reference = answer(twin)["actions"]
    np.testing.assert_array_equal(answer(loop_twin)["actions"], reference)
    np.testing.assert_array_equal(answer(flat_twin)["actions"], reference)
    own = {id(v.const_value) for v in step.graph.initializers.values() if is_weight(v)}
    for model in (loop, flat):
        weights = [v for v in model.graph.initializers.values() if is_weight(v)]
        shared = [v for v in weights if id(v.const_value) in own]
        others = {str(v.name).split(".")[0] for v in weights} - {"policy"}
        assert len(shared) >= len(own) - 1, "weights are shared, not copied"
        assert others <= {"schedule", "clean"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_weights_in_16_bits_stay_near(exported, dtype: ir.DataType) -> None:
    given = exported("pi05")
    for name in ("prefix", "step"):
        reports = run_passes(*given.pair(name), graph_passes(store=dtype), given.answers[name], name)
        assert 0 < reports[-1].error < STORE_LIMIT
        assert reports[-1].bytes_after < 0.7 * reports[-1].bytes_before


def add_one(graph: ir.Graph) -> None:
    """Damage a graph: its first output becomes one more than it was."""
    output = graph.outputs[0]
    one = ir.Value(name="one", const_value=ir.tensor(1.0, dtype=ir.DataType.FLOAT, name="one"))
    one.type, one.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    graph.register_initializer(one)
    name, output.name = output.name, "sound"
    added = ir.node("Add", [output, one])
    added.outputs[0].name, added.outputs[0].type, added.outputs[0].shape = name, output.type, output.shape
    graph.append(added)
    graph.outputs[0] = added.outputs[0]


class DamageNumbers(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        add_one(model.graph)
        return ir.passes.PassResult(model, modified=True)


class DamageOneOnly(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if model.graph.name == "real":
            add_one(model.graph)
        return ir.passes.PassResult(model, modified=True)


class ClaimTooMuch(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, modified=False)

    def ensures(self, model: ir.Model) -> None:
        raise ir.passes.PostconditionError("not so")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (DamageNumbers(), "changed what the graph computes"),
        (DamageOneOnly(), "changed the graph and its twin in different ways"),
        (ClaimTooMuch(), "failed its own check"),
    ],
)
def test_a_bad_pass_is_named_with_those_before_it(bad: ir.passes.InPlacePass, message: str) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> {} (float[B] x) => (float[B] y) {{ y = Neg(x) }}'
    model, twin = (ir.from_onnx_text(text.format(name)) for name in ("real", "twin"))
    feeds = {"x": np.array([1.0, 2.0], np.float32)}
    with pytest.raises(GateError, match=message) as caught:
        run_passes(model, twin, [ShareCommonSubexpressions(), bad], lambda m: run_graph(m, feeds), "prefix")
    assert type(bad).__name__ in str(caught.value)
    assert "after ShareCommonSubexpressions" in str(caught.value)
