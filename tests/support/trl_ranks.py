"""One rank of a TRL run: trains three steps and writes what it generated."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from rollout.integrations.trl import RolloutGRPOTrainer
from tests.support import trl_world


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    # Four samples of one prompt stand on both ranks.
    args = trl_world.grpo_args(folder, per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-2)
    trainer = trl_world.trainer(RolloutGRPOTrainer, args)
    calls = trl_world.Calls(trainer)
    trainer.train()
    found = {"prompts": calls.prompts, "ids": calls.ids, "distances": calls.distances}
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
