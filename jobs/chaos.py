"""Disturb real jobs until they are done, and compare what they leave with an undisturbed run.

    python -m jobs.chaos                  # about ten minutes
    python -m jobs.chaos --minutes 60 --seed 7

Each round begins a run of a small random model with one to three workers on one folder, and then, at random moments,
kills them, stops them for longer than their lease, asks them to end, tears part files, flips bits, removes shards,
claims and heartbeats, and starts others in their place. Once nothing disturbs them, the run must
end with status 0, `rollout.verify` must find it complete, and every column but ``attempt`` must be equal, byte for
byte, to that of a run in peace.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from rollout.run_dir.shards import read_shard
from rollout.verify import verify

_LEASE_SECONDS = 3
_ROWS, _SAMPLES = 60, 2
_OVERRIDES = (
    f"data.limit={_ROWS}",
    f"sampling.n={_SAMPLES}",
    "sampling.max_new_tokens=600",
    "sampling.ignore_eos=true",
    "model.dtype=float32",
    "batcher.max_rows=8",
    "output.rows_per_shard=4",
    "output.check=full",
    f"job.lease_seconds={_LEASE_SECONDS}",
)
_ENDED_WELL = (0, 75)


@dataclass
class Round:
    """One run that is disturbed."""

    model: str
    out: Path
    rng: random.Random
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    disturbed: Counter[str] = field(default_factory=Counter)
    log: Path = Path()

    def start(self) -> None:
        """Start another worker."""
        command = [sys.executable, "-m", "rollout", f"model.path={self.model}", f"output.dir={self.out}", *_OVERRIDES]
        with open(self.log, "ab") as log:
            self.workers.append(subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL))

    def reap(self) -> None:
        """Forget the workers that have ended; complain of one that crashed."""
        for worker in [worker for worker in self.workers if worker.poll() is not None]:
            self.workers.remove(worker)
            if worker.returncode not in (*_ENDED_WELL, -signal.SIGKILL):
                raise SystemExit(f"A worker ended with status {worker.returncode}; see {self.log}.")

    def end(self) -> None:
        """Kill all workers."""
        for worker in self.workers:
            worker.kill()
            worker.wait()
        self.workers.clear()

    def disturb(self) -> None:
        """Do one thing that happens to jobs."""
        kinds: list[Callable[[], None]] = [self.kill] * 4 + [self.stall, self.ask, self.tear, self.flip, self.remove]
        kind = self.rng.choice(kinds)
        kind()
        self.disturbed[kind.__name__] += 1

    def kill(self) -> None:
        """Kill a worker with SIGKILL."""
        if self.workers:
            self.rng.choice(self.workers).kill()

    def stall(self) -> None:
        """Stop a worker for longer than its lease, while another may go on with its work."""
        if not self.workers:
            return
        worker = self.rng.choice(self.workers)
        worker.send_signal(signal.SIGSTOP)
        time.sleep(_LEASE_SECONDS * self.rng.uniform(0.5, 2))
        worker.send_signal(signal.SIGCONT)

    def ask(self) -> None:
        """Ask a worker to end, as SLURM and Ctrl-C do."""
        if self.workers:
            self.rng.choice(self.workers).send_signal(self.rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]))

    def tear(self) -> None:
        """Cut the end off a part file, as a power cut may."""
        if (path := self._any("work/parts/*/*")) is not None:
            os.truncate(path, self.rng.randrange(path.stat().st_size + 1))

    def flip(self) -> None:
        """Flip a bit of a part file or a shard."""
        path = self._any("work/parts/*/*") or self._any("shards/*.parquet")
        if path is not None and path.stat().st_size:
            with open(path, "r+b") as file:
                file.seek(self.rng.randrange(path.stat().st_size))
                (byte,) = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 1 << self.rng.randrange(8)]))

    def remove(self) -> None:
        """Remove a shard, a manifest, a claim or a heartbeat."""
        pattern = self.rng.choice(["shards/*.parquet", "shards/*.json", "work/claims/*", "work/workers/*"])
        if (path := self._any(pattern)) is not None:
            path.unlink(missing_ok=True)

    def _any(self, pattern: str) -> Path | None:
        found = sorted(self.out.glob(pattern))
        return self.rng.choice(found) if found else None


def save_model(folder: Path) -> None:
    """Save a small model with random weights, and a tokenizer of characters."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    characters = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token="\0"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=characters, unk_token="\0").save_pretrained(folder)


def records(out: Path) -> pa.Table:
    """Read a run's records without the attempts, which differ."""
    files = sorted(path for path in (out / "shards").glob("*.parquet"))
    return pa.concat_tables([read_shard(path) for path in files]).drop_columns(["attempt"])


def disturbed_run(model: str, folder: Path, rng: random.Random) -> tuple[Path, Counter[str]]:
    """Disturb a run for a while, then let it end."""
    one = Round(model, folder / "out", rng, log=folder / "log")
    try:
        for _ in range(rng.randint(4, 12)):
            one.reap()
            while len(one.workers) < rng.randint(1, 2):
                one.start()
            time.sleep(rng.uniform(0, 12))
            one.disturb()
        one.reap()
        one.end()
        one.start()
        (last,) = one.workers
        last.wait(timeout=900)
        if last.returncode:
            raise SystemExit(f"The last worker ended with status {last.returncode}; see {one.log}.")
    finally:
        one.end()
    return one.out, one.disturbed


def main() -> int:
    """Run rounds until the time is over; return 1 at the first that leaves something wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=None, help="of the first round; each round prints its own")
    arguments = parser.parse_args()
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    os.environ["OMP_NUM_THREADS"] = "1"
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    model = str(root / "model")
    save_model(Path(model))
    peace = Round(model, root / "peace" / "out", random.Random(0), log=root / "log")
    peace.start()
    if peace.workers[0].wait():
        raise SystemExit(f"The undisturbed run failed; see {peace.log}.")
    expected = records(peace.out)
    total: Counter[str] = Counter()
    until = time.monotonic() + 60 * arguments.minutes
    rounds = 0
    while time.monotonic() < until or not rounds:
        folder = root / str(seed)
        folder.mkdir()
        print(f"seed {seed}", flush=True)
        out, disturbed = disturbed_run(model, folder, random.Random(seed))
        findings = verify(out)
        found = records(out)
        if not findings.complete or not found.equals(expected):
            print(f"WRONG: complete {findings.complete}, equal {found.equals(expected)}; see {folder}")
            return 1
        total += disturbed
        rounds, seed = rounds + 1, seed + 1
        shutil.rmtree(folder)
    shutil.rmtree(root)
    print(f"{rounds} runs, {total.total()} disturbances ({', '.join(f'{k} {n}' for k, n in total.most_common())}):")
    print("0 samples missing, doubled or differing.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
