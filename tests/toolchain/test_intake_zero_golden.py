"""DeepSpeed ZeRO on genuine checkpoints: bit-equal to DeepSpeed's own merge."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from otau.runtime.errors import OtauError
from otau.toolchain.intake.zero import is_zero, open_zero
from otau.toolchain.memory import peak_rss_mb, reset_peak_rss

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "zero"
CASES = sorted(path.name for path in GOLDEN.iterdir()) if GOLDEN.is_dir() else []
EMBED, HEAD = "embed.weight", "head.weight"

needs_golden = pytest.mark.skipif(not CASES, reason="../shared/golden/zero is not here")


def expected_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights = load_file(folder / "expected_fp32.safetensors")
    frozen = folder / "frozen_from_module.safetensors"
    return weights | (load_file(frozen) if frozen.exists() else {})


@needs_golden
@pytest.mark.parametrize("name", CASES)
def test_bit_equal_to_the_official_merge(name: str) -> None:
    folder = GOLDEN / name
    opened = open_zero(folder)
    expected = expected_weights(folder)
    assert set(opened.weights) == set(expected)
    for key, stored in opened.weights.items():
        tensor, wanted = stored.read(), expected[key]
        assert (tuple(tensor.shape), tensor.dtype) == (stored.shape, stored.dtype)
        if key == "count":
            # 0.18's merge turns integers into floats; they are kept here.
            assert tensor.dtype == torch.int64
            wanted = wanted.long()
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted)


@needs_golden
def test_golden_cases_are_all_there() -> None:
    assert len(CASES) == 12
    assert all(is_zero(GOLDEN / name) for name in CASES)


@needs_golden
@pytest.mark.parametrize("name", ["zero1_bf16", "zero2_bf16", "zero3_bf16", "accelerate_zero3_bf16"])
def test_tied_parameters_are_one(name: str) -> None:
    weights = open_zero(GOLDEN / name).weights
    assert weights[EMBED] is weights[HEAD]


@needs_golden
@pytest.mark.parametrize(
    ("name", "tag"), [("zero2_bf16", "global_step3"), ("opentau_shaped_zero2", "pytorch_model")]
)
def test_the_tag_folder_itself_opens_too(name: str, tag: str) -> None:
    assert is_zero(GOLDEN / name / tag)
    opened = open_zero(GOLDEN / name / tag)
    assert set(opened.weights) == set(expected_weights(GOLDEN / name))
    # The configuration is beside `latest`.
    assert opened.folder == GOLDEN / name


@needs_golden
def test_files_are_all_that_the_weights_come_from() -> None:
    folder = GOLDEN / "accelerate_zero3_bf16"
    names = {str(path.relative_to(folder)) for path in open_zero(folder).files}
    assert names == {
        "latest",
        *(f"pytorch_model/{path.name}" for path in (folder / "pytorch_model").iterdir()),
    }


@needs_golden
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_shard_gives_right_weights_or_an_error(data: st.DataObject, tmp_path: Path) -> None:
    """Every outcome is an OtauError, or weights of the right names, shapes and types."""
    source = GOLDEN / data.draw(st.sampled_from(["zero1_bf16", "zero2_bf16", "ds0185_zero3_bf16"]))
    folder = tmp_path / source.name
    if not folder.exists():
        shutil.copytree(source, folder)
    path = data.draw(st.sampled_from(sorted((folder / "global_step3").iterdir())))
    original = path.read_bytes()
    content = bytearray(original)
    # The pickle comes first and the list of entries last: that is where a change matters.
    place = st.integers(0, 6000) | st.integers(len(content) - 2500, len(content) - 1)
    for at in data.draw(st.lists(place, min_size=1, max_size=8)):
        content[at % len(content)] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    reset_peak_rss()
    before = peak_rss_mb()
    try:
        with suppress(OtauError):
            opened = open_zero(folder)
            for stored in opened.weights.values():
                tensor = stored.read()
                assert (tuple(tensor.shape), tensor.dtype) == (stored.shape, stored.dtype)
    finally:
        path.write_bytes(original)
    assert peak_rss_mb() - before < 100
