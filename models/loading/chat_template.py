"""Find the chat template where transformers' tokenizers do not look: a processor's files, or an adapter's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rollout.models.loading.checkpoint import ModelFiles

_TEMPLATE = "chat_template.jinja"
#: Files of a processor that may hold the template, in the order in which transformers' processors prefer them.
_PROCESSOR_FILES = ("chat_template.json", "processor_config.json")


def own_template(files: ModelFiles, template: Any) -> Any:
    """Return the chat template of a model whose tokenizer has ``template``; None leaves the tokenizer's.

    A template in the adapter's folder wins over the model's. Models that also read images may keep theirs with the
    processor instead of the tokenizer.
    """
    if files.adapter is not None and files.tokenizer != files.adapter:
        found = _template_in(files.adapter)
        if found is not None:
            return found
    return _template_in(files.tokenizer) if template is None else None


def _template_in(folder: Path) -> Any:
    """Return the chat template of a folder's files, None if they have none."""
    if (folder / _TEMPLATE).is_file():
        return (folder / _TEMPLATE).read_text(encoding="utf-8")
    for name in _PROCESSOR_FILES:
        if (folder / name).is_file():
            try:
                found = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
            except (ValueError, AttributeError) as error:
                raise ValueError(f"path {str(folder)!r} has a {name} that is not valid JSON ({error}).") from error
            if found is not None:
                return found
    return None
