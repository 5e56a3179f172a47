"""DeepSpeed ZeRO: any ranks, groups and shapes, and clear about what is missing or does not fit."""

from __future__ import annotations

import math
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from otau.runtime.errors import CheckpointError
from otau.toolchain.intake.files import FileRead
from otau.toolchain.intake.zero import is_zero, open_zero
from otau.toolchain.memory import peak_rss_mb, reset_peak_rss


def test_other_folders_are_not_zero(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert not is_zero(tmp_path)
    assert not is_zero(tmp_path / "absent")


# --- checkpoints of our own, in DeepSpeed's layout


def cat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def padded(vector: torch.Tensor, multiple: int) -> torch.Tensor:
    return torch.nn.functional.pad(vector, (0, -len(vector) % multiple), value=torch.nan)


def write_zero(
    folder: Path,
    stage: int,
    ranks: int,
    groups: list[dict[str, torch.Tensor]],
    frozen: dict[str, torch.Tensor],
    cuts: int = 1,
    paddings: list[list[int]] | None = None,
) -> None:
    """Write float32 parameters as the shards of any number of ranks.

    `cuts`: into how many vectors a ZeRO-3 rank cuts what it has.
    """
    tag = folder / "step"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("step\n")
    shapes = [OrderedDict((name, value.shape) for name, value in group.items()) for group in groups]
    module = {name: value.bfloat16() for group in groups for name, value in group.items()} | frozen
    model: dict[str, Any] = {
        "module": OrderedDict(module) if stage < 3 else {name: torch.empty(0) for name in module},
        "buffer_names": [],
        "param_shapes": shapes,
        "frozen_param_shapes": {name: value.shape for name, value in frozen.items()} if stage > 1 else None,
        "frozen_param_fragments": frozen if stage > 1 else None,
        "shared_params": {},
        "ds_version": "0.19.8",
    }
    for rank in range(ranks):
        states: dict[str, Any] = {
            "zero_stage": stage,
            "partition_count": ranks if stage == 3 else [ranks] * len(groups),
        }
        if stage == 3:
            mine = cat([padded(v.flatten(), ranks).chunk(ranks)[rank] for g in groups for v in g.values()])
            states["fp32_flat_groups"] = list(mine.clone().tensor_split(cuts))
            fragments = {k: padded(v.flatten(), ranks).chunk(ranks)[rank].clone() for k, v in frozen.items()}
            torch.save(
                model | {"frozen_param_fragments": fragments},
                tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
            )
        else:
            vectors = []
            for index, group in enumerate(groups):
                gaps = paddings[index] if paddings else [0] * len(group)
                spaced = [
                    torch.nn.functional.pad(v.flatten(), (0, n))
                    for v, n in zip(group.values(), gaps, strict=True)
                ]
                vectors.append(padded(cat(spaced), 2 * ranks).chunk(ranks)[rank].clone())
            states["single_partition_of_fp32_groups"] = vectors
            states |= {"param_alignment_paddings": paddings} if paddings else {}
        torch.save(
            {"optimizer_state_dict": states, "ds_version": "0.19.8"},
            tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
    if stage < 3:
        torch.save(model, tag / "mp_rank_00_model_states.pt")


SHAPE = st.lists(st.integers(1, 5), max_size=3).map(tuple)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stage=st.sampled_from([1, 2, 3]),
    ranks=st.integers(1, 6),
    shapes=st.lists(st.lists(SHAPE, min_size=1, max_size=4), min_size=1, max_size=3),
    frozen=st.lists(SHAPE, max_size=3),
    cuts=st.integers(1, 3),
    gap=st.none() | st.integers(0, 3),
)
def test_any_ranks_groups_and_shapes(
    tmp_path: Path,
    stage: int,
    ranks: int,
    shapes: list[list[tuple[int, ...]]],
    frozen: list[tuple[int, ...]],
    cuts: int,
    gap: int | None,
) -> None:
    counter = iter(range(10**6))

    def value(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([next(counter) for _ in range(math.prod(shape))], dtype=torch.float32).view(shape)

    groups = [{f"g{i}.{j}": value(shape) for j, shape in enumerate(group)} for i, group in enumerate(shapes)]
    rest = {f"frozen.{i}": value(shape).bfloat16() for i, shape in enumerate(frozen)}
    paddings = None if gap is None else [[gap] * len(group) for group in groups]
    shutil.rmtree(tmp_path / "zero", ignore_errors=True)
    write_zero(tmp_path / "zero", stage, ranks, groups, rest, cuts, paddings)
    weights = open_zero(tmp_path / "zero").weights
    expected = {name: tensor for group in groups for name, tensor in group.items()} | rest
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        read = weights[name].read
        assert torch.equal(read(), tensor)
        assert weights[name].dtype == tensor.dtype
        # What streams the bytes gets these and no padding.
        assert isinstance(read, FileRead)
        assert sum(piece.nbytes for piece in read.pieces) == weights[name].nbytes


def simple(folder: Path, stage: int, ranks: int = 2) -> Path:
    write_zero(folder, stage, ranks, [{"a": torch.ones(3, 5), "b": torch.zeros(7)}], {"c": torch.ones(5)})
    return folder


def change(path: Path, edit: Callable[[Any], object]) -> None:
    document = torch.load(path, weights_only=False)
    edit(document)
    torch.save(document, path)


OPTIMIZER = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODEL = {2: "mp_rank_00_model_states.pt", 3: "zero_pp_rank_{}_mp_rank_00_model_states.pt"}


def states(document: Any) -> dict[str, Any]:
    return document["optimizer_state_dict"]


@pytest.mark.parametrize(
    ("stage", "file", "edit", "message"),
    [
        (2, OPTIMIZER.format(1), lambda d: states(d).update(zero_stage=1), "zero_stage differs"),
        (2, OPTIMIZER.format(1), lambda d: states(d).update(partition_count=[3]), "partition_count differs"),
        (2, OPTIMIZER.format(1), lambda d: d.update(ds_version="0.18.5"), "ds_version differs"),
        (2, MODEL[2], lambda d: d.update(ds_version="0.18.5"), "ds_version differs"),
        (2, OPTIMIZER.format(0), lambda d: states(d).update(partition_count=[2, 3]), "different ranks"),
        (2, OPTIMIZER.format(0), lambda d: states(d).update(zero_stage=0), "stage"),
        (2, OPTIMIZER.format(0), lambda d: states(d).update(zero_stage="2"), "stage"),
        (2, OPTIMIZER.format(0), lambda d: d.pop("optimizer_state_dict"), "no shard"),
        (2, OPTIMIZER.format(0), lambda d: states(d).update(single_partition_of_fp32_groups=[1]), "flat"),
        (2, OPTIMIZER.format(1), lambda d: states(d).update(single_partition_of_fp32_groups=[]), "flat"),
        (2, MODEL[2], lambda d: d["param_shapes"][0].update(a=torch.Size([300, 5])), "other parameters"),
        (2, MODEL[2], lambda d: d["param_shapes"][0].update(a=torch.Size([1, 1])), "other parameters"),
        (2, MODEL[2], lambda d: d["param_shapes"][0].update(a=(1 << 60, 5)), "shape"),
        (2, MODEL[2], lambda d: d["param_shapes"][0].update(a="15"), "shape"),
        (2, MODEL[2], lambda d: d["param_shapes"].append({}), "number of groups"),
        (2, MODEL[2], lambda d: d["frozen_param_fragments"].pop("c"), "without its values"),
        (2, MODEL[2], lambda d: d["frozen_param_shapes"].update(c=torch.Size([6])), "another size"),
        (2, MODEL[2], lambda d: d["shared_params"].update(d="nothing"), "without its source"),
        (2, MODEL[2], lambda d: d.pop("buffer_names"), "no model states"),
        (
            3,
            MODEL[3].format(1),
            lambda d: d["param_shapes"][0].update(a=torch.Size([5, 3])),
            "param_shapes differs",
        ),
        (3, MODEL[3].format(1), lambda d: d["param_shapes"][0].move_to_end("a"), "param_shapes differs"),
        (3, MODEL[3].format(1), lambda d: d["frozen_param_fragments"].pop("c"), "without its values"),
        (3, MODEL[3].format(0), lambda d: d["module"].update(lost=torch.empty(0)), "no rank has a part"),
        (
            3,
            OPTIMIZER.format(1),
            lambda d: states(d)["fp32_flat_groups"].append(torch.ones(1)),
            "groups differs",
        ),
        (
            3,
            OPTIMIZER.format(1),
            lambda d: states(d)["fp32_flat_groups"].__setitem__(0, torch.ones(12).half()),
            "type differs",
        ),
    ],
)
def test_shards_that_do_not_fit(
    stage: int, file: str, edit: Callable[[Any], object], message: str, tmp_path: Path
) -> None:
    folder = simple(tmp_path / "zero", stage)
    open_zero(folder)
    change(folder / "step" / file, edit)
    with pytest.raises(CheckpointError, match=message):
        open_zero(folder)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_rank_is_missed(stage: int, rank: int, tmp_path: Path) -> None:
    folder = simple(tmp_path / "zero", stage, 3)
    (folder / "step" / OPTIMIZER.format(rank)).unlink()
    with pytest.raises(CheckpointError, match="shards are missing"):
        open_zero(folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_missing_model_states_are_missed(rank: int, tmp_path: Path) -> None:
    folder = simple(tmp_path / "zero", 3)
    (folder / "step" / MODEL[3].format(rank)).unlink()
    with pytest.raises(CheckpointError, match=r"(shards|model states) are missing"):
        open_zero(folder)


@pytest.mark.parametrize(
    "name",
    [
        "zero_pp_rank_0_mp_rank_01_optim_states.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "zero_pp_rank_99999999999_mp_rank_00_optim_states.pt",
        "layer_0_expert_0_mp_rank_00_model_states.pt",
    ],
)
def test_shards_of_other_kinds_are_refused(name: str, tmp_path: Path) -> None:
    folder = simple(tmp_path / "zero", 2)
    shutil.copy(folder / "step" / OPTIMIZER.format(0), folder / "step" / name)
    with pytest.raises(CheckpointError, match="does not merge"):
        open_zero(folder)


@pytest.mark.parametrize(
    "tag", ["../out", "/etc", "..", ".", "", "a/b", "a\\b", "a\0b", "x" * 5000, "absent", "\x1b[2J"]
)
def test_latest_names_a_folder_beside_it(tag: str, tmp_path: Path) -> None:
    folder = simple(tmp_path / "zero", 2)
    shutil.copytree(folder / "step", tmp_path / "out")
    (folder / "latest").write_text(tag)
    with pytest.raises(CheckpointError, match="latest") as refused:
        open_zero(folder)
    assert "\x1b" not in str(refused.value)


def test_links_out_of_the_checkpoint_are_refused(tmp_path: Path) -> None:
    folder = simple(tmp_path / "zero", 2)
    (folder / "step").rename(tmp_path / "elsewhere")
    (folder / "step").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="link"):
        open_zero(folder)
    (folder / "step").unlink()
    (tmp_path / "elsewhere").rename(folder / "step")
    shard = folder / "step" / OPTIMIZER.format(1)
    shard.rename(tmp_path / "shard.pt")
    shard.symlink_to(tmp_path / "shard.pt")
    with pytest.raises(CheckpointError, match="link"):
        open_zero(folder)


@pytest.mark.parametrize("size", [0, 3, 100, -1, -40])
def test_truncated_shards(size: int, tmp_path: Path) -> None:
    folder = simple(tmp_path / "zero", 2)
    shard = folder / "step" / OPTIMIZER.format(1)
    os.truncate(shard, size % shard.stat().st_size)
    with pytest.raises(CheckpointError) as refused:
        open_zero(folder)
    assert str(shard) in str(refused.value)


def test_a_payload_in_a_rank_does_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'canary'}",)

    folder = simple(tmp_path / "zero", 2)
    moments = {"state": {0: {"exp_avg": Payload()}}}
    change(folder / "step" / OPTIMIZER.format(1), lambda d: states(d).update(base_optimizer_state=moments))
    with pytest.raises(CheckpointError, match=r"posix\.system") as refused:
        open_zero(folder)
    assert OPTIMIZER.format(1) in str(refused.value)
    assert not (tmp_path / "canary").exists()


def test_optimizer_moments_are_not_read(tmp_path: Path) -> None:
    """A hole of 400 MB in place of the moments costs nothing."""
    folder = simple(tmp_path / "zero", 2)

    def add_moments(document: Any) -> None:
        moments = {"exp_avg": torch.zeros(50_000_000), "exp_avg_sq": torch.zeros(50_000_000)}
        states(document).update(base_optimizer_state=moments)

    change(folder / "step" / OPTIMIZER.format(0), add_moments)
    reset_peak_rss()
    before = peak_rss_mb()
    weights = open_zero(folder).weights
    for tensor in weights.values():
        tensor.read()
    assert peak_rss_mb() - before < 50
