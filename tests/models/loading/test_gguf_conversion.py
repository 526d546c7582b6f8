"""A GGUF file given by path is converted once, for each dtype and for each content."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rollout.models.cache_dir import cache_root
from rollout.models.loading import gguf_conversion, load
from rollout.models.loading.load import ModelSource, load_model, load_tokenizer
from tests.support.saved_models import CPU

pytest.importorskip("gguf")


@pytest.fixture
def file(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is read as the saved model; its cache is empty."""

    def read_model(_file: Path, dtype: torch.dtype | str) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype)
        return model

    def read_tokenizer(_file: Path) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(saved)
        return tokenizer

    for module in (gguf_conversion, load):
        monkeypatch.setattr(module, "read_model", read_model)
        monkeypatch.setattr(module, "read_tokenizer", read_tokenizer)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    return tmp_path / "tiny.gguf"


def same_weights(model: torch.nn.Module, saved: Path, dtype: torch.dtype) -> bool:
    own = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype).state_dict()
    return all(torch.equal(weight, own[name]) for name, weight in model.state_dict().items())


def test_file_is_converted_once_with_its_own_weights(file: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ModelSource(str(file), dtype="float32", device="cpu")
    assert load_tokenizer(source)("two three").input_ids == [2, 3]
    monkeypatch.setattr(gguf_conversion, "_save", lambda *_: pytest.fail("converted again"))
    assert same_weights(load_model(source, CPU), saved, torch.float32)
    assert [folder.name.split("-format")[0] for folder in cache_root().iterdir()] == ["tiny"]


def test_other_dtypes_and_changed_files_are_converted_anew(file: Path, saved: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        model = load_model(ModelSource(str(file), dtype=dtype), CPU)
        assert same_weights(model, saved, getattr(torch, dtype))
    assert len(list(cache_root().iterdir())) == 2
    os.utime(file, (0, 0))
    load_model(ModelSource(str(file), dtype="float32"), CPU)
    assert len(list(cache_root().iterdir())) == 3


def test_file_is_read_itself_if_the_cache_has_no_room(
    file: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "occupied").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "occupied"))
    with caplog.at_level(logging.WARNING):
        model = load_model(ModelSource(str(file), dtype="float32"), CPU)
    assert "set XDG_CACHE_HOME to a folder with room" in caplog.text
    assert same_weights(model, saved, torch.float32)


def test_tied_weights_stay_tied(file: Path, tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_model(_file: Path, dtype: torch.dtype | str) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype, tie_word_embeddings=True)
        return model

    monkeypatch.setattr(gguf_conversion, "read_model", read_model)
    model = load_model(ModelSource(str(file), dtype="float32"), CPU)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
