"""A tiny TRL run: a model of two layers, a tokenizer of words, prompts and a reward."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import GRPOConfig, RLOOConfig

from tests.support.tiny_models import VOCABULARY, tiny

PAD, EOS, UNKNOWN, TURN, TOOL = 0, 2, 3, 5, 6
_NAMED = {PAD: "<pad>", EOS: "</s>", UNKNOWN: "<unk>", TURN: "<turn>", TOOL: "<tool>"}
#: A chat's turns; what an assistant says ends with the end of a sequence.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %} {{ call['function']['name'] }} {{ call['function']['arguments'] }}"
    "{% endfor %} </s> {% else %}{{ '<tool>' if message['role'] == 'tool' else '<turn>' }} {{ message['content'] }} "
    "{% endif %}{% endfor %}"
)


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words ``w0`` to ``w198``, of which a few have names."""
    words = Tokenizer(models.WordLevel({_NAMED.get(i, f"w{i}"): i for i in range(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    made.chat_template = template
    return made


def model(dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Return a Llama of two layers in fp32."""
    return tiny("llama", dtype, num_hidden_layers=2, **changes)


def prompts(count: int = 8, words: int = 3) -> Dataset:
    """Return ``count`` different prompts of ``words`` words."""
    rows = [" ".join(f"w{10 + (7 * row + i) % 180}" for i in range(words)) for row in range(count)]
    return Dataset.from_dict({"prompt": rows})


def distinct_words(completions: list[Any], **_: Any) -> list[float]:
    """Reward a completion for each of its different words."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [float(len(set(text.split()))) for text in texts]


def fields(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return arguments of a run of three steps with two prompts of four samples each."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "beta": 0.0,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 12,
        "max_steps": 3,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }


def grpo_args(folder: Path, **changes: Any) -> GRPOConfig:
    """Return arguments of a GRPO run."""
    return GRPOConfig(**fields(folder, **changes))


def rloo_args(folder: Path, **changes: Any) -> RLOOConfig:
    """Return arguments of an RLOO run."""
    return RLOOConfig(**fields(folder, **changes))


def trainer(kind: Any, args: Any, **changes: Any) -> Any:
    """Return a trainer of the world."""
    given = {
        "model": model(),
        "reward_funcs": distinct_words,
        "train_dataset": prompts(),
        "processing_class": tokenizer(),
        "args": args,
        **changes,
    }
    return kind(**given)


class Calls:
    """What each call of a trainer's generation took and gave, and how far the trainer's own numbers are from it."""

    def __init__(self, trainer: Any) -> None:
        self.prompts: list[list[list[int]]] = []
        self.ids: list[list[list[int]]] = []
        self.distances: list[float] = []
        self.stats: list[Any] = []
        self._trainer, self._generate = trainer, trainer._rollout.generate
        trainer._rollout.generate = self._observed

    def _observed(self, trainer: Any, prompt_ids: Any) -> Any:
        done = self._generate(trainer, prompt_ids)
        self.prompts.append([list(row) for row in prompt_ids])
        self.ids.append([list(row) for row in done.ids])
        self.stats.append(trainer._rollout.stats)
        self.distances.append(worst_distance(trainer, prompt_ids, done.ids, done.logprobs))
        return done

    @property
    def samples(self) -> list[tuple[int, ...]]:
        return [tuple(row) for call in self.ids for row in call]


def worst_distance(trainer: Any, prompts: Any, completions: Any, logprobs: Any) -> float:
    """Return the largest distance of log-probabilities from those that the trainer computes of the same ids."""
    left, right = max(map(len, prompts)), max(map(len, completions))
    ids = torch.full((len(prompts), left + right), PAD)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        inside = slice(left - len(prompt), left + len(completion))
        ids[row, inside] = torch.tensor([*prompt, *completion])
        mask[row, inside] = 1
    with torch.no_grad():
        own = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, right)[0]
    return max((row[: len(w)] - torch.tensor(w)).abs().max().item() for row, w in zip(own, logprobs, strict=True))


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """Return all that a call could leave changed in a module or around it."""
    return {
        "modes": [module.training for module in model.modules()],
        "dtypes": [(name, p.dtype, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()],
        "checkpointing": [
            (getattr(m, "gradient_checkpointing", None), getattr(m, "_gradient_checkpointing_func", None) is None)
            for m in model.modules()
        ],
        "attention": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "forwards": ["forward" in vars(m) for m in model.modules()],
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
    }
