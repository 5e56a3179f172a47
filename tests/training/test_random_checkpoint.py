"""`otau init`: what it writes is a checkpoint like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from otau.runtime.errors import UsageError
from otau.toolchain.intake import load_checkpoint
from otau.training.policies.checkpoint import build_policy
from otau.training.policies.gemma import AdaptiveRMSNorm
from otau.training.random_checkpoint import SIZES, random_config, write_random_checkpoint


@pytest.mark.parametrize("policy", ["pi05", "pi0"])
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_a_written_checkpoint_loads(tmp_path: Path, policy: str, size: str) -> None:
    facts = write_random_checkpoint(tmp_path / "out", policy, size, seed=3)
    checkpoint = load_checkpoint(tmp_path / "out")
    assert facts["parameters"] == sum(p.numel() for p in checkpoint.load().parameters())
    assert list(tmp_path.iterdir()) == [tmp_path / "out"], "nothing temporary is left"
    assert json.loads((tmp_path / "out" / "train_config.json").read_text())["policy"]["type"] == policy


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_checkpoint(tmp_path / name, "pi05", "tiny", seed)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["model.action_in_proj.weight"], c["model.action_in_proj.weight"])


def test_the_tokenizer_is_like_paligemmas(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "out", "pi05", "tiny")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    text = "Task: öffne die Schublade, State: 0 127 255;\n"
    encoding = tokenizer.encode(text)
    assert encoding.ids[0] == tokenizer.token_to_id("<bos>") == 2
    assert tokenizer.token_to_id("<pad>") == 0
    assert tokenizer.decode(encoding.ids) == text
    assert tokenizer.get_vocab_size() <= SIZES["tiny"].dims.vocab


def test_full_size_has_the_published_number_of_parameters() -> None:
    """3.362 B in all; the decoder 430.1 M, of which 116.5 M in the adaptive norms (27 %)."""
    policy = build_policy(random_config("pi05", SIZES["full"]), SIZES["full"].dims)

    def count(*modules: torch.nn.Module) -> float:
        return sum(p.numel() for module in modules for p in module.parameters())

    training_only = 2048 * 2048 * 2 + 2048
    decoder = count(
        policy.expert, policy.action_in_proj, policy.action_out_proj, policy.time_mlp_in, policy.time_mlp_out
    )
    adaptive = count(*(m for m in policy.modules() if isinstance(m, AdaptiveRMSNorm)))
    assert count(policy) + training_only == pytest.approx(3.362e9, rel=1e-3)
    assert decoder == pytest.approx(430.1e6, rel=1e-3)
    assert adaptive == pytest.approx(116.5e6, rel=1e-3)


def test_unknown_names_and_taken_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pi05"):
        write_random_checkpoint(tmp_path / "out", "pi5", "tiny")
    with pytest.raises(UsageError, match="small"):
        write_random_checkpoint(tmp_path / "out", "pi05", "smal")
    with pytest.raises(UsageError, match="cannot be written"):
        write_random_checkpoint(Path("/dev/null/out"), "pi05", "tiny")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("precious")
    with pytest.raises(UsageError, match="taken"):
        write_random_checkpoint(tmp_path / "taken", "pi05", "tiny")
    assert (tmp_path / "taken" / "mine").read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(vocab: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("otau.training.random_checkpoint.train_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        write_random_checkpoint(tmp_path / "out", "pi05", "tiny")
    assert list(tmp_path.iterdir()) == []
