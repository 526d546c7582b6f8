"""The waiting queue: order of rows, groups of equal prompts, reading of the stream."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rollout.batcher.admission_order import Ordering
from rollout.engine.batch_row import BatchRow, Completion
from rollout.engine.waiting_queue import WaitingQueue
from rollout.requests import Request, in_windows
from rollout.sampling_params import SamplingParams


class Stream:
    """A stream that counts the requests read from it."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.read = 0
        self._requests = requests

    def __iter__(self) -> Iterator[Request]:
        for request in self._requests:
            self.read += 1
            yield request


def request(name: str, prompt: Sequence[int] = (1, 2, 3), n: int = 1, **params: object) -> Request:
    return Request(name, prompt, SamplingParams(n=n, **params))  # type: ignore[arg-type]


def queue_of(
    requests: Sequence[Request],
    context_limit: int | None = None,
    vocabulary: int = 200,
    ordering: Ordering | None = None,
) -> WaitingQueue:
    return WaitingQueue(requests, context_limit, vocabulary, ordering)


def drain(queue: WaitingQueue) -> list[tuple[str, int]]:
    queue.fill(10**6)
    return [name_of(queue.pop()) for _ in range(len(queue))]


def name_of(row: BatchRow) -> tuple[str, int]:
    return row.request.row_id, row.sample


# -- the stream ------------------------------------------------------------------------------------------


def test_the_stream_is_read_only_until_enough_rows_wait() -> None:
    stream = Stream([request(str(i), n=2) for i in range(10)])
    queue = WaitingQueue(stream, None, 100)
    assert stream.read == 0
    assert queue, "nothing was read, so that more may come"
    queue.fill(1)
    assert (stream.read, len(queue)) == (1, 2)
    queue.fill(2)
    assert stream.read == 1
    queue.fill(5)
    assert (stream.read, len(queue)) == (3, 6)
    assert not queue.wants(6)
    assert queue.wants(7)
    queue.fill(100)
    assert (stream.read, len(queue)) == (10, 20)


def test_the_queue_is_empty_when_rows_and_stream_are() -> None:
    queue = queue_of([request("a")])
    queue.fill(1)
    assert queue
    row = queue.pop()
    assert queue, "whether the stream has more is not known yet"
    assert queue.wants(1)
    queue.fill(1)
    assert not queue
    assert not queue.wants(1)
    assert queue.row(0) is None
    queue.put_back([row])
    assert queue
    assert queue.row(0) is row


def test_a_stream_that_ended_is_not_asked_again() -> None:
    def once() -> Iterator[Request]:
        yield request("a")
        yield request("b")

    queue = WaitingQueue(once(), None, 100)
    queue.fill(5)
    queue.fill(5)
    assert drain(queue) == [("a", 0), ("b", 0)]


# -- order -----------------------------------------------------------------------------------------------


def test_rows_come_in_the_order_of_requests_and_samples() -> None:
    wanted = Request("b", [5], SamplingParams(n=9), samples=[7, 2])
    queue = queue_of([request("a", n=2), wanted, request("c")])
    assert drain(queue) == [("a", 0), ("a", 1), ("b", 7), ("b", 2), ("c", 0)]


def test_preempted_rows_go_first_oldest_before_younger() -> None:
    queue = queue_of([request(name) for name in "abcd"])
    queue.fill(4)
    a, b, c = (queue.pop() for _ in range(3))
    queue.put_back([c])
    queue.put_back([a, b])
    queue.put_back([])
    assert queue.row(0) is a
    assert drain(queue) == [(name, 0) for name in "abcd"]


def test_no_samples_wanted_means_no_rows() -> None:
    queue = queue_of([Request("a", [1], SamplingParams(n=3), samples=[]), request("b")])
    assert drain(queue) == [("b", 0)]


def test_any_sequence_behaves_as_a_list() -> None:
    for seed in range(20):
        print("seed", seed)
        rng = random.Random(seed)
        requests = [request(str(i), n=rng.randint(1, 3)) for i in range(12)]
        ahead = [(r.row_id, sample) for r in requests for sample in range(r.params.n)]
        queue, out = queue_of(requests), list[BatchRow]()
        while queue or out:
            if out and rng.random() < 0.3:
                count = rng.randint(1, min(3, len(out)))
                queue.put_back(out[-count:])
                ahead = [name_of(row) for row in out[-count:]] + ahead
                del out[-count:]
            queue.fill(rng.randint(1, 6))
            first = queue.row(0)
            assert (first is None) == (not ahead)
            if first is None:
                break
            out.append(queue.pop())
            assert out[-1] is first
            assert name_of(first) == ahead.pop(0)


# -- expectations ----------------------------------------------------------------------------------------


def expecting(name: str, tokens: float | None, n: int = 1, **params: object) -> Request:
    return replace(request(name, [len(name), *name.encode()], n, **params), expected_tokens=tokens)


def test_current_window_is_read_whole_and_no_further() -> None:
    stream = Stream([*in_windows([expecting(str(i), None) for i in range(5)], 3), request("last")])
    queue = queue_of(stream)  # type: ignore[arg-type]
    for wanted, read in ((1, 3), (3, 3), (4, 5), (5, 5), (6, 6), (9, 6)):
        queue.fill(wanted)
        assert (stream.read, len(queue)) == (read, read)


def test_windows_keep_requests_and_their_order() -> None:
    requests = [request(str(i)) for i in range(7)]
    windows = list(in_windows(iter(requests), 3))
    assert [replace(r, ahead=0) for r in windows] == requests
    assert [r.ahead for r in windows] == [2, 1, 0, 2, 1, 0, 0]
    assert list(in_windows([], 3)) == []


def test_rows_without_expectations_keep_their_order() -> None:
    queue = queue_of([*in_windows([expecting(name, None, n=2) for name in "abc"], 9)], ordering=Untouched())
    queue.fill(1)
    queue.arrange(1000, None)
    assert drain(queue) == [(name, sample) for name in "abc" for sample in range(2)]


class Untouched(Ordering):
    def order(self, *arguments: object, **named: object) -> Any:
        raise AssertionError("there was nothing to order by")


def test_rows_that_are_long_go_first_with_their_groups() -> None:
    requests = [expecting("a", 5, n=2), expecting("b", 200, n=2), expecting("c", None), expecting("d", 250, n=2)]
    queue = queue_of([*in_windows(requests, 9)])
    queue.fill(1)
    before = queue.upcoming()
    queue.arrange(10_000, None)
    assert queue.upcoming() is not before, "policies are told of the new order"
    assert drain(queue) == [("d", 0), ("d", 1), ("b", 0), ("b", 1), ("c", 0), ("a", 0), ("a", 1)]


def test_a_row_is_expected_to_be_no_longer_than_its_limit() -> None:
    requests = [expecting("a", 50), expecting("b", 10**9, max_new_tokens=5), expecting("c", 60)]
    queue = queue_of([*in_windows(requests, 9)])
    queue.fill(1)
    queue.arrange(10_000, None)
    assert [name for name, _ in drain(queue)] == ["c", "a", "b"]


def test_rows_that_have_begun_stay_in_front() -> None:
    queue = queue_of([*in_windows([expecting(name, 10.0 + i, n=3) for i, name in enumerate("abcd")], 9)])
    queue.fill(1)
    first = [queue.pop() for _ in range(4)]
    first[0].completion = Completion(*(np.zeros(2) for _ in range(4)))  # type: ignore[arg-type]
    queue.put_back([first[0]])
    first[3].group.holders = 1
    queue.arrange(10_000, None)
    assert drain(queue) == [("a", 0), ("b", 1), ("b", 2), *((name, i) for name in "dc" for i in range(3))]


def test_rows_are_ordered_again_for_new_rows_or_changed_hints() -> None:
    ordering = Counting()
    windows = in_windows([expecting(str(i), 10.0 + i) for i in range(500)], 300)
    queue = queue_of([*windows, *(expecting(str(i), 10.0) for i in range(500, 600))], ordering=ordering)
    queue.fill(1)
    rows = [queue.pop() for _ in range(100)]
    for wanted, orders in ((200, 1), (200, 1), (201, 2), (400, 2), (410, 2)):
        queue.fill(wanted)
        queue.arrange(1000, 4)
        assert ordering.orders == orders
    for row in rows:
        queue.learn(row, int(row.expected_tokens))
        queue.arrange(1000, 4)
    assert ordering.orders == 2, "the hints were right"
    for row in rows:
        queue.learn(row, 200 - int(row.expected_tokens))
        queue.arrange(1000, 4)
    assert ordering.orders > 2
    assert [name for name, _ in drain(queue)] == [str(i) for i in range(100, 600)], "they turned out to be useless"


class Counting(Ordering):
    orders = 0

    def order(self, *arguments: Any, **named: Any) -> Any:
        self.orders += 1
        return super().order(*arguments, **named)


# -- groups and limits -----------------------------------------------------------------------------------


def test_equal_prompts_side_by_side_are_one_group() -> None:
    prompts = [(1, 2), (1, 2), (1, 3), (1, 2), (1, 2, 0)]
    queue = queue_of([request(str(i), prompt, n=2) for i, prompt in enumerate(prompts)])
    queue.fill(100)
    rows = [queue.pop() for _ in range(10)]
    groups = [rows[2 * i].group for i in range(5)]
    assert [rows[2 * i + 1].group for i in range(5)] == groups
    assert groups[0] is groups[1]
    assert len({id(group) for group in groups}) == 4
    assert [group.prompt_ids.tolist() for group in groups] == [list(prompt) for prompt in prompts]
    assert rows[3].request.row_id == "1", "a row keeps its own request"


def test_a_row_s_limit_is_what_the_context_leaves() -> None:
    requests = [request("a", [1] * 5, max_new_tokens=7), request("b", [1] * 5, max_new_tokens=3)]
    requests += [request("c", [1] * 9, max_new_tokens=3)]
    for context, limits in ((None, [7, 3, 3]), (12, [7, 3, 3]), (11, [6, 3, 2]), (10, [5, 3, 1])):
        queue = queue_of(requests, context)
        queue.fill(3)
        assert [queue.pop().limit for _ in range(3)] == limits


def test_demand_and_prompt_tokens_of_waiting_rows() -> None:
    requests = [request("a", [1] * 5, n=3, max_new_tokens=10), request("b", [2] * 4, max_new_tokens=100)]
    queue = queue_of(requests, 50)
    queue.fill(9)
    assert queue.max_tokens == 3 * (5 + 10) + 4 + 46
    assert queue.waiting_prompt_tokens == 5 + 4
    queue.pop()
    assert queue.waiting_prompt_tokens == 5 + 4, "its siblings still wait"
    queue.pop()
    queue.pop()
    assert (queue.max_tokens, queue.waiting_prompt_tokens) == (50, 4)
    queue.pop()
    assert (queue.max_tokens, queue.waiting_prompt_tokens) == (0, 0)


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "error_class", "said"),
    [
        ([], "empty_prompt", "no tokens"),
        ([1] * 8, "prompt_too_long", "has 8 tokens; the model's context of 8 leaves none"),
        ([1] * 9, "prompt_too_long", "has 9 tokens"),
        ([1, 200], "bad_prompt", "outside of the vocabulary of 200"),
        ([-1, 1], "bad_prompt", "outside of the vocabulary"),
        ([2**70], "bad_prompt", "outside of the vocabulary"),
    ],
)
def test_a_prompt_that_cannot_run_is_refused_and_the_next_goes_on(
    prompt: list[int], error_class: str, said: str
) -> None:
    bad = request("bad", prompt, n=4)
    queue = queue_of([request("a"), bad, request("b", [0, 199])], context_limit=8)
    assert drain(queue) == [("a", 0), ("b", 0)]
    ((refused, found_class, message),) = queue.take_rejected()
    # Records cannot hold ids of any size.
    assert refused == (replace(bad, prompt_ids=()) if error_class == "bad_prompt" else bad)
    assert found_class == error_class
    assert said in message
    assert queue.take_rejected() == []


def test_the_longest_prompt_that_fits_is_taken() -> None:
    queue = queue_of([request("a", [1] * 7)], context_limit=8)
    assert drain(queue) == [("a", 0)]
    assert queue.take_rejected() == []


def test_refused_requests_do_not_count_as_waiting() -> None:
    stream = Stream([request("bad", []), request("bad too", []), request("a"), request("b")])
    queue = WaitingQueue(stream, None, 100)
    queue.fill(1)
    assert (stream.read, len(queue)) == (3, 1)
    assert len(queue.take_rejected()) == 2


def test_prompts_may_be_arrays() -> None:
    queue = queue_of([Request("a", np.array([4, 5], np.int32), SamplingParams())])  # type: ignore[arg-type]
    queue.fill(1)
    row = queue.pop()
    assert row.context.tolist() == [4, 5]
    assert row.context.dtype == np.int64
