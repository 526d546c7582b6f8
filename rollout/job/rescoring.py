"""Score the completions of a run anew: its records with other rewards, in a directory of their own."""

from __future__ import annotations

import logging
import os
import secrets
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rollout.closing import closed_by
from rollout.config.schema import Config, DataConfig
from rollout.data.prompts import Prompts, read_prompts
from rollout.errors import Exit, InputError
from rollout.job.heartbeat_thread import beating
from rollout.job.rescored_records import READ, RecordRescorer
from rollout.job.reward_source import source_of
from rollout.job.rewards import Reward, Scorer, load_reward
from rollout.job.work_loop import LONGEST_POLL_SECONDS, POLL_SECONDS, mend
from rollout.logs import say
from rollout.records import REF_LOGPROBS, record_columns
from rollout.run_dir.attempts import this_launch
from rollout.run_dir.claims import Place, ShardClaims
from rollout.run_dir.commit import commit_file
from rollout.run_dir.fingerprint import Fingerprint, describe, differences, reward_values, without_reward
from rollout.run_dir.hashed_file import HashedFile
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.rewrite import rewrite
from rollout.run_dir.run import RunDir, begin_run, prepare_folder, read_run, read_run_json, with_attempt
from rollout.run_dir.shard_checks import damage_of
from rollout.run_dir.shards import RecordCounts, read_manifest
from rollout.run_dir.summary import summarise
from rollout.run_dir.versions import installed_versions
from rollout.run_dir.workers import Heartbeat, Worker, Workers

logger = logging.getLogger(__name__)

_SAY_SECONDS = 30.0
_FROM = "rescored_from"
"""The key of a fingerprint that names the run whose completions these are."""


@dataclass(frozen=True, slots=True)
class Rescoring:
    """What is asked for."""

    source: str
    """``output.dir`` of a complete run."""
    config: Config
    """Of a job. What counts are its reward, and where and how the new run is written."""
    data_path: str | None = None
    """Where the run's dataset is now; None: where it was."""


def rescore(asked: Rescoring) -> Exit:
    """Score all completions of a run and write its records with the new rewards, then print the summary.

    Several processes share the shards, as those of a job do. A shard that is there already is not scored again.

    Raises:
        InputError: the run is not complete or damaged, its dataset has changed, or the folder holds something else.
    """
    target = asked.config.output.dir
    reward = load_reward(asked.config.reward)
    assert reward is not None
    source = _complete_run(Path(asked.source))
    place = Path(target).resolve()
    if Path(asked.source).resolve() in (place, *place.parents):
        raise InputError(f"output.dir={target} lies in {asked.source}, which stays as it is: choose another folder.")
    prompts = _prompts_of(source, asked)
    run = _open(source, prompts, asked)
    if not _work(source, run, prompts, reward, asked.config):
        return Exit.COMPLETE
    run.clear_work()
    summary = summarise(run)
    say("\n".join(summary.lines()))
    return Exit.ERROR_ROWS if summary.totals.error_rows else Exit.COMPLETE


def _complete_run(folder: Path) -> RunDir:
    run = read_run(RunPaths(folder))
    if not run.complete():
        raise InputError(
            f"{folder} holds a run that is not complete: finish it with its own command first, and rescore it then."
        )
    return run


def _prompts_of(source: RunDir, asked: Rescoring) -> Prompts:
    """Read the dataset of a run again, with all columns.

    The columns that stand in the shards do not do: their types may be others than those that a job's reward gets, and
    not all may be there.

    Raises:
        InputError: it cannot be read, or is no longer the same.
    """
    stored = read_run_json(source.paths)["config"]
    data = DataConfig(**stored["data"])
    if asked.data_path is not None:
        data = replace(data, path=asked.data_path)
    own = record_columns(stored["output"]["split_reasoning"], stored["model"]["reference"] is not None)
    logger.info("Reading the rows again that the reward gets, from %s.", data.path)
    # The digest of a run without a reward covers the columns that prompts are made of.
    rewarded = source.fingerprint.values["reward"] is not None
    try:
        prompts = read_prompts(data, with_columns=rewarded, record_columns=own)
        found = Fingerprint(_data_values(prompts))
        if not rewarded:
            prompts = read_prompts(data, with_columns=True, record_columns=own)
    except InputError as error:
        raise InputError(
            f"The rows of {asked.source}, which a reward gets, cannot be read again: {str(error).rstrip('.')}; if they "
            "are elsewhere now, name the place with data.path=PATH."
        ) from error
    begun = Fingerprint({key: source.fingerprint.values.get(key) for key in found.values})
    if differences(begun, found):
        raise InputError(
            f"data.path={data.path} no longer holds the rows of {asked.source} ({describe(begun, found)}): restore "
            "them, or name a copy with data.path=PATH."
        )
    return prompts


def _data_values(prompts: Prompts) -> dict[str, Any]:
    """Return the values of a fingerprint that depend on the rows of the dataset."""
    return {
        "data.content": prompts.content,
        "data.keep_columns": list(prompts.kept.names.values()),
        "data.kept_content": prompts.kept.digest(),
    }


def _open(source: RunDir, prompts: Prompts, asked: Rescoring) -> RunDir:
    """Begin the new run, or go on with it.

    Raises:
        InputError: the folder holds something else.
    """
    reward = asked.config.reward
    paths = prepare_folder(asked.config.output.dir)
    fingerprint = Fingerprint(
        {
            **without_reward(source.fingerprint),
            **_data_values(prompts),
            **reward_values(reward, source_of(reward)),
            _FROM: source.fingerprint.digest,
        }
    )

    def describe_run() -> dict[str, Any]:
        stored = read_run_json(source.paths)
        config = stored["config"]
        config["reward"] = reward
        config["output"]["dir"] = asked.config.output.dir
        config["data"]["path"] = asked.data_path or config["data"]["path"]
        new = {"fingerprint": fingerprint.values, "digest": fingerprint.digest, "packages": installed_versions()}
        return stored | new

    token = secrets.token_hex(4)
    run = begin_run(paths, fingerprint, prompts.row_ids, describe_run, token)
    return with_attempt(run, {**this_launch(workers=1), "rescores": str(source.paths.root)}, token)


def _work(source: RunDir, run: RunDir, prompts: Prompts, reward: Reward, config: Config) -> bool:
    """Score shards until the run is complete and sound, or what is left is in the hands of other processes.

    Returns:
        Whether the run is complete.
    """
    me = Worker.of_process(run.attempt, 0, os.environ)
    scorer = Scorer(reward)
    samples, there = run.samples_of(range(run.shards)), run.samples_of(run.committed())
    logger.info("Scoring %s samples%s.", f"{samples:,}", f"; {there:,} are there already" if there else "")
    said = time.monotonic()
    pause = POLL_SECONDS
    with beating(Heartbeat(run.files, run.paths, me), config.job.lease_seconds):
        workers = Workers(run.files, run.paths, me, config.job.lease_seconds)
        claims = ShardClaims(run.files, run.paths, workers, run.shards, Place())
        with closed_by(claims.close):
            while True:
                if (shard := claims.claim()) is not None:
                    pause = POLL_SECONDS
                    _score_shard(source, run, shard, prompts, scorer, me.writer)
                    claims.release(shard)
                    if time.monotonic() - said >= _SAY_SECONDS:
                        said = time.monotonic()
                        logger.info("Scored %s of %s samples.", f"{run.samples_of(run.committed()):,}", f"{samples:,}")
                elif run.complete():
                    if not mend(run, full=config.output.check == "full"):
                        break
                elif claims.left_to_others():
                    logger.info("Other processes have taken all that is left, and are alive: they finish the run.")
                    return False
                else:
                    time.sleep(pause)
                    pause = min(2 * pause, LONGEST_POLL_SECONDS)
    if scorer.failed > 1:
        logger.warning("The rewards of %s samples failed.", f"{scorer.failed:,}")
    return True


def _score_shard(source: RunDir, run: RunDir, shard: int, prompts: Prompts, scorer: Scorer, writer: str) -> None:
    """Write a shard of the source with new rewards.

    Raises:
        InputError: the source's is damaged.
    """
    if reason := damage_of(source, shard, full=True):
        raise InputError(
            f"Shard {shard} of {source.paths.root} is damaged ({reason}): run the command of that run again, which "
            "generates the shard anew, and then this one."
        )
    indices = run.shard_rows(shard)
    rows = {row.row_id: row.columns for row in prompts.rows(indices.start, indices.stop)}
    rescorer = RecordRescorer(scorer, rows, referred=REF_LOGPROBS in source.columns)

    def fill(file: HashedFile) -> RecordCounts:
        rewrite(source.paths.shard(shard, source.format), file, read=READ, change=rescorer.change)
        return rescorer.counts(read_manifest(source.paths.manifest(shard)))

    commit_file(run, shard, fill, writer, ("row_id", "sample", "completion_ids", "error_class", "reward"))
