"""Load models and tokenizers; refuse unusable ones in one sentence."""

from __future__ import annotations

import json
import logging
from importlib import util
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaForCausalLM

from rollout.models.errors import UnsupportedModel
from rollout.models.loading import checkpoint, load
from rollout.models.loading.load import (
    ModelSource,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    resolve_path,
)
from tests.support.saved_models import CPU, refused, tiny_config

CUDA = torch.device("cuda", 0)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


class TestModel:
    def test_folder_is_loaded_in_eval_mode(self, saved: Path) -> None:
        model = load_model(ModelSource(str(saved), dtype="bfloat16"), CPU)
        assert isinstance(model, LlamaForCausalLM)
        assert not model.training
        weights = load_file(saved / "model.safetensors")
        assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])

    @pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
    def test_named_dtype_is_used(self, saved: Path, name: str) -> None:
        model = load_model(ModelSource(str(saved), dtype=name), CPU)
        assert {p.dtype for p in model.parameters()} == {getattr(torch, name)}

    def test_sharded_weights_are_loaded_and_a_missing_shard_refused(self, tmp_path: Path) -> None:
        LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path, max_shard_size="10KB")
        assert not (tmp_path / "model.safetensors").exists()
        load_model(ModelSource(str(tmp_path)), CPU)
        next(tmp_path.glob("model-00002*.safetensors")).unlink()
        assert "lacks model-00002" in refused(ModelSource(str(tmp_path)))

    def test_pickled_weights_are_refused_unread(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
        assert "pickles only (pytorch_model.bin)" in refused(ModelSource(str(folder)))

    @pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin"])
    def test_config_that_names_a_pickle_is_refused(self, folder: Path, name: str) -> None:
        torch.save({}, folder / name)
        edit_config(folder, transformers_weights=name)
        assert "pickles only" in refused(ModelSource(str(folder)))

    def test_index_that_names_a_pickle_is_refused(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / "weights.bin")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "weights.bin"}}))
        assert "pickles only (weights.bin)" in refused(ModelSource(str(folder)))

    def test_missing_weights_are_refused_not_initialised(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        assert "lacks 1 weights of LlamaForCausalLM (lm_head.weight)" in refused(ModelSource(str(folder)))

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
    def test_truncated_weights_are_refused(self, folder: Path, share: float) -> None:
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: int(len(whole) * share)])
        assert "model.safetensors that is broken or incomplete" in refused(ModelSource(str(folder)))

    def test_truncated_shard_is_named(self, tmp_path: Path) -> None:
        LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path, max_shard_size="10KB")
        shard = next(tmp_path.glob("model-00002*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-1])
        assert f"has a {shard.name} that is broken" in refused(ModelSource(str(tmp_path)))

    def test_stand_in_of_git_lfs_is_refused(self, folder: Path) -> None:
        (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        assert "run `git lfs pull`" in refused(ModelSource(str(folder)))

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("weights.onnx", "no weights as safetensors"),
            ("weights.gguf", "as GGUF (weights.gguf)"),
            ("consolidated.safetensors", "has consolidated.safetensors, but neither"),
        ],
    )
    def test_folder_with_other_weights_is_refused(self, folder: Path, name: str, reason: str) -> None:
        (folder / "model.safetensors").rename(folder / name)
        assert reason in refused(ModelSource(str(folder)))

    def test_weights_of_another_size_are_named(self, folder: Path) -> None:
        edit_config(folder, vocab_size=80)
        message = refused(ModelSource(str(folder)))
        assert "has 2 weights of another size" in message
        assert "lm_head.weight: [64, 32] instead of [80, 32]" in message

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"quantization_config": {"quant_method": "modelopt"}}, "quantized by 'modelopt'"),
            ({"quantization": {"bits": 4, "group_size": 64}}, "quantized for MLX"),
        ],
    )
    def test_unknown_quantization_is_refused(self, folder: Path, changes: dict[str, object], reason: str) -> None:
        edit_config(folder, **changes)
        assert reason in refused(ModelSource(str(folder)), UnsupportedModel)

    @pytest.mark.parametrize("method", ["bitsandbytes", None])
    def test_missing_package_of_a_known_quantization_is_named(self, folder: Path, method: str | None) -> None:
        if util.find_spec("bitsandbytes") is not None:
            pytest.skip("bitsandbytes is installed")
        named = {} if method is None else {"quant_method": method}
        edit_config(folder, quantization_config={"load_in_8bit": True, **named})
        assert "bitsandbytes" in refused(ModelSource(str(folder)))

    def test_scales_that_are_not_read_are_refused(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(1)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        assert "whose scales transformers does not read" in refused(ModelSource(str(folder)), UnsupportedModel)

    def test_unknown_architecture_is_refused(self, folder: Path) -> None:
        edit_config(folder, model_type="nonesuch")
        assert "'nonesuch'" in refused(ModelSource(str(folder)), UnsupportedModel)

    def test_code_in_a_checkpoint_needs_trust_remote_code(self, folder: Path) -> None:
        edit_config(folder, model_type="nonesuch", auto_map={"AutoConfig": "code.Config"})
        (folder / "code.py").write_text("raise SystemExit('this must not run')")
        assert "set trust_remote_code=true" in refused(ModelSource(str(folder)), UnsupportedModel)

    def test_non_causal_model_type_is_refused(self, folder: Path) -> None:
        edit_config(folder, model_type="t5")
        assert "no causal language model" in refused(ModelSource(str(folder)), UnsupportedModel)

    def test_encoder_with_a_causal_class_is_refused(self, folder: Path) -> None:
        BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(folder)
        assert "saved as BertForMaskedLM" in refused(ModelSource(str(folder)), UnsupportedModel)

    def test_invalid_config_json_is_refused(self, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        assert "not valid JSON" in refused(ModelSource(str(folder)))

    @pytest.mark.parametrize("text", ["{", "[]"])
    def test_broken_generation_config_is_refused(self, folder: Path, text: str) -> None:
        (folder / "generation_config.json").write_text(text)
        assert "has a generation_config.json that" in refused(ModelSource(str(folder)))

    def test_invalid_field_is_named(self, folder: Path) -> None:
        edit_config(folder, hidden_size="many")
        assert "config.json that is not valid" in (message := refused(ModelSource(str(folder))))
        assert "'hidden_size' expected int" in message

    def test_config_without_model_type_is_refused(self, folder: Path) -> None:
        edit_config(folder, model_type=None)
        assert "without a model_type" in refused(ModelSource(str(folder)), UnsupportedModel)

    def test_folder_without_config_is_refused(self, tmp_path: Path) -> None:
        assert "no config.json" in refused(ModelSource(str(tmp_path)))

    def test_folder_of_checkpoints_names_the_last(self, folder: Path, tmp_path: Path) -> None:
        folder.rename(tmp_path / "checkpoint-10")
        assert "give its folder 'checkpoint-10'" in refused(ModelSource(str(tmp_path)))

    def test_diffusion_pipeline_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "model_index.json").write_text("{}")
        assert "is a diffusion pipeline" in refused(ModelSource(str(tmp_path)))

    def test_file_that_is_no_gguf_is_refused(self, folder: Path) -> None:
        assert "no GGUF file" in refused(ModelSource(str(folder / "config.json")))

    def test_broken_gguf_file_is_refused(self, tmp_path: Path) -> None:
        pytest.importorskip("gguf")
        (tmp_path / "model.gguf").write_bytes(b"GGUF and nothing more")
        assert "cannot be loaded as GGUF" in refused(ModelSource(str(tmp_path / "model.gguf")))


class TestTokenizer:
    def test_tokenizer_is_loaded_from_the_model_folder(self, saved: Path) -> None:
        assert load_tokenizer(ModelSource(str(saved)))("two three").input_ids == [2, 3]

    def test_folder_without_tokenizer_is_refused(self, folder: Path) -> None:
        for file in folder.glob("tokenizer*"):
            file.unlink()
        with pytest.raises(ValueError, match="has no tokenizer that can be loaded") as caught:
            load_tokenizer(ModelSource(str(folder)))
        assert "\n" not in str(caught.value)


class TestPath:
    @pytest.mark.parametrize("path", ["/no/such/folder", "./none", "", "a/b/c", "~/none", "no/such.gguf"])
    def test_missing_path_is_refused(self, path: str) -> None:
        with pytest.raises(ValueError, match="does not exist"):
            resolve_path(path)

    def test_folder_resolves_to_itself(self, saved: Path) -> None:
        assert resolve_path(str(saved)) == str(saved)

    def test_revision_of_a_folder_is_refused(self, saved: Path) -> None:
        with pytest.raises(ValueError, match=r"^revision is 'main'"):
            resolve_path(str(saved), "main")

    def test_hub_id_without_network_is_refused_in_one_sentence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="is no folder or file here, not in the Hub's cache") as caught:
            load_tokenizer(ModelSource("nobody/nothing-of-that-name"))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("error", "sentence"),
        [
            (GatedRepoError, "accept its terms"),
            (RepositoryNotFoundError, "nor a model that the Hub shows"),
            (RevisionNotFoundError, r"^revision 'v9' does not exist"),
        ],
    )
    def test_errors_of_the_hub_become_one_sentence(
        self, monkeypatch: pytest.MonkeyPatch, error: type[HfHubHTTPError], sentence: str
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise error("Several\nlines.", response=Mock())

        monkeypatch.setattr(checkpoint, "snapshot_download", refuse)
        with pytest.raises(ValueError, match=sentence):
            resolve_path("some/model", "v9")


class TestDevice:
    def test_auto_is_the_cpu_without_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert resolve_device() == CPU

    @pytest.mark.parametrize("name", ["auto", "cuda"])
    def test_a_process_takes_the_device_of_its_local_rank(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert resolve_device(name) == torch.device("cuda", 1)
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(ValueError, match="2 CUDA devices"):
            resolve_device(name)

    @pytest.mark.parametrize(("visible", "device"), [(4, 3), (1, 0)])
    def test_a_task_of_slurm_takes_one_of_the_devices_that_it_sees(
        self, monkeypatch: pytest.MonkeyPatch, visible: int, device: int
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        monkeypatch.setenv("SLURM_LOCALID", "3")
        assert resolve_device() == torch.device("cuda", 0), "a batch script's shell is no task"
        monkeypatch.setenv("SLURM_STEP_ID", "0")
        assert resolve_device() == torch.device("cuda", device)

    def test_missing_device_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="0 CUDA devices"):
            resolve_device("cuda:0")

    def test_invalid_device_name_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"^device is 'gpu please'"):
            resolve_device("gpu please")


class TestDtype:
    @pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("native", [True, False])
    def test_auto_dtype_on_a_cpu_follows_its_instructions(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stored: torch.dtype, native: bool
    ) -> None:
        monkeypatch.setattr(load, "cpu_multiplies", lambda dtype: native)
        with caplog.at_level(logging.INFO):
            assert resolve_dtype("auto", CPU, stored) == (stored if native else torch.float32)
        assert ("dtype=auto selects float32" in caplog.text) is not native

    def test_auto_dtype_is_resolved_on_this_cpu(self) -> None:
        assert resolve_dtype("auto", CPU, torch.bfloat16) in (torch.bfloat16, torch.float32)
        assert resolve_dtype("auto", CPU, torch.float16) in (torch.float16, torch.float32)

    def test_auto_dtype_on_an_accelerator_is_the_stored_one(self) -> None:
        assert resolve_dtype("auto", CUDA, torch.float16) is None

    def test_unknown_stored_dtype_becomes_float32_on_a_cpu(self) -> None:
        assert resolve_dtype("auto", CPU, None) == torch.float32

    def test_unknown_dtype_name_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"^dtype is 'bf16'"):
            resolve_dtype("bf16", CPU, None)
