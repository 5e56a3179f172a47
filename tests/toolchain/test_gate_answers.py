"""Probes, and the files of their answers: what a bundle holds was written by a stranger."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from otau.runtime.errors import BundleError
from otau.toolchain.gate.answer_file import (
    read_prefix_reference,
    read_reference,
    write_prefix_reference,
    write_reference,
)
from otau.toolchain.gate.answers import CONTROLS, NoiseFloor, PrefixAnswer, PrefixReference, Reference
from otau.toolchain.gate.probes import CONTROL_PROBE, FLOOR_PROBES, SEED_ROWS, ProbeFacts, make_probes

PI05 = ProbeFacts(
    cameras=2,
    height=6,
    width=8,
    image_tokens=3,
    prompt_length=9,
    vocab=50,
    layers=2,
    kv_heads=1,
    head_dim=4,
    chunk=6,
    action_dim=3,
    max_action_dim=4,
    max_state_dim=5,
    max_delay=2,
    real_time_chunking=True,
    state_in_prefix=False,
    state_in_decoder=False,
)
CONTINUOUS = replace(PI05, state_in_prefix=True)
PI0 = replace(PI05, max_delay=0, real_time_chunking=False, state_in_decoder=True)
ALL = pytest.mark.parametrize("facts", [PI05, CONTINUOUS, PI0], ids=["pi05", "continuous", "pi0"])


def cache(facts: ProbeFacts, probe: str, seed: int) -> PrefixAnswer:
    random = np.random.default_rng(seed)
    shape = (facts.layers, 1, facts.prefix_length(probe), facts.kv_heads, facts.head_dim)
    keys, values = (random.standard_normal(shape, np.float32) for _ in range(2))
    return PrefixAnswer(keys, values, np.ones(shape[1:3], bool))


def halves(facts: ProbeFacts) -> tuple[PrefixReference, Reference]:
    """References with made-up answers."""
    probes = make_probes(facts)
    caches = {probe.name: cache(facts, probe.name, number) for number, probe in enumerate(probes)}
    served = {name: cache(facts, name, 10 + number) for number, name in enumerate(FLOOR_PROBES)}
    served = {name: replace(c, mask=caches[name].mask) for name, c in served.items()}
    actions = {probe.name: np.full_like(probe.decoder["noise"], 0.5) for probe in probes}
    controls = {name: actions[CONTROL_PROBE][:1] * n for n, name in enumerate(CONTROLS, 2)}
    floor = NoiseFloor(keys=(0.1, 0.2), values=(0.3, 1 / 3), actions=0.01, seed_spread=1.2)
    return (
        PrefixReference(facts, probes, caches, served),
        Reference(facts, probes, caches, actions, controls, floor),
    )


def assert_same(one: Mapping[str, object], other: Mapping[str, object]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, PrefixAnswer):
            value, wanted = vars(value), vars(other[name])
            assert_same(value, wanted)
        else:
            assert value.dtype == other[name].dtype
            assert np.array_equal(value, other[name])


@ALL
def test_what_is_written_is_read(facts: ProbeFacts, tmp_path: Path) -> None:
    prefix, reference = halves(facts)
    write_prefix_reference(tmp_path / "prefix", prefix)
    write_reference(tmp_path / "all", reference)
    read_prefix, read = (
        read_prefix_reference(tmp_path / "prefix", facts),
        read_reference(tmp_path / "all", facts),
    )
    assert_same(prefix.served, read_prefix.served)
    assert read_prefix.floor == prefix.floor
    for made, found in ((prefix, read_prefix), (reference, read)):
        assert_same(made.caches, found.caches)
        for probe in made.probes:
            assert_same(probe.prefix, found.probe(probe.name).prefix)
            assert_same(probe.decoder, found.probe(probe.name).decoder)
    assert_same(reference.actions, read.actions)
    assert_same(reference.controls, read.controls)
    assert read.floor == reference.floor


@ALL
def test_probes_cover_delays_lengths_and_seeds(facts: ProbeFacts) -> None:
    probes = {probe.name: probe for probe in make_probes(facts)}
    assert facts.delays == ((0, 1, 2, 3, 6) if facts.real_time_chunking else (0,))
    for name, probe in probes.items():
        if facts.real_time_chunking:
            assert set(probe.decoder["delay"].tolist()) == set(facts.delays)
        noise = probe.decoder["noise"]
        assert len(np.unique(noise, axis=0)) == len(noise) == len(facts.row_delays(name)) >= 2
        assert probe.prefix["tokens"].max() < facts.vocab
        assert -1 <= probe.prefix["images"].min() < -0.8
        assert 0.8 < probe.prefix["images"].max() <= 1
    lengths = {facts.prefix_length(name) for name in probes}
    assert len(lengths) == 2
    assert max(lengths) == 2 * 3 + 9 + 6 * facts.state_in_prefix
    assert probes["full"].prefix["token_masks"].all()
    assert not probes["padded"].prefix["token_masks"].all()
    assert probes["padded"].prefix["image_masks"].tolist() == [[True, False]]
    assert probes["short"].prefix["images"].shape[1] == 1
    seeds = probes[CONTROL_PROBE].decoder
    assert not np.array_equal(seeds["noise"][0], seeds["noise"][1])
    assert set(facts.row_delays(CONTROL_PROBE)[SEED_ROWS]) == {0}
    if facts.state_in_decoder:
        assert np.array_equal(seeds["state"][0], seeds["state"][1]), "else the spread is not the noise's"
        assert not np.array_equal(*probes["full"].decoder["state"])


def test_another_seed_makes_other_probes_of_the_same_shapes() -> None:
    for one, same, other in zip(make_probes(PI05), make_probes(PI05), make_probes(PI05, 2), strict=True):
        assert_same(one.prefix, same.prefix)
        for side in ("prefix", "decoder"):
            mine, theirs = getattr(one, side), getattr(other, side)
            assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
            assert not all(np.array_equal(mine[key], theirs[key]) for key in mine)


def test_a_policy_with_one_camera_and_one_token() -> None:
    facts = replace(PI05, cameras=1, prompt_length=1, max_delay=0, chunk=1)
    assert facts.delays == (0, 1)
    prefix = make_probes(facts)[1].prefix
    assert prefix["token_masks"].any(), "a prefix has at least a token"
    assert prefix["image_masks"].all()


def changed(edit: Callable[[dict[str, np.ndarray]], object], path: Path) -> Path:
    """A bundle's probes, tampered with."""
    write_reference(path, halves(PI05)[1])
    tensors = dict(load_file(path))
    edit(tensors)
    save_file(tensors, path)
    return path


def put(name: str, value: np.ndarray) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.update({name: value})


def poke(name: str, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[-1] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("cache/full/keys"), "cache/full/keys"),
        (lambda t: t.pop("controls/fine"), "controls/fine"),
        (put("cache/other/keys", np.zeros(3, np.float32)), "cache/other/keys"),
        (put("floor/keys", np.zeros(300)), "another shape"),
        (put("floor/actions", np.zeros(1)), "another shape"),
        (put("actions/full", np.zeros((5, 6, 4), np.float64)), "another shape"),
        (put("actions/full", np.zeros((4, 6, 4), np.float32)), "another shape"),
        (put("decoder/full/noise", np.zeros((10_000, 6, 4), np.float32)), "another shape"),
        (put("cache/short/mask", np.zeros((1, 5), bool)), "another shape"),
        (put("cache/short/mask", np.zeros((1, 4), np.uint8)), "another shape"),
        (put("prefix/full/images", np.zeros((1, 2, 3, 6, 9), np.float32)), "another shape"),
        (poke("cache/full/values", np.nan), "not finite"),
        (poke("actions/short", np.inf), "not finite"),
        (poke("decoder/full/noise", np.nan), "not finite"),
        (poke("floor/actions", np.nan), "not finite"),
        (poke("floor/values", -1.0), "negative"),
        (poke("prefix/full/tokens", 50), "not in the table"),
        (poke("prefix/short/tokens", -1), "not in the table"),
        (poke("decoder/full/delay", 2**40), "other delays"),
        (poke("decoder/short/delay", 0), "other delays"),
    ],
)
def test_a_tampered_file_is_refused(
    edit: Callable[[dict[str, np.ndarray]], object], message: str, tmp_path: Path
) -> None:
    path = changed(edit, tmp_path / "probes.safetensors")
    with pytest.raises(BundleError, match=message) as caught:
        read_reference(path, PI05)
    assert "--checkpoint" in str(caught.value)


def test_the_probes_of_another_policy_are_refused(tmp_path: Path) -> None:
    write_reference(tmp_path / "all", halves(PI05)[1])
    for other in (CONTINUOUS, PI0, replace(PI05, chunk=7), replace(PI05, layers=3), replace(PI05, vocab=3)):
        with pytest.raises(BundleError):
            read_reference(tmp_path / "all", other)
    with pytest.raises(BundleError):
        read_prefix_reference(tmp_path / "all", PI05)


def written(header: object, path: Path, body: bytes = b"") -> Path:
    data = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(data)) + data + body)
    return path


@pytest.mark.parametrize(
    "header",
    [
        {"floor/keys": {"dtype": "F64", "shape": [2**62, 2**62], "data_offsets": [0, 16]}},
        {"floor/keys": {"dtype": "F64", "shape": [2], "data_offsets": [0, 2**63]}},
        {"floor/keys": {"dtype": "F64", "shape": [2], "data_offsets": [-8, 8]}},
        {"floor/keys": {"dtype": "OBJECT", "shape": [2], "data_offsets": [0, 16]}},
        [1, 2],
        b"{" * 10_000,
        b"\xff\xfe",
    ],
)
def test_lying_headers_are_refused(header: object, tmp_path: Path) -> None:
    path = written(header, tmp_path / "probes.safetensors", b"\0" * 16)
    with pytest.raises(BundleError):
        read_reference(path, PI05)


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "probes.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60))
    with pytest.raises(BundleError):
        read_reference(path, PI05)
    with pytest.raises(BundleError):
        read_reference(tmp_path / "missing", PI05)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_changed_byte_ends_in_another_error(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "probes.safetensors"
    if not path.exists():
        write_reference(path, halves(PI05)[1])
        (tmp_path / "sound").write_bytes(path.read_bytes())
    sound = bytearray((tmp_path / "sound").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # Mostly the header, which is where structure is.
        length = 8 + struct.unpack("<Q", bytes(sound[:8]))[0] % len(sound)
        end = data.draw(st.sampled_from([length, len(sound)]))
        sound[data.draw(st.integers(0, min(end, len(sound)) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(sound[: data.draw(st.one_of(st.none(), st.integers(0, len(sound))))])
    with suppress(BundleError):
        read_reference(path, PI05)
