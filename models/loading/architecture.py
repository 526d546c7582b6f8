"""Choose the auto class that loads a checkpoint's architecture; refuse what is no causal language model."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from rollout.models.errors import UnsupportedModel

#: Auto classes in order of preference, each with the configurations that it knows. A model that also reads images or
#: sound is served for text as it is: its other parts are loaded, but never called.
_AUTO_CLASSES: tuple[tuple[Any, Any], ...] = (
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
)
_CAUSAL_NAMES = ("CausalLM", "LMHead")
"""Parts of the class names of causal language models, including classes that transformers renamed."""


class Architecture(NamedTuple):
    """How a checkpoint is loaded."""

    auto_class: Any
    """The auto class whose ``from_pretrained`` loads it."""
    model_class: type[PreTrainedModel] | None
    """The class of the model; None if the checkpoint brings its own."""


def select_architecture(config: PreTrainedConfig, path: str, *, trust_remote_code: bool = False) -> Architecture:
    """Return how to load the architecture that a configuration declares.

    Args:
        path: names the model in messages.

    Raises:
        UnsupportedModel: it declares no causal language model, even if a class could load its weights.
    """
    auto_map = getattr(config, "auto_map", None) or {}
    if trust_remote_code:
        own = next((auto for auto, _ in _AUTO_CLASSES if auto.__name__ in auto_map), None)
        if own is not None:
            return Architecture(own, None)
    known = [
        Architecture(auto, model_class)
        for auto, mapping in _AUTO_CLASSES
        if type(config) in mapping and (auto is AutoModelForCausalLM or not config.is_encoder_decoder)
        for model_class in _as_tuple(mapping[type(config)])
    ]
    if not known:
        raise UnsupportedModel(
            f"path {path!r} is of model_type {config.model_type!r}, which is no causal language model."
        )
    declared = config.architectures or []
    if not declared:
        return known[0]
    for architecture in known:
        assert architecture.model_class is not None
        if architecture.model_class.__name__ in declared:
            return architecture
    if any(part in name for name in declared for part in _CAUSAL_NAMES) and known[0].auto_class is AutoModelForCausalLM:
        return known[0]
    raise UnsupportedModel(f"path {path!r} was saved as {', '.join(declared)}, which is no causal language model.")


def _as_tuple(classes: Any) -> tuple[type[PreTrainedModel], ...]:
    """Return the classes of a configuration, of which a mapping has one or several."""
    found = classes if isinstance(classes, tuple | list) else (classes,)
    return tuple(cls for cls in found if cls is not None)
