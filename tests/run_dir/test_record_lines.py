"""Records as lines: exact for any number and any text."""

from __future__ import annotations

import math

import numpy as np

from rollout.records import Record
from rollout.run_dir.record_lines import decode_record, encode_record


def test_record_survives_encoding_exactly() -> None:
    rng = np.random.default_rng(7)
    bits = rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    values = bits[np.isfinite(bits)].tolist()
    record = Record(
        row_id='ü\n"\\',
        sample=3,
        prompt_ids=[0, 2**31 - 1],
        completion_ids=[5],
        text="two\nlines \U0001f600 \x00 \u2028",
        logprobs=values,
        sampler_logprobs=[-0.0, float(np.float32(-1e-45))],
        finish_reason="stop",
        error_class="reward_failed",
        error="why",
        reward=0.1,
        seed=-(2**63),
        weight_version=4,
        attempt=2,
    )
    again = decode_record(encode_record(record))
    assert again == record
    assert math.copysign(1, again.sampler_logprobs[0]) == -1
    assert b"\n" not in encode_record(record)


def test_line_of_a_fixed_record_never_changes() -> None:
    record = Record(
        row_id="a",
        sample=1,
        prompt_ids=[1, 2],
        completion_ids=[3],
        text="é",
        logprobs=[-0.5],
        sampler_logprobs=[-0.25],
        finish_reason="stop",
        seed=7,
    )
    assert encode_record(record) == (
        b'{"row_id":"a","sample":1,"prompt_ids":"AQAAAAIAAAA=","completion_ids":"AwAAAA==","text":"\\u00e9",'
        b'"logprobs":"AAAAvw==","sampler_logprobs":"AACAvg==","finish_reason":"stop","error_class":"","error":"",'
        b'"reward":null,"seed":7,"weight_version":0,"attempt":0,"reasoning":""}'
    )


def test_stopped_sample_keeps_what_it_needs_to_go_on() -> None:
    record = Record("a", 0, [1], [2, 3], "x", [-1.0, -2.0], [-1.0, -2.0], "abort", weight_versions=[4, 5], end_ids=[9])
    assert decode_record(encode_record(record)) == record
