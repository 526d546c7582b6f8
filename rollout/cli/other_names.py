"""Names that other tools (vLLM, transformers, TRL, …) have for keys of this one, and for what it does not offer."""

from __future__ import annotations

from collections.abc import Collection

from rollout.cli.quoting import suggest
from rollout.config.key_comments import Key

#: Key here: what others call it.
_SAME: dict[str, str] = {
    "sampling.max_new_tokens": "max_tokens max_length max_completion_tokens max_completion_length max_output_tokens "
    "max_response_length response_length max_gen_toks max_gen_tokens max_generation_length generation_length",
    "sampling.min_new_tokens": "min_tokens min_length min_completion_tokens",
    "sampling.n": "num_generations num_return_sequences num_completions num_responses n_samples num_samples_per_prompt "
    "samples_per_prompt n_samples_per_prompt num_outputs rollout_n group_size",
    "sampling.stop": "stop_strings stop_sequences stop_words stop_str stop_string until",
    "sampling.stop_token_ids": "eos_token_id eos_token_ids stop_ids terminators",
    "sampling.bad_words": "bad_words_ids",
    "sampling.presence_penalty": "presence_penality",
    "sampling.defaults": "generation_config",
    "data.as_chat": "apply_chat_template use_chat_template is_chat chat_mode",
    "data.chat_template_kwargs": "enable_thinking chat_kwargs template_kwargs reasoning_effort",
    "data.limit": "num_prompts max_samples max_examples num_examples num_samples num_rows",
    "data.name": "subset dataset_config dataset_config_name",
    "data.path": "dataset dataset_name dataset_path data_path data_files data_file input inputs input_file input_path "
    "prompts prompts_file prompt_file train_files",
    "data.prompt_column": "prompt_key prompt_field column input_column text_column input_key messages_key "
    "messages_column messages_field dataset_text_field text_field",
    "data.id_column": "id_field id_key uid",
    "data.split": "dataset_split train_split",
    "data.system_prompt": "system system_message system_instruction",
    "model.path": "model_name model_name_or_path model_id model_path pretrained pretrained_model_name_or_path "
    "checkpoint checkpoint_path hf_model",
    "model.dtype": "torch_dtype precision bf16 fp16 model_dtype",
    "model.attention": "attn_implementation attn_impl attention_backend flash_attention use_flash_attention_2",
    "model.adapter": "lora lora_path lora_modules adapter_path adapter_name_or_path peft peft_path enable_lora",
    "model.tensor_parallel": "tensor_parallel_size tp tp_size tensor_model_parallel_size",
    "model.device_map": "pipeline_parallel_size pp pp_size",
    "model.revision": "model_revision tokenizer_revision code_revision",
    "output.dir": "output output_dir output_path output_file out outdir save_dir save_path results_dir log_dir "
    "local_dir default_local_dir work_dir",
    "output.format": "output_format save_format file_format",
    "output.rows_per_shard": "shard_size rows_per_file",
    "output.logprobs": "logprobs return_logprobs output_logprobs output_scores",
    "reward._target_": "reward_fn reward_func reward_funcs reward_function reward_model custom_reward_function",
    "seed": "random_seed manual_seed set_seed rng_seed",
    "tracker": "report_to log_with logger wandb use_wandb wandb_project",
    "job.deadline": "time_limit timeout max_time",
    "memory.max_kv_bytes": "kv_cache_memory_bytes kv_cache_free_gpu_mem_fraction",
}
_CAP = "the number of live samples follows memory and latency, and batcher.max_rows caps it"
_RANKS = "start one process per GPU instead, e.g. accelerate launch --num_processes 4 -m rollout"
#: What to say: names that have no key here.
_NO_KEY: dict[str, str] = {
    f"no batch size needs to be set, because {_CAP}": "batch_size bs bsz micro_batch_size per_device_eval_batch_size "
    "per_device_train_batch_size per_device_batch_size eval_batch_size gen_batch_size max_batch_size max_num_seqs "
    "max_num_sequences max_concurrency concurrency max_num_batched_tokens max_batch_tokens",
    "memory.reserve_fraction is the share of the memory that stays free": "gpu_memory_utilization mem_fraction_static "
    "gpu_memory_fraction",
    "the model's own context is the limit, and no prompt is truncated": "max_model_len max_seq_len max_seq_length "
    "max_sequence_length max_context_len context_length model_max_length max_prompt_length max_input_length "
    "truncation truncate_prompt_tokens max_source_length",
    "sampling.temperature=0 is greedy, and any other temperature samples": "do_sample greedy greedy_decoding "
    "sampling_method decoding_method",
    _RANKS: "num_gpus n_gpus gpus num_workers num_processes nproc_per_node data_parallel_size dp dp_size "
    "num_nodes nnodes world_size",
    "the tokenizer is the model's": "tokenizer tokenizer_path tokenizer_name tokenizer_mode",
    "a run whose output.dir exists is resumed": "resume resume_from_checkpoint overwrite overwrite_output_dir",
    "beam search is not offered": "num_beams beam_width beam_size use_beam_search num_beam_groups diversity_penalty "
    "length_penalty early_stopping",
    "the text ends before the stop string, and completion_ids have all of it": "include_stop_str_in_output",
    "every sample is kept, so it is not offered (see sampling.n)": "best_of",
    "guided decoding is not offered": "guided_json guided_regex guided_choice guided_grammar guided_decoding "
    "structured_outputs response_format json_schema grammar",
    "quantizing at load is not offered": "load_in_8bit load_in_4bit quantization bits quantize kv_cache_dtype",
    "it is not offered": "typical_p epsilon_cutoff eta_cutoff top_n_sigma mirostat tfs_z penalty_alpha xtc_probability "
    "no_repeat_ngram_size encoder_repetition_penalty prompt_logprobs top_logprobs swap_space cpu_offload_gb "
    "block_size enforce_eager speculative_config speculative_model num_speculative_tokens prefix_caching "
    "enable_prefix_caching enable_chunked_prefill shuffle use_cache host port api_key",
}
#: Values whose meaning differs: none of them can be carried over to the key here.
_OTHER_VALUES = {"model.tensor_parallel", "model.device_map", "data.chat_template_kwargs", "output.rows_per_shard"}
_OTHER_VALUES |= {"model.dtype", "model.attention", "output.logprobs", "sampling.defaults", "tracker", "job.deadline"}

MAIN_KEYS = {"model": "model.path", "data": "data.path", "output": "output.dir", "reward": "reward._target_"}
"""The key that names what a group is about, for `model=Qwen/Qwen2.5-0.5B` and the like."""
#: Names that such a key has elsewhere.
_OF_GROUP = ("name", "id", "path", "file", "files", "folder", "directory", "dir", "fn", "func", "function", "target")

_KEYS = {name: key for key, names in _SAME.items() for name in names.split()}
_SAID = {name: said for said, names in _NO_KEY.items() for name in names.split()}


def key_of(name: str, known: Collection[str]) -> str | None:
    """Return the key here that another tool calls ``name``, if there is one."""
    key = _KEYS.get(_bare(name))
    return key if key is not None and key in known else None


def explain_other_name(name: str, text: str | None, keys: dict[str, Key]) -> str | None:
    """Return the sentence for a key that other tools have; None if the name is not known from any."""
    bare, group = _bare(name), name.partition(".")[0]
    if bare in _OF_GROUP and group in MAIN_KEYS and text:
        return f"There is no key {name}; here it is {MAIN_KEYS[group]}: write {suggest(MAIN_KEYS[group], text)}."
    if bare in _SAID:
        return f"There is no key {name}: {_SAID[bare]}."
    if bare not in _KEYS:
        return None
    key = _KEYS[bare]
    if key not in keys:
        return f"There is no key {name}: it is not offered."
    if not text or key in _OTHER_VALUES:
        return f"There is no key {name}; here it is {key} ({keys[key].meaning})."
    return f"There is no key {name}; here it is {key}: write {suggest(key, text, keys[key].type)}."


def _bare(name: str) -> str:
    """Return the last part of a key in the spelling of the tables."""
    return name.rsplit(".", 1)[-1].strip("-_").lower().replace("-", "_")
