"""The loop against one row at a time: memory, policy and allocator failures change no record."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rollout.records import Record
from rollout.requests import Request
from rollout.sampling_params import SamplingParams
from tests.support.toy_loop import (
    BROKEN,
    EOS,
    PAGE,
    PAGE_SIZE,
    VOCABULARY,
    Fixed,
    Wild,
    World,
    all_expected,
    assert_same,
    expected,
    many,
    plain,
)

pytestmark = pytest.mark.usefixtures("late_or_not", "little_patience")

# -- whatever the policy and memory ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_records_do_not_depend_on_policy_or_memory(seed: int) -> None:
    print("seed", seed)
    requests = many(14, seed)
    wanted = all_expected(requests)
    world = World(requests, Wild(seed), max_kv_pages=22)
    assert_same(world.run(), wanted)
    assert world.tally.preempted_rows > 0
    assert world.tally.samples == len(wanted)
    assert world.tally.error_samples == world.tally.out_of_memory_events == 0
    assert world.tally.output_tokens == sum(len(record.completion_ids) for record in wanted)
    assert world.tally.prompt_tokens == sum(len(record.prompt_ids) for record in wanted)
    assert world.tally.sampled_tokens == sum(report.new_tokens for report in world.reports)
    assert world.tally.prefilled_tokens == sum(report.prefill_tokens for report in world.reports)
    assert world.tally.preempted_rows == sum(report.preempted_rows for report in world.reports)
    assert all(report.kv_bytes <= 22 * PAGE for report in world.reports)
    assert {record.finish_reason for record in wanted} == {"stop", "length"}


def test_the_prompt_of_many_samples_is_prefilled_once() -> None:
    requests = plain(1, tokens=11, n=8)
    world = World(requests)
    assert_same(world.run(), all_expected(requests))
    assert world.tally.prefilled_tokens == 11
    assert (world.tally.live_rows_max, world.tally.preempted_rows) == (8, 0)


def test_paused_rows_keep_their_pages_and_resume_when_older_rows_end(late_or_not: bool) -> None:
    requests = plain(5, tokens=6, new=9)
    world = World(requests, Fixed(rows=5, decode_rows=2))
    assert_same(world.run(), all_expected(requests))
    assert (world.tally.preempted_rows, world.tally.prefilled_tokens) == (0, 5 * 6)
    # All draw their first token where their prefill ends; then no more than two decode at a time.
    assert [report.new_tokens for report in world.reports if report.new_tokens][:3] == [5, 2, 2]
    assert max(report.new_tokens for report in world.reports[1:]) == 2
    assert [report.paused_rows for report in world.reports[1:3]] == [3, 3]
    assert world.tally.paused_row_steps == sum(report.paused_rows for report in world.reports) > 0
    assert late_or_not or [report.live_rows for report in world.reports][8:11] == [5, 3, 3]


def test_one_row_decodes_if_the_policy_pauses_all() -> None:
    requests = plain(3, tokens=6, new=5)
    world = World(requests, Fixed(rows=3, decode_rows=0))
    assert_same(world.run(), all_expected(requests))


def test_a_long_prompt_is_prefilled_in_parts_between_decodes() -> None:
    requests = [*plain(1, new=20), Request("long", list(range(28, 0, -1)), SamplingParams(max_new_tokens=3))]
    world = World(requests, Fixed(prefill_tokens=5))
    assert_same(world.run(), all_expected(requests))
    assert max(report.prefill_tokens for report in world.reports) == 5
    assert sum(report.prefill_tokens for report in world.reports) == 6 + 28
    long_steps = [report for report in world.reports if report.prefill_tokens == 5 and report.new_tokens]
    assert len(long_steps) >= 4, "the other row went on meanwhile"


def test_rows_end_at_their_stop_token_or_limit() -> None:
    prompts = {"eos": (5, 4), "ignored": (5, 4), "ids": (9, 9), "stop": (4, 1, 1), "context": (1, 2, 3)}
    params = {
        "eos": SamplingParams(n=6, max_new_tokens=400),
        "ignored": SamplingParams(n=2, max_new_tokens=80, ignore_eos=True),
        "ids": SamplingParams(n=3, max_new_tokens=400, stop_token_ids=(7, 3)),
        "stop": SamplingParams(n=4, max_new_tokens=400, stop=("d", "gh")),
        "context": SamplingParams(n=2, max_new_tokens=400, ignore_eos=True),
    }
    requests = [Request(name, prompt, params[name]) for name, prompt in prompts.items()]
    world = World(requests, context_limit=97)
    records = world.run()
    assert_same(records, all_expected(requests, context_limit=97))
    by_name = {name: [record for record in records if record.row_id == name] for name in prompts}
    assert all(record.completion_ids[-1] == EOS for record in by_name["eos"] if record.finish_reason == "stop")
    assert any(record.finish_reason == "stop" for record in by_name["eos"])
    assert all(EOS in record.completion_ids[:-1] for record in by_name["ignored"])
    assert {record.completion_ids[-1] for record in by_name["ids"]} <= {EOS, 3, 7}
    assert all(not set(record.completion_ids[:-1]) & {EOS, 3, 7} for record in by_name["ids"])
    assert all("d" not in record.text and "gh" not in record.text for record in by_name["stop"])
    assert any(len(record.text) < len(record.completion_ids) for record in by_name["stop"])
    assert {(r.finish_reason, len(r.completion_ids)) for r in by_name["context"]} == {("length", 94)}


def test_requests_that_cannot_run_become_error_records() -> None:
    good = plain(2, n=2)
    bad = [
        Request("empty", [], SamplingParams(n=2)),
        Request("long", [1] * 50, SamplingParams()),
        Request("strange", [VOCABULARY], SamplingParams()),
    ]
    world = World([bad[0], good[0], bad[1], good[1], bad[2]], context_limit=50)
    records = world.run()
    errors = {(r.row_id, r.sample): r.error_class for r in records if r.finish_reason == "error"}
    assert errors == {
        ("empty", 0): "empty_prompt",
        ("empty", 1): "empty_prompt",
        ("long", 0): "prompt_too_long",
        ("strange", 0): "bad_prompt",
    }
    assert_same([record for record in records if record.finish_reason != "error"], all_expected(good))
    assert (world.tally.samples, world.tally.error_samples) == (8, 4)


def test_no_requests_give_no_records() -> None:
    assert World([]).run() == []


@pytest.mark.parametrize("changed", [False, True])
def test_tokens_carry_the_version_they_were_drawn_with(changed: bool) -> None:
    requests = many(12, seed=3)
    world = World(requests, Fixed(rows=6, prefill_tokens=20))
    records: list[Record] = []
    versions: list[int] = []
    for record in world.stream():
        records.append(record)
        versions.append(world.loop.weight_version)
        if len(records) % 3 == 0:
            tokens_before = world.tally.sampled_tokens
            world.loop.use_weights(len(records), changed=changed)
            world.check()
            assert world.tally.sampled_tokens == tokens_before
            if changed:
                assert world.pool.used_pages == 0  # neither rows nor shared prompts keep keys of other weights
    assert_same(records, all_expected(requests))
    assert len(set(versions)) > 3
    for record, version in zip(records, versions, strict=True):
        assert len(record.weight_versions) == len(record.completion_ids)
        assert record.weight_versions == sorted(record.weight_versions)
        assert record.weight_version == record.weight_versions[-1] <= version
    assert any(len(set(record.weight_versions)) > 1 for record in records)


def test_records_and_reports_carry_what_they_were_given() -> None:
    world = World(plain(3, n=2), Fixed(rows=2, reason="memory"), weight_version=9)
    assert {record.weight_version for record in world.run()} == {9}
    assert [report.step for report in world.reports] == list(range(1, len(world.reports) + 1))
    assert {(report.row_target, report.reason) for report in world.reports} == {(2, "memory")}
    assert max(report.live_rows for report in world.reports) <= 2
    assert world.tally.steps == len(world.reports)


def test_a_loop_that_is_left_early_gives_everything_back() -> None:
    world = World(plain(30))
    stream = world.stream()
    for _ in range(5):
        next(stream)
    assert world.pool.bytes_held > 0
    world.loop.close()
    world.check()
    assert (world.pool.bytes_held, world.pool.used_pages) == (0, 0)


# -- the stream ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "pages", "ahead"), [(3, 1000, 4), (1, 1000, 2), (100, 16, 9)])
def test_the_stream_is_read_no_further_than_rows_may_be_admitted(
    rows: int, pages: int, ahead: int, late_or_not: bool
) -> None:
    """It reads the live rows and one more that shows that others wait; under a memory limit, about what still fits.

    Others take the place of rows that have ended before their late records are out.
    """
    read = 0

    def stream() -> Iterator[Request]:
        nonlocal read
        for request in plain(40, tokens=6, new=7):
            read += 1
            yield request

    world = World(stream(), Fixed(rows), max_kv_pages=pages, read_first=1)
    most = done = 0
    for _ in world.stream():
        most = max(most, read - done)
        done += 1
    assert (read, done) == (40, 40)
    assert most <= ahead + late_or_not * world.tally.live_rows_max


def test_the_stream_s_end_is_waited_for() -> None:
    """Read a slow stream: the job does not end with its live rows while the stream may have more."""
    requests = plain(5)
    world = World(iter(requests), Fixed(rows=1), read_first=1)
    assert_same(world.run(), all_expected(requests))


# -- numbers that are not finite -------------------------------------------------------------------------


@pytest.mark.parametrize("prefill_tokens", [64, 5])
def test_row_with_nan_logits_is_an_error_and_changes_no_other_row(prefill_tokens: int) -> None:
    """Other rows reuse its pages and must not find NaN in them; the toy model checks."""
    good = many(12, seed=1)
    params = SamplingParams(n=2, max_new_tokens=20)
    bad = [Request(f"bad{i}", [BROKEN, *range(i, i + 9)], params) for i in range(3)]
    mixed = [request for i in range(3) for request in (*good[4 * i : 4 * i + 4], bad[i])]
    world = World(mixed, Fixed(prefill_tokens=prefill_tokens), max_kv_pages=30)
    records = world.run()
    errors = [record for record in records if record.finish_reason == "error"]
    assert {(r.row_id, r.sample) for r in errors} == {(f"bad{i}", n) for i in range(3) for n in range(2)}
    assert {(r.error_class, r.error) for r in errors} == {("not_finite", "The model's logits are not finite.")}
    assert all(len(record.completion_ids) == 1 for record in errors)
    assert_same([record for record in records if record not in errors], all_expected(good))
    assert world.tally.error_samples == 6


# -- too large, and squeezed -----------------------------------------------------------------------------


def test_a_prompt_too_large_for_the_cap_is_an_error_and_the_job_goes_on() -> None:
    good = plain(4)
    large = Request("large", [1] * 60, SamplingParams(n=2, max_new_tokens=4))
    world = World([*good[:2], large, *good[2:]], max_kv_pages=12)
    records = world.run()
    errors = [record for record in records if record.finish_reason == "error"]
    assert [(r.row_id, r.sample, r.error_class, r.completion_ids) for r in errors] == [
        ("large", 0, "too_large", []),
        ("large", 1, "too_large", []),
    ]
    assert "more than 60 tokens does not fit into max_kv_bytes=" in errors[0].error
    assert_same([record for record in records if record not in errors], all_expected(good))


def test_row_that_outgrows_the_cap_is_an_error_with_its_tokens() -> None:
    good = plain(3, new=12)
    long = Request("long", [3, 4, 5], SamplingParams(max_new_tokens=200, ignore_eos=True))
    world = World([long, *good], max_kv_pages=12)
    records = world.run()
    (error,) = [record for record in records if record.finish_reason == "error"]
    assert (error.row_id, error.error_class) == ("long", "too_large")
    assert len(error.completion_ids) == 12 * PAGE_SIZE - 3 + 1, "the last token needs no page"
    whole = expected(long, 0)
    assert error.completion_ids == whole.completion_ids[: len(error.completion_ids)]
    assert error.logprobs == pytest.approx(whole.logprobs[: len(error.logprobs)], abs=1e-5)
    assert_same([record for record in records if record is not error], all_expected(good))
