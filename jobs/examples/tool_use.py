"""GRPO with a tool: the model learns to call a calculator, turn by turn; TRL runs the tool, this engine generates."""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig

from rollout.arithmetic import last_number
from rollout.integrations.trl import RolloutGRPOTrainer
from rollout.models.loading.load import ModelSource, load_model, load_tokenizer

# SmolLM2's own template knows no tools. A model made for tools has a template, which TRL knows how to read.
CHAT_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% for call in message.tool_calls or [] -%}
  call {{ call.function.name }}(
  {%- for name, value in call.function.arguments.items() -%}
    {{ name }}={{ value }}{{ ", " if not loop.last }}
  {%- endfor -%})
{%- endfor %}{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"call (?P<name>\w+)\(",
            "close": ")",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"(?P<key>\w+)=(?P<value>[^,]+)", "value_parser": {"name": "json"}},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": "<|im_end|>", "content": "text"},
    },
}


class Calculator:
    """An environment of TRL: its methods are the tools; one object serves one completion at a time."""

    def reset(self, **_: Any) -> None:
        """Begin a completion; the arguments are the columns of its row."""
        self.results: list[int] = []

    def multiply(self, a: int, b: int) -> int:
        """
        Multiply two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        self.results.append(a * b)
        return a * b


def example(a: int, b: int) -> list[dict[str, Any]]:
    """Return a conversation in which the tool is called."""
    call = {"type": "function", "function": {"name": "multiply", "arguments": {"a": a, "b": b}}}
    return [
        {"role": "user", "content": f"What is {a} times {b}?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "multiply", "content": str(a * b)},
        {"role": "assistant", "content": str(a * b)},
    ]


def products(count: int) -> Dataset:
    """Generate questions after two examples, and their answers."""
    rng = random.Random(0)
    pairs = [(rng.randint(3, 99), rng.randint(3, 99)) for _ in range(count)]
    shown = [*example(3, 5), *example(12, 4)]
    return Dataset.from_list([{"prompt": [*shown, example(a, b)[0]], "answer": a * b} for a, b in pairs])


def right_call_and_answer(
    completions: list[list[dict[str, Any]]], environments: list[Calculator], answer: list[int], **_: Any
) -> list[float]:
    """Score half a point for the right product from the tool, and half for the right answer at the end."""
    called = [right in environment.results for environment, right in zip(environments, answer, strict=True)]
    told = [last_number(messages[-1]["content"]) == right for messages, right in zip(completions, answer, strict=True)]
    return [0.5 * call + 0.5 * end for call, end in zip(called, told, strict=True)]


def main() -> None:
    """Train, and print how often the tool was called."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="packaged:SmolLM2-135M-Instruct", help="as model.path of a job")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--samples", type=int, default=4, help="completions of each of two questions a step")
    options = parser.parse_args()

    source = ModelSource(path=options.model, dtype="float32")  # or a model that you have loaded
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(source)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE
    args = GRPOConfig(
        output_dir="runs/tool_use",
        max_steps=options.steps,
        learning_rate=1e-5,
        per_device_train_batch_size=2 * options.samples,
        num_generations=options.samples,
        max_completion_length=48,
        max_tool_calling_iterations=2,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = RolloutGRPOTrainer(
        model=load_model(source, device),
        processing_class=tokenizer,
        reward_funcs=right_call_and_answer,
        args=args,
        train_dataset=products(256),
        environment_factory=Calculator,
    )
    trainer.train()
    for entry in trainer.state.log_history:
        if "reward" in entry:
            calls = entry["tools/call_frequency"]
            print(f"step {entry['step']}: {calls:.2f} calls a completion, mean reward {entry['reward']:.3f}")


if __name__ == "__main__":
    main()
