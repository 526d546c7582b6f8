"""The settings and files that a fingerprint covers, and those it does not."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

import rollout.run_dir.fingerprint as fingerprint_module
import rollout.run_dir.model_digests as module
from rollout.data.prompts import read_prompts
from rollout.run_dir.fingerprint import (
    Fingerprint,
    describe,
    differences,
    fingerprint_of,
)
from rollout.run_dir.model_digests import tokenizer_digest, weights_digest
from tests.support.jobs import config_of, fake_model


def made(folder: Path, *overrides: str, content: str = "c", adapter: Path | None = None) -> Fingerprint:
    return fingerprint_of(config_of(folder, *overrides), content, folder / "model", adapter)


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("sampling.temperature=0.5", ["sampling.temperature"]),
        ("sampling.n=2", ["sampling.n"]),
        ("sampling.stop=[x]", ["sampling.stop"]),
        ("sampling.repetition_penalty=1.1", ["sampling.repetition_penalty"]),
        ("sampling.min_new_tokens=3", ["sampling.min_new_tokens"]),
        ("sampling.logit_bias={5: -1}", ["sampling.logit_bias"]),
        ("sampling.bad_words=[x,[1,2]]", ["sampling.bad_words"]),
        ("sampling.allowed_token_ids=[1,2]", ["sampling.allowed_token_ids"]),
        ("seed=1", ["seed"]),
        ("data.as_chat=true", ["data.as_chat"]),
        ("data.system_prompt=x", ["data.system_prompt"]),
        ("model.dtype=float32", ["model.dtype"]),
        ("reward._target_=package.score", ["reward"]),
        ("output.format=jsonl", ["output.format"]),
    ],
)
def test_settings_that_change_results_differ(tmp_path: Path, override: str, keys: list[str]) -> None:
    assert differences(made(tmp_path), made(tmp_path, override)) == keys


@pytest.mark.parametrize(
    "override",
    [
        "model.device=cpu",
        "batcher=static",
        "batcher.max_rows=3",
        "memory.max_kv_bytes=9",
        "output.dir=elsewhere",
        "output.rows_per_shard=3",
        "data.path=elsewhere",
        "data.length_hint_column=tokens",
        "data.lengths_from=elsewhere",
    ],
)
def test_execution_settings_do_not_differ(tmp_path: Path, override: str) -> None:
    assert made(tmp_path).digest == made(tmp_path, override).digest


@pytest.mark.parametrize(
    "override", ["sampling.repetition_penalty=1", "sampling.logit_bias={}", "sampling.bad_words=[]"]
)
def test_parameters_that_are_off_do_not_differ_from_runs_without_them(tmp_path: Path, override: str) -> None:
    assert made(tmp_path).digest == made(tmp_path, override).digest
    assert not any("penalty" in key or "bad_words" in key for key in made(tmp_path, override).values)


def test_data_content_differs(tmp_path: Path) -> None:
    assert differences(made(tmp_path), made(tmp_path, content="other")) == ["data.content"]


def test_adapters_weights_and_tokenizer_differ(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    fake_model(adapter)
    before = made(tmp_path, adapter=adapter)
    assert differences(before, made(tmp_path)) == ["model.adapter", "model.adapter_tokenizer"]
    (adapter / "chat_template.jinja").write_text("other")
    assert differences(before, made(tmp_path, adapter=adapter)) == ["model.adapter_tokenizer"]
    (adapter / "adapter_model.safetensors").write_bytes(b"other")
    assert differences(before, made(tmp_path, adapter=adapter)) == ["model.adapter", "model.adapter_tokenizer"]


def test_moved_model_has_the_same_digest(tmp_path: Path) -> None:
    fake_model(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "of_tokenizer"),
    [
        ("config.json", False),
        ("generation_config.json", False),
        ("model.safetensors", False),
        ("modeling_own.py", False),
        ("tokenizer.json", True),
        ("tokenizer_config.json", True),
        ("chat_template.jinja", True),
        ("special_tokens_map.json", True),
        ("vocab.json", True),
        ("merges.txt", True),
        ("tokenizer.model", True),
    ],
)
def test_each_model_file_is_in_one_of_the_digests(tmp_path: Path, name: str, of_tokenizer: bool) -> None:
    model = fake_model(tmp_path / "m")
    (model / name).write_text("{}")
    before = weights_digest(model), tokenizer_digest(model)
    (model / name).write_text("[]")
    after = weights_digest(model), tokenizer_digest(model)
    assert (before[0] == after[0], before[1] == after[1]) == (of_tokenizer, not of_tokenizer)


def test_unused_files_are_in_no_digest(tmp_path: Path) -> None:
    model = fake_model(tmp_path / "m")
    before = weights_digest(model), tokenizer_digest(model)
    (model / "README.md").write_text("x")
    (model / "optimizer.pt").write_bytes(b"x")
    fake_model(model / "checkpoint-5")
    assert (weights_digest(model), tokenizer_digest(model)) == before


def test_gguf_file_is_in_both_digests(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"one")
    before = weights_digest(file), tokenizer_digest(file)
    assert weights_digest(file.rename(tmp_path / "b.gguf")) == before[0]
    (tmp_path / "b.gguf").write_bytes(b"two")
    assert weights_digest(tmp_path / "b.gguf") != before[0]
    assert tokenizer_digest(tmp_path / "b.gguf") != before[1]


def safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, start = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": [tensor.size], "data_offsets": [start, start + tensor.nbytes]}
        start += tensor.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t.tobytes() for t in tensors.values()))


def test_blocks_of_every_tensor_of_large_files_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HASHED_WHOLE_BYTES", 1000)
    model = fake_model(tmp_path / "m")
    tensors = {f"layer{i}": np.arange(50_000, dtype=np.float32) + i for i in range(5)}
    safetensors(model / "model.safetensors", tensors)
    digests = {weights_digest(model)}
    for name in tensors:
        changed = {**tensors, name: tensors[name] * 1.01}
        safetensors(model / "model.safetensors", changed)
        digests.add(weights_digest(model))
    safetensors(model / "model.safetensors", {**tensors, "layer9": tensors.pop("layer4")})
    digests.add(weights_digest(model))
    assert len(digests) == 7


def test_blocks_of_other_large_files_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HASHED_WHOLE_BYTES", 1000)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 100)
    file = tmp_path / "a.gguf"
    file.write_bytes(bytes(10_000))
    before = weights_digest(file)
    for at in (0, 9_999):
        content = bytearray(10_000)
        content[at] = 1
        file.write_bytes(bytes(content))
        assert weights_digest(file) != before


def test_differences_are_described_with_short_values() -> None:
    old = Fingerprint({"seed": 0, "data.content": "a" * 64, "gone": 1})
    new = Fingerprint({"seed": 1, "data.content": "b" * 64})
    assert differences(old, new) == ["data.content", "gone", "seed"]
    text = describe(old, new)
    assert "seed was 0 and is 1" in text
    assert "gone was 1 and is null" in text
    assert "a" * 20 not in text


def test_a_resume_keeps_the_dates_and_takes_the_tokens_until_they_are_known() -> None:
    begun = Fingerprint({"seed": 0}).dated({"%d": "01"}).encoded("a")
    resumed = Fingerprint({"seed": 0}).dated({"%d": "02"})
    assert not differences(begun, resumed.resuming(begun))
    assert not differences(begun, resumed.encoded("a").resuming(begun))
    assert differences(begun, resumed.encoded("b").resuming(begun)) == ["data.prompt_tokens"]
    assert "data.prompt_tokens" not in resumed.resuming(Fingerprint({"seed": 0})).values


def test_a_reward_of_another_source_differs(tmp_path: Path) -> None:
    config = config_of(tmp_path, "reward._target_=package.score")
    made = [
        fingerprint_of(config, "c", tmp_path / "model", reward_source={"source.package": digest, "package.numpy": "2"})
        for digest in ("a", "b")
    ]
    assert differences(*made) == ["reward.source.package"]


def test_the_version_of_the_draws_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = made(tmp_path)
    monkeypatch.setattr(fingerprint_module, "SAMPLER_VERSION", 0)
    assert differences(before, made(tmp_path)) == ["sampling.version"]


def test_of_a_reward_the_arguments_that_differ_are_described() -> None:
    old = Fingerprint({"reward": {"_target_": "a.b", "scale": 1, "gone": 2}})
    new = Fingerprint({"reward": {"_target_": "a.b", "scale": 3}})
    assert describe(old, new) == "reward.gone was 2 and is null; reward.scale was 1 and is 3"
    assert describe(old, Fingerprint({"reward": None})).startswith('reward was {"_target_"')


def test_fingerprint_survives_json() -> None:
    fingerprint = Fingerprint({"x": (1, 2), "y": 0.1})
    again = Fingerprint(json.loads(json.dumps(fingerprint.values)))
    assert (again.values, again.digest) == (fingerprint.values, fingerprint.digest)


def digest_of_earlier_keys(fingerprint: Fingerprint) -> str:
    """Return the digest of the keys that fingerprints have always had."""
    return Fingerprint({key: value for key, value in fingerprint.values.items() if key != "sampling.version"}).digest


def test_fingerprint_of_a_fixed_job_never_changes(tmp_path: Path) -> None:
    """A version that computes another digest refuses to resume every run begun before it."""
    model = fake_model(tmp_path / "model")
    (model / "tokenizer.json").write_text('{"a": 1}')
    (model / "model.safetensors").write_bytes(b"weights")
    rows = [{"prompt": "one", "answer": "1"}, {"prompt": "two", "answer": "2"}, {"prompt": "one", "answer": None}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(
        tmp_path,
        f"data.path={tmp_path / 'rows.jsonl'}",
        "data.as_chat=true",
        "data.system_prompt=Be brief",
        "sampling.n=2",
        "sampling.stop=[x]",
        "reward._target_=rollout.arithmetic.exact_match",
        "seed=7",
    )
    prompts = read_prompts(config.data, with_columns=True)
    assert prompts.row_ids[:] == ["d9247e0b94c662d6-0", "8b8a8df4ba54703d-0", "d9247e0b94c662d6-1"]
    assert prompts.content == "1a3c3fcc25008e314c040cf82b82406ef7ca4ef8cf47150532473a99081d0702"
    fingerprint = fingerprint_of(config, prompts.content, model)
    assert fingerprint.values["model.weights"] == "ea20527061cb224d352d32df61f713453d71e09e4387f70837669618a50e6669"
    assert fingerprint.values["model.tokenizer"] == "facdb120c16a18592b9a7ee5cac5c60fbc5eb32b15b1d767762544b7e2452158"
    assert digest_of_earlier_keys(fingerprint) == "2b38e94ee0083e2cf957b5f3ac3a8c5797ec8b7604853040fe9e1c094b72ffa4"


def test_fingerprint_of_the_default_job_never_changes(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    prompts = read_prompts(config.data)
    assert prompts.content == "ad8cdd7c19c167e4a80e8867fc7e8345a38ee969a522c4c7a13a0d4f78f8f2d0"
    (tmp_path / "model" / "tokenizer.json").write_text('{"a": 1}')
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    fingerprint = fingerprint_of(config, prompts.content, tmp_path / "model")
    assert digest_of_earlier_keys(fingerprint) == "463088cc459d4108a07650b1f77366e1c23a134084efcc8f34ea89bb868b8b6e"
