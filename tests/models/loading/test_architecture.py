"""Models that also read images are served for text; what is no causal language model is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    LlamaConfig,
    Qwen3_5Config,
)

from rollout import Engine, SamplingParams
from rollout.models.errors import UnsupportedModel
from rollout.models.loading.architecture import select_architecture
from rollout.models.loading.load import ModelSource, load_model
from tests.support.parity import greedy, random_prompts, worst_logprob
from tests.support.saved_models import CPU
from tests.support.tiny_models import MULTIMODAL, tiny_multimodal


@pytest.mark.parametrize("family", MULTIMODAL)
def test_checkpoints_that_read_images_are_served_for_text(family: str, tmp_path: Path) -> None:
    tiny_multimodal(family).save_pretrained(tmp_path)
    model = load_model(ModelSource(str(tmp_path), dtype="float32"), CPU)
    assert type(model).__name__.endswith("ForConditionalGeneration")
    batch = Engine(model, None).generate(random_prompts(4, 4), SamplingParams(max_new_tokens=8, temperature=0))
    for record in batch:
        assert record.completion_ids == greedy(model, record.prompt_ids, 8)
    assert worst_logprob(model, list(batch)) < 1e-5


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("Qwen3_5ForConditionalGeneration", AutoModelForImageTextToText),
        ("Qwen3_5ForCausalLM", AutoModelForCausalLM),
        (None, AutoModelForCausalLM),
    ],
)
def test_the_declared_architecture_is_loaded(architecture: str | None, expected: type) -> None:
    config = Qwen3_5Config(architectures=None if architecture is None else [architecture])
    assert select_architecture(config, "m").auto_class is expected


def test_a_renamed_causal_class_is_loaded() -> None:
    found = select_architecture(LlamaConfig(architectures=["LLaMAForCausalLM"]), "m")
    assert found.auto_class is AutoModelForCausalLM


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("bart", "BartForConditionalGeneration"),
        ("bert", "BertModel"),
        ("clip", "CLIPModel"),
        ("florence2", "Florence2ForConditionalGeneration"),
        ("gemma3", "Gemma3ForSequenceClassification"),
        ("llama", "LlamaForSequenceClassification"),
        ("t5", "T5ForConditionalGeneration"),
        ("vit", "ViTForImageClassification"),
        ("whisper", "WhisperForConditionalGeneration"),
    ],
)
def test_what_is_no_causal_language_model_is_refused(family: str, architecture: str) -> None:
    config = AutoConfig.for_model(family)
    config.architectures = [architecture]
    with pytest.raises(UnsupportedModel, match=r"^path 'm' [^.]* which is no causal language model\.$"):
        select_architecture(config, "m")


def test_a_class_of_the_checkpoint_needs_trust() -> None:
    config = Gemma3Config(architectures=["Own"], auto_map={"AutoModelForImageTextToText": "own.Own"})
    with pytest.raises(UnsupportedModel, match="saved as Own"):
        select_architecture(config, "m")
    found = select_architecture(config, "m", trust_remote_code=True)
    assert (found.auto_class, found.model_class) == (AutoModelForImageTextToText, None)
