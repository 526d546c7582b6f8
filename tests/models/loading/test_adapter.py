"""Load PEFT adapters: weights, added tokens, tokenizers and templates; refuse what does not fit in one sentence."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from rollout.models.errors import UnsupportedModel
from rollout.models.loading import adapter as module
from rollout.models.loading.load import ModelSource, load_model, load_tokenizer
from tests.support.saved_models import CPU, refused, tiny_config

LINEAR = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
IDS = torch.arange(8)[None]


def trained(base: Path, config: Any, rows: int | None = None) -> Any:
    """Return a model with an adapter that changes its logits, with another number of tokens if ``rows`` is given."""
    model: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    if rows is not None:
        model.resize_token_embeddings(rows)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return wrapped.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def loaded(base: Path, adapter: Path) -> Any:
    return load_model(ModelSource(str(base), dtype="float32", adapter=str(adapter)), CPU)


def add_tokens(saved: Path, folder: Path, count: int) -> None:
    """Save the model's tokenizer with added tokens."""
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokenizer.add_tokens([f"<{i}>" for i in range(count)])
    tokenizer.chat_template = "of the adapter"
    tokenizer.save_pretrained(folder)


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    wrapped = trained(saved, peft.LoraConfig(**LINEAR))
    wrapped.save_pretrained(tmp_path / "adapter")
    torch.save(logits(wrapped), tmp_path / "adapter" / "expected.logits")
    return tmp_path / "adapter"


def edit(adapter: Path, **changes: object) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))


class TestWeights:
    def test_adapter_is_merged(self, saved: Path, adapter: Path) -> None:
        model = loaded(saved, adapter)
        assert isinstance(model, LlamaForCausalLM)
        assert not model.training
        torch.testing.assert_close(logits(model), torch.load(adapter / "expected.logits"), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            (lambda: peft.LoraConfig(lora_bias=True, **LINEAR), "has no bias"),
            (lambda: peft.LoraConfig(layer_replication=[[0, 2], [0, 2]], **LINEAR), "share their weights"),
            (
                lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"),
                "no way to",
            ),
        ],
        ids=["bias", "repeated layers", "adaption prompt"],
    )
    def test_adapter_that_cannot_be_merged_stays_beside_the_weights(
        self, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, config: Callable[[], Any], reason: str
    ) -> None:
        wrapped = trained(saved, config())
        wrapped.save_pretrained(tmp_path)
        with caplog.at_level(logging.INFO):
            model = loaded(saved, tmp_path)
        assert reason in caplog.text
        torch.testing.assert_close(logits(model), logits(wrapped), atol=1e-5, rtol=1e-5)

    def test_merge_that_changes_results_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, saved: Path, tmp_path: Path
    ) -> None:
        config = peft.LoraConfig(layer_replication=[[0, 2], [0, 2]], **LINEAR)
        trained(saved, config).save_pretrained(tmp_path)
        monkeypatch.setattr(module, "_changes_shared_weights", lambda wrapped: False)
        source = ModelSource(str(saved), dtype="float32", adapter=str(tmp_path))
        assert "gives other results when it is merged" in refused(source)


class TestAddedTokens:
    @pytest.mark.parametrize("rows", [70, 50])
    @pytest.mark.parametrize(
        ("config", "save_embeddings"),
        [
            (lambda: peft.LoraConfig(modules_to_save=["embed_tokens", "lm_head"], **LINEAR), False),
            (lambda: peft.LoraConfig(**LINEAR), True),
            (lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]), True),
        ],
        ids=["modules to save", "saved embeddings", "lora on embeddings"],
    )
    def test_embeddings_of_another_size_are_loaded(
        self, saved: Path, tmp_path: Path, config: Callable[[], Any], save_embeddings: bool, rows: int
    ) -> None:
        wrapped = trained(saved, config(), rows)
        wrapped.save_pretrained(tmp_path, save_embedding_layers=save_embeddings)
        model = loaded(saved, tmp_path)
        assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == rows
        torch.testing.assert_close(logits(model), logits(wrapped), atol=1e-5, rtol=1e-5)

    def test_tokens_trained_by_themselves_are_loaded(self, saved: Path, tmp_path: Path) -> None:
        wrapped = trained(saved, peft.LoraConfig(trainable_token_indices=[3, 65], **LINEAR), 66)
        wrapped.save_pretrained(tmp_path, save_embedding_layers=False)
        model = loaded(saved, tmp_path)
        assert model.get_input_embeddings().weight.shape[0] == 66
        torch.testing.assert_close(logits(model)[..., :64], logits(wrapped)[..., :64], atol=1e-5, rtol=1e-5)

    def test_tokens_that_no_file_stores_are_the_same_in_every_load(
        self, saved: Path, adapter: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        add_tokens(saved, adapter, 70)
        first = loaded(saved, adapter)
        assert "more tokens than the model" in caplog.text
        assert first.get_input_embeddings().weight.shape[0] == len(AutoTokenizer.from_pretrained(adapter))
        assert torch.equal(logits(first), logits(loaded(saved, adapter)))


class TestTokenizer:
    def test_adapters_tokenizer_wins(self, saved: Path, adapter: Path) -> None:
        add_tokens(saved, adapter, 2)
        tokenizer = load_tokenizer(ModelSource(str(saved), adapter=str(adapter)))
        assert len(tokenizer) == len(AutoTokenizer.from_pretrained(saved)) + 2
        assert tokenizer.chat_template == "of the adapter"

    def test_adapters_template_wins_without_a_tokenizer(self, saved: Path, adapter: Path) -> None:
        (adapter / "chat_template.jinja").write_text("of the adapter")
        assert load_tokenizer(ModelSource(str(saved), adapter=str(adapter))).chat_template == "of the adapter"
        assert load_tokenizer(ModelSource(str(saved))).chat_template is None

    @pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
    def test_template_of_a_processor_is_used_if_the_tokenizer_has_none(self, folder: Path, name: str) -> None:
        (folder / name).write_text(json.dumps({"chat_template": "of the processor"}))
        assert load_tokenizer(ModelSource(str(folder))).chat_template == "of the processor"
        add_tokens(folder, folder, 1)
        assert load_tokenizer(ModelSource(str(folder))).chat_template == "of the adapter"


class TestPath:
    def test_path_of_an_adapter_means_its_base_model_with_it(self, saved: Path, adapter: Path) -> None:
        add_tokens(saved, adapter, 2)
        edit(adapter, base_model_name_or_path=str(saved))
        source = ModelSource(str(adapter), dtype="float32")
        assert load_tokenizer(source).chat_template == "of the adapter"
        torch.testing.assert_close(
            logits(load_model(source, CPU)), torch.load(adapter / "expected.logits"), atol=1e-5, rtol=1e-5
        )

    def test_configuration_of_the_model_beside_an_adapter_is_ignored(self, saved: Path, adapter: Path) -> None:
        shutil.copy(saved / "config.json", adapter)
        edit(adapter, base_model_name_or_path=str(saved))
        load_model(ModelSource(str(adapter)), CPU)

    def test_base_model_that_is_missing_is_named(self, adapter: Path) -> None:
        edit(adapter, base_model_name_or_path="/gone/model")
        message = refused(ModelSource(str(adapter)))
        assert "is a PEFT adapter of '/gone/model', which is not found here" in message
        assert "adapter to this folder" in message

    def test_adapter_without_a_base_model_is_refused(self, adapter: Path) -> None:
        edit(adapter, base_model_name_or_path=None)
        assert "names no base model" in refused(ModelSource(str(adapter)))

    def test_adapter_of_an_adapter_is_refused(self, adapter: Path) -> None:
        edit(adapter, base_model_name_or_path=str(adapter))
        assert "of another adapter" in refused(ModelSource(str(adapter)))

    def test_two_adapters_are_refused(self, saved: Path, adapter: Path) -> None:
        assert "only one is loaded" in refused(ModelSource(str(adapter), adapter=str(adapter)))

    def test_model_and_adapter_in_one_folder_are_refused(self, folder: Path, adapter: Path) -> None:
        shutil.copy(adapter / "adapter_config.json", folder)
        assert "both a model and a PEFT adapter" in refused(ModelSource(str(folder)))


class TestRefused:
    def test_tensor_of_another_size_is_named(self, adapter: Path, tmp_path: Path) -> None:
        config = tiny_config()
        config.hidden_size = 64
        LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
        message = refused(ModelSource(str(tmp_path / "other"), dtype="float32", adapter=str(adapter)))
        assert "q_proj.lora_A.default.weight is [4, 32] in the adapter, but [4, 64] in the model" in message

    @pytest.mark.parametrize("layers", [1, 3])
    def test_adapter_of_a_model_with_other_layers_is_refused(self, adapter: Path, tmp_path: Path, layers: int) -> None:
        config = tiny_config()
        config.num_hidden_layers = layers
        LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
        source = ModelSource(str(tmp_path / "other"), dtype="float32", adapter=str(adapter))
        assert "does not fit the model at path" in refused(source)

    def test_weights_that_are_no_numbers_are_refused(self, saved: Path, adapter: Path) -> None:
        weights = load_file(adapter / "adapter_model.safetensors")
        next(iter(weights.values())).fill_(torch.nan)
        save_file(weights, adapter / "adapter_model.safetensors")
        assert "no numbers" in refused(ModelSource(str(saved), adapter=str(adapter)))

    def test_truncated_adapter_is_refused(self, saved: Path, adapter: Path) -> None:
        whole = (adapter / "adapter_model.safetensors").read_bytes()
        (adapter / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
        assert "copy it again" in refused(ModelSource(str(saved), adapter=str(adapter)))

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}, "before every prompt"),
            ({"alora_invocation_tokens": [5]}, "activated LoRA"),
        ],
    )
    def test_types_that_are_not_served_are_refused_before_the_model_is_read(
        self, folder: Path, adapter: Path, changes: dict[str, object], reason: str
    ) -> None:
        edit(adapter, **changes)
        (folder / "model.safetensors").unlink()
        assert reason in refused(ModelSource(str(folder), adapter=str(adapter)), UnsupportedModel)

    def test_other_tasks_are_refused(self, saved: Path, adapter: Path) -> None:
        edit(adapter, task_type="SEQ_CLS")
        assert "trained for the task SEQ_CLS" in refused(ModelSource(str(saved), adapter=str(adapter)))

    def test_pickled_adapter_is_refused(self, saved: Path, adapter: Path) -> None:
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        assert "no adapter_model.safetensors" in refused(ModelSource(str(saved), adapter=str(adapter)))

    def test_missing_adapter_is_refused(self, saved: Path) -> None:
        assert "adapter '/none' is no folder" in refused(ModelSource(str(saved), adapter="/none"))

    def test_adapter_without_peft_is_refused(self, monkeypatch: pytest.MonkeyPatch, saved: Path, adapter: Path) -> None:
        monkeypatch.setattr(module.util, "find_spec", lambda name: None)
        assert "needs the package peft" in refused(ModelSource(str(saved), adapter=str(adapter)))
