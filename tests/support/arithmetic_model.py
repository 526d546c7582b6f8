"""A tiny model of bytes that has learned how the examples' conversations go: calls, numbers, and where a turn ends."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TURNS = ("<|im_start|>", "<|im_end|>")
CALL = "call multiply(a=3, b=5)"
#: Longer texts that are one token each, so that they are learned in a few steps.
WORDS = (CALL, "user\nWhat is ", "assistant\n", " times ", " plus ", "tool\n")
CHAT_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte, for each end of a turn, and for some words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=TURNS[1], pad_token=TURNS[1])
    tokenizer.add_special_tokens({"additional_special_tokens": [TURNS[0]]})
    tokenizer.add_tokens(list(WORDS))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _turns(rng: random.Random) -> list[str]:
    """Return one question and answer of each kind."""
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    ask, answer = "<|im_start|>user\nWhat is", "?<|im_end|>\n<|im_start|>assistant\n"
    return [
        f"{ask} {a} times {b}{answer}{CALL}<|im_end|>",
        f"<|im_start|>tool\n{a}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>",
        f"{ask} {a} plus {b}{answer}{a}<|im_end|>",
        f"3 + 4 = 7\n{a} + {b} = {b}\n<|im_end|>",
    ]


def save_arithmetic_model(folder: Path, steps: int = 60) -> None:
    """Train a model of two layers for some seconds, and save it with its tokenizer."""
    tokenizer, rng = byte_tokenizer(), random.Random(0)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        texts = [turn for _ in range(4) for turn in _turns(rng)]
        given = tokenizer(texts, padding=True, return_tensors="pt")
        labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
        loss = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
