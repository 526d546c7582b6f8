"""Workloads, and models with random weights: what engines are given."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jobs.bench import decode_bandwidth, peer_envs
from jobs.bench.engines import harness
from jobs.bench.lib import random_models, workload
from jobs.bench.lib.workload import Request, Shape
from rollout.models.loading import load
from tests.support.bench import PROMPTS


class TestWorkload:
    def test_it_survives_the_file(self, tmp_path: Path) -> None:
        requests = workload.build(PROMPTS, Shape(requests=6, samples=2))
        workload.write(requests, tmp_path / "w.json")
        assert workload.read(tmp_path / "w.json") == requests
        entries = json.loads((tmp_path / "w.json").read_text())
        assert entries[0] == {"ids": [1, 2, 3], "n": requests[0].n, "group": 0}

    def test_samples_of_a_prompt_stand_together(self) -> None:
        requests = workload.build(PROMPTS, Shape(requests=16, samples=8))
        assert [request.group for request in requests] == [0] * 8 + [1] * 8
        assert {request.ids for request in requests[:8]} == {(1, 2, 3)}
        assert len({request.n for request in requests[:8]}) > 1

    def test_lengths_are_those_of_chat(self) -> None:
        drawn = [request.n for request in workload.build([[1]] * 20_000, Shape(requests=20_000, max_new=10_000))]
        assert statistics.median(drawn) == pytest.approx(129, rel=0.05)
        assert statistics.mean(drawn) == pytest.approx(211, rel=0.05)

    def test_lengths_stay_in_bounds(self) -> None:
        lengths = [request.n for request in workload.build(PROMPTS, Shape(max_new=100))]
        assert min(lengths) >= workload.SHORTEST
        assert max(lengths) == 100

    def test_the_seed_is_all_that_lengths_depend_on(self) -> None:
        shape = Shape()
        assert workload.build(PROMPTS, shape) == workload.build(PROMPTS, shape)
        other = workload.build(PROMPTS, Shape(seed=shape.seed + 1))
        assert other != workload.build(PROMPTS, shape)

    def test_lengths_from_a_table(self, tmp_path: Path) -> None:
        (tmp_path / "l.csv").write_text("TIMESTAMP,GeneratedTokens\na,50\nb,60\n")
        lengths = workload.csv_lengths(tmp_path / "l.csv", "GeneratedTokens")
        assert {request.n for request in workload.build(PROMPTS, Shape(), lengths)} == {50, 60}

    def test_drawn_lengths_are_the_same_on_every_machine(self) -> None:
        requests = workload.build([[1], [2, 3], [4]], Shape(requests=6, samples=2), [3, 50, 70, 90, 600])
        assert [(request.ids, request.n, request.group) for request in requests] == [
            ((1,), 70, 0),
            ((1,), 50, 0),
            ((2, 3), 90, 1),
            ((2, 3), 8, 1),
            ((4,), 8, 2),
            ((4,), 512, 2),
        ]

    def test_texts_from_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "q.jsonl").write_text('{"question": "one?"}\n\n{"question": "two?"}\n')
        assert workload.file_texts(tmp_path / "q.jsonl", "question") == ["one?", "two?"]
        assert len(set(workload.arithmetic_texts(8))) == 8

    def test_a_group_defaults_to_a_prompt_of_its_own(self, tmp_path: Path) -> None:
        (tmp_path / "w.json").write_text('[{"ids": [1], "n": 2}, {"ids": [1], "n": 3}]')
        assert workload.read(tmp_path / "w.json") == [Request((1,), 2, 0), Request((1,), 3, 1)]

    @pytest.mark.parametrize(
        "text", ["{}", "[]", "[3]", '[{"ids": [1]}]', '[{"ids": [], "n": 1}]', '[{"ids": [1], "n": 0}]']
    )
    def test_what_is_no_workload(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "w.json").write_text(text)
        with pytest.raises(ValueError, match=r"w\.json"):
            workload.read(tmp_path / "w.json")

    @pytest.mark.parametrize("shape", [Shape(requests=9, samples=2), Shape(requests=129)])
    def test_shapes_that_cannot_be_filled(self, shape: Shape) -> None:
        with pytest.raises(ValueError, match=r"requests|prompts"):
            workload.build(PROMPTS, shape)


#: Of 25 tokens and an answer of five; no token stands in two of them.
PROBLEMS = [([*range(30 * i, 30 * i + 25)], [*range(30 * i + 25, 30 * i + 30)]) for i in range(1000)]


class TestFields:
    """Workloads at the sizes of fields of use."""

    def made(self, name: str, seed: int = 3) -> list[Request]:
        kind = workload.NAMED[name]
        assert isinstance(kind, workload.Field)
        return kind.requests(workload.Source(PROBLEMS, seed))

    def test_long_prompts(self) -> None:
        requests = self.made("w5")
        lengths = [len(request.ids) for request in requests]
        assert len(requests) == 9
        assert lengths[-1] == 7000
        assert all(1020 <= length <= 7000 for length in lengths)
        assert len(set(lengths)) > 4
        assert all(8 <= request.n <= 64 for request in requests)

    def test_lengths_are_those_of_long_contexts(self) -> None:
        source = workload.Source(PROBLEMS, 3)
        drawn = [source.length(workload.LONG_PROMPT, workload.LONG_SIGMA, 1020, 7000) for _ in range(20_000)]
        # Of the trace, above its median: 1,858 on average, a tenth of them above 4,083.
        assert statistics.mean(drawn) == pytest.approx(1858, rel=0.05)

    def test_few_shot_prompts_begin_alike(self) -> None:
        requests = self.made("w6")
        assert len(requests) == len({request.ids for request in requests}) == 48
        assert len({request.ids[:1020] for request in requests}) == 1
        assert {len(request.ids) for request in requests} == {1020 + 25}
        assert {request.group for request in requests} == {0}
        assert all(1 <= request.n <= 64 for request in requests)

    def test_reasoning(self) -> None:
        requests = self.made("w7")
        assert [request.n for request in requests] == [256, 384, 512, 768, 1024, 1024, 1536, 2000]
        assert {len(request.ids) for request in requests} == {100}
        assert len({request.ids for request in requests}) == 8

    def test_a_turn_begins_with_the_turn_before(self) -> None:
        requests = self.made("w8")
        assert len(requests) == 32
        assert len({request.ids[:300] for request in requests}) == 1
        assert len({request.ids[:400] for request in requests}) == 8
        for first in range(0, 32, 4):
            for turn in range(first, first + 3):
                before, after = requests[turn].ids, requests[turn + 1].ids
                assert after[: len(before)] == before
                assert 100 <= len(after) - len(before) <= 499
        assert {request.n for request in requests} == {64}

    @pytest.mark.parametrize("name", ["w5", "w6", "w7", "w8"])
    def test_the_seed_is_all_that_they_depend_on(self, name: str) -> None:
        assert self.made(name) == self.made(name)
        assert self.made(name) != self.made(name, seed=4)

    def test_they_stay_within_the_context(self) -> None:
        requests = [Request(tuple(range(50)), 20, 0), Request((1, 2), 90, 1), Request(tuple(range(90)), 80, 2)]
        fitting = workload.within(requests, 60)
        assert [(len(request.ids), request.n, request.group) for request in fitting] == [
            (40, 20, 0),
            (2, 58, 1),
            (30, 30, 2),
        ]
        assert workload.within(requests, None) == requests

    @pytest.mark.parametrize("name", ["w5", "w6", "w7", "w8"])
    def test_they_need_no_tokenizer(self, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(peer_envs, "ROOT", tmp_path)
        model = random_models.resolve("random:tiny")
        requests = workload.make(model, workload.NAMED[name])
        assert requests == workload.make(model, workload.NAMED[name])
        assert all(0 <= token < 199 for request in requests for token in request.ids)
        assert max(len(request.ids) + request.n for request in requests) <= 4096

    def test_they_are_word_problems(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Letters:
            def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
                assert not add_special_tokens
                return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

        monkeypatch.setattr(load, "load_tokenizer", lambda source: Letters())
        (question, answer), *_ = workload.problems_for("some/model", 3)
        assert "".join(map(chr, question)).startswith("Question: ")
        assert "".join(map(chr, answer)).strip().isdecimal()

    def test_a_line_says_how_much_work_it_is(self) -> None:
        said = workload.describe([Request((1, 2, 3), 4, 0), Request((1, 2, 3), 5, 0), Request((1,), 6, 1)])
        assert said == "3 requests over 2 prompts, 7 prompt tokens (longest 3), 15 output tokens"


class TestRandomModels:
    @pytest.fixture(autouse=True)
    def elsewhere(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(peer_envs, "ROOT", tmp_path)

    @pytest.mark.parametrize(
        ("name", "parameters", "kv_bytes"),
        [
            ("qwen2.5-0.5b", 494_032_768, 24 * 2 * 2 * 64 * 2),
            ("qwen2.5-1.5b", 1_543_714_304, 28 * 2 * 2 * 128 * 2),
            ("llama-3.1-8b", 8_030_261_248, 32 * 2 * 8 * 128 * 2),
        ],
    )
    def test_they_have_the_shape_of_those_that_they_are_named_after(
        self, name: str, parameters: int, kv_bytes: int
    ) -> None:
        config = AutoConfig.from_pretrained(random_models.resolve(f"random:{name}"))
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        assert model.num_parameters() == parameters
        head_dim = config.hidden_size // config.num_attention_heads
        assert config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim * 2 == kv_bytes
        # All are read, but of an embedding of its own only some rows.
        embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        assert decode_bandwidth.weight_bytes(model) == 2 * (parameters - embedding)

    def test_no_such_shape(self) -> None:
        with pytest.raises(ValueError, match="random:qwen2"):
            random_models.resolve("random:gpt-5")

    def test_engines_and_workloads_do_without_weights_and_tokenizer(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = random_models.resolve("random:tiny")
        requests = workload.make(model, Shape(requests=6, samples=2, max_new=12))
        assert len({request.ids for request in requests}) == 3
        assert all(46 <= len(request.ids) <= 136 for request in requests)
        assert all(0 <= token < 199 for request in requests for token in request.ids)
        workload.write(requests, tmp_path / "w.json")
        for module in ("rollout_engine", "transformers_static"):
            # In this process, which has imported torch already.
            server = harness.Server(f"jobs.bench.engines.{module}", harness.Setup(model, "float32", "cpu"), age=0.0)
            assert server.answer({"do": "load", "workload": str(tmp_path / "w.json")})["first_token_seconds"] > 0
            found = server.answer({"do": "run", "workload": str(tmp_path / "w.json")})
            assert found["tokens"] == sum(request.n for request in requests)


def test_workloads_for_a_gpu() -> None:
    for name, groups in (("w3", 2048), ("w4", 128)):
        shape = workload.NAMED[name]
        assert isinstance(shape, Shape)
        requests = workload.build([[1]] * groups, shape)
        assert (len(requests), len({request.group for request in requests})) == (2048, groups)
        assert 512 < max(request.n for request in requests) <= 2048
