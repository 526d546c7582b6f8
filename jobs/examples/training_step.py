"""A minimal GRPO loop: the engine generates with the live weights of the model that the optimizer changes."""

from __future__ import annotations

import argparse
import os

import torch

from rollout import Engine, SamplingParams
from rollout.batch_layouts import Padded
from rollout.models.loading.load import ModelSource, load_model, load_tokenizer

PROMPTS = ["Name a colour.", "What is two plus three?"]


def reward(text: str) -> float:
    """Prefer short answers."""
    return -len(text.split()) / 10


def completion_logprobs(model: torch.nn.Module, padded: Padded) -> torch.Tensor:
    """Compute the log-probability of each completion token with gradients; [samples, longest completion]."""
    ids = torch.cat([padded.prompt_ids, padded.completion_ids], dim=1)
    mask = torch.cat([padded.prompt_mask, padded.completion_mask], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float()
    first = padded.prompt_ids.shape[1] - 1  # the last prompt token predicts the first completion token
    logprobs = logits[:, first:-1].log_softmax(dim=-1)
    return logprobs.gather(2, padded.completion_ids.unsqueeze(2)).squeeze(2)


def main() -> None:
    """Take some steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--samples", type=int, default=4)
    options = parser.parse_args()

    source = ModelSource(path="packaged:SmolLM2-135M-Instruct", dtype="float32")  # or a model that you have loaded
    model, tokenizer = load_model(source, torch.device("cpu")), load_tokenizer(source)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine = Engine(model, tokenizer)
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    # Noise is keyed by the seed and these ids, so that no two ranks may share any.
    row_ids = [f"rank{os.environ.get('RANK', '0')}-prompt{index}" for index in range(len(prompts))]

    for step in range(options.steps):
        params = SamplingParams(n=options.samples, max_new_tokens=16)
        batch = engine.generate(prompts, params, seed=step, row_ids=row_ids)
        rewards = torch.tensor([reward(record.text) for record in batch]).view(len(prompts), options.samples)
        advantages = (rewards - rewards.mean(dim=1, keepdim=True)).view(-1, 1)

        padded = batch.to_padded(pad_token_id=0)
        logprobs = completion_logprobs(model, padded)
        # The records' log-probabilities are those of the policy that generated: the old policy of the ratio.
        ratio = (logprobs - padded.logprobs).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        loss = -(gain * padded.completion_mask).sum() / padded.completion_mask.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

        difference = ((logprobs - padded.logprobs) * padded.completion_mask).abs().max().item()
        print(f"step {step}: mean reward {rewards.mean():.3f}, log-probabilities differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()
