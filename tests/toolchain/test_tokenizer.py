"""Tokenizer folders of both kinds become the `tokenizer.json` that the runtime reads."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import GemmaTokenizer

from otau.runtime.errors import CheckpointError, UsageError
from otau.toolchain.tokenizer import has_tokenizer, read_tokenizer
from otau.training.tokenizer import train_tokenizer

TEXTS = [
    "Task: pick up the red block, State: 0 127 255;\n",
    "öffne die Schublade\n",
    "  two  spaces and a tab\t.",
    "",
]


@pytest.fixture(scope="module")
def gemma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with Gemma's settings: byte fallback, digits apart, whitespace kept."""
    folder = tmp_path_factory.mktemp("gemma")
    model = io.BytesIO()
    lines = [f"Task: pick up the block {i}, State: {i} {i * 7 % 256};" for i in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def test_a_sentencepiece_model_reads_as_transformers_reads_it(gemma_folder: Path) -> None:
    ours = Tokenizer.from_str(read_tokenizer(gemma_folder, 330))
    theirs = GemmaTokenizer.from_pretrained(gemma_folder, add_bos_token=True)
    assert ours.encode("pick").ids[0] == 2, "PaliGemma puts <bos> first"
    assert ours.get_vocab_size(with_added_tokens=False) == 330, "not the handful of special tokens alone"
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=True).ids == theirs(text)["input_ids"]
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(
            text, add_special_tokens=False
        )


def test_a_tokenizer_file_is_taken_as_it_is(tmp_path: Path) -> None:
    train_tokenizer(512).save(str(tmp_path / "tokenizer.json"))
    assert has_tokenizer(tmp_path)
    ours = Tokenizer.from_str(read_tokenizer(tmp_path, 512))
    assert ours.encode(TEXTS[0]).ids == train_tokenizer(512).encode(TEXTS[0]).ids


def test_what_cannot_be_a_tokenizer_is_refused(tmp_path: Path, gemma_folder: Path) -> None:
    assert not has_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="no tokenizer"):
        read_tokenizer(tmp_path, 100)
    with pytest.raises(CheckpointError, match="does not know"):
        read_tokenizer(gemma_folder, 100)
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"\x00garbage")
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_tokenizer(tmp_path, 100)


def test_a_tokenizer_that_blows_up_is_refused_before_it_is_used(tmp_path: Path) -> None:
    document = json.loads(train_tokenizer(512).to_str())
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    pad = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(document | {"padding": pad}))
    assert Tokenizer.from_str(read_tokenizer(tmp_path, 512)).padding is None
    blow = {"type": "Sequence", "normalizers": [step] * 12}
    file.write_text(json.dumps(document | {"normalizer": blow}))
    with pytest.raises(CheckpointError, match="times longer"):
        read_tokenizer(tmp_path, 512)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_large_files_and_links_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with (tmp_path / name).open("wb") as file:
        file.truncate((64 << 20) + 1)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="leaves its folder"):
        read_tokenizer(folder, 512)
    (folder / name).unlink()
    (tmp_path / name).rename(folder / name)
    with pytest.raises(CheckpointError, match="67,108,865 bytes"):
        read_tokenizer(folder, 512)


def test_a_linked_configuration_of_the_tokenizer_is_refused(gemma_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((gemma_folder / "tokenizer.model").read_bytes())
    (folder / "tokenizer_config.json").symlink_to(tmp_path / "tokenizer_config.json")
    with pytest.raises(CheckpointError, match="leaves its folder"):
        read_tokenizer(folder, 330)
