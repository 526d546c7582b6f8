"""Tabulate which model families are served, by which strategy, and whether they give the model's own numbers.

    python -m jobs.bench.families_table [--write] [--seconds 240] [FAMILY ...]

runs from the repository's root over every family that transformers can load as a causal language model or as one that
also reads images or sound, which is served for text here, or over those named on the command line. For each it makes a
tiny random model and generates greedily with rows that join late and, unless the family keeps recurrent states, are
preempted. In float32 completions must equal ``generate`` and log-probabilities a plain forward; in bfloat16 the mean
distance is reported. ``--write`` puts the tables into ``docs/families.md``.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import resource
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging

from rollout import Engine, SamplingParams
from rollout.models.errors import UnsupportedModel
from rollout.models.runners.recurrent import RecurrentStrategy
from rollout.models.runners.select import select_strategy
from tests.support import tiny_models
from tests.support.parity import greedy, random_prompts, teacher_forced, tight_engine
from tests.support.tiny_models import SERVED, VOCABULARY

_PAGE = Path(__file__).parents[2] / "docs" / "families.md"
_MARKERS = ("<!-- written by jobs.bench.families_table -->", "<!-- end -->")
_NEW_TOKENS = 24
_PAGES = 9
_MOST_PROMPT_TOKENS = 48
#: Largest distance of log-probabilities in float32 that is rounding.
_TOLERANCE = 1e-5
#: In a recurrence, where a plain forward computes in chunks what generation computes step by step.
_STATE_TOLERANCE = 3e-4
#: Where that is passed: sums in another order may be so many times as far from the module's own forward as that one is
#: from the same in float64. Large logits have large roundings.
_ROUNDINGS = 4
_MOST_PARAMETERS = 50_000_000
_MOST_BYTES = 12 << 30

_WINDOW = 12
#: Tiny values of the fields that families share; each gets those that its configuration has.
_FIELDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "is_decoder": True,
    # width and depth
    **dict.fromkeys(("hidden_size", "embedding_size", "embedding_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "decoder_layers", "num_decoder_layers", "num_blocks"), 4),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "decoder_attention_heads", "encoder_attention_heads", "n_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "attention_head_size", "d_head", "dim_head"), 16),
    "swa_num_attention_heads": 4,
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "n_inner", "dff"), 96),
    **dict.fromkeys(("ffn_hidden_size", "expert_ffn_hidden_size", "dim_ff", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("dense_intermediate_size", "shared_intermediate_size", "prefix_dense_intermediate_size"), 96),
    "feed_forward_size": 96,
    "rotary_dim": 8,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "query_pre_attn_scalar": 16,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers", "zero_expert_num"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 48),
    "router_hidden_size": 16,
    # latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    # windows
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_chunk_size"), _WINDOW),
    **dict.fromkeys(("attention_window_size", "local_attention", "keep_window_size"), _WINDOW),
    "use_sliding_window": True,
    "max_window_layers": 2,
    # recurrences
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    "attention_hidden_size": 64,
    "lru_width": 64,
}
#: Fields of the parts of a composite model that read images or sound.
_SENSES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "output_dim", "vision_output_dim", "projector_input_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_global_layers", "depth", "encoder_layers", "conf_num_hidden_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "attention_heads", "num_heads", "conf_num_attention_heads"), 2),
    "out_hidden_size": 64,
    "vocab_size": 8,
}
#: Model classes of each family; one that also reads images or sound may have two, for text alone and for both.
_MULTIMODAL = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
_WITH_SENSES = {
    f"{family}/multimodal" if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else family: name
    for family, name in _MULTIMODAL.items()
    if name != MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family)
}
FAMILIES: dict[str, Any] = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | _WITH_SENSES
_OWN = object()
"""The family's own value of a field."""
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SECTIONED = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text", "cosmos3_edge_text")
#: Extra configuration of single families.
_FIXES: dict[str, dict[str, Any]] = {
    # Latent attention: heads are rotated over what is called head_dim, and keys are not shared.
    **{
        family: {"head_dim": 8, "num_key_value_heads": 4}
        for family in ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu")
    },
    "dbrx": {
        "d_model": 64,
        "max_seq_len": 256,
        "n_layers": 4,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    # Wide heads whose scores are not scaled down: generate's own rounding is above what is told apart here.
    **{family: {"head_dim": 16, "global_head_dim": 16} for family in ("gemma4_text", "gemma4_unified_text")},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "prophetnet": {"num_hidden_layers": _OWN},
    "xlnet": {"max_position_embeddings": _OWN},
    "xlstm": {"v_head_dim": _OWN},
    "reformer": {"axial_pos_embds": False},
    # Rotary embeddings of several axes: sections of half a head, or of the half that is rotated.
    **{family: {"rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}} for family in _SECTIONED},
    **{
        family: {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}}
        for family in ("glm4v_text", "glm4v_moe_text", "glm_ocr_text")
    },
    "hunyuan_vl_text": {"rope_parameters": _ROPE | {"mrope_section": [2, 2, 2, 2]}},
    # Fields that its attention ignores and generate's cache does not.
    "qwen3_vl_moe_text": {"sliding_window": _OWN, "use_sliding_window": _OWN},
}


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one family."""

    family: str
    state: Literal["right", "wrong", "refused", "generate fails", "not built"]
    strategy: str = ""
    equal: int = 0
    rows: int = 0
    gap: float = 0.0
    """Largest distance of a log-probability in float32."""
    half_gap: float | None = None
    """Mean distance in bfloat16; None where the family does not run in it."""
    reason: str = ""


def tiny_config(family: str) -> PreTrainedConfig:
    """A configuration of ``family`` in which every size is small and every window shorter than the test's texts."""
    if family in SERVED:
        return tiny_models.tiny_config(family)
    kind = CONFIG_MAPPING[family.removesuffix("/multimodal")]
    return kind(**_known(kind(), _FIELDS))


def _auto_class(family: str) -> Any:
    """Return the auto class that makes a model of ``family``."""
    if family not in _WITH_SENSES:
        return AutoModelForCausalLM
    name = family.removesuffix("/multimodal")
    return (
        AutoModelForImageTextToText if name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else AutoModelForMultimodalLM
    )


def _known(default: PreTrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the ``fields`` that a configuration has, with its family's own, recursively for its parts."""
    parts = {}
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            parts[name] = _known(part, _SENSES if name.startswith(("vision", "audio")) else _FIELDS)
            parts[name]["model_type"] = part.model_type
    some = {name: value for name, value in fields.items() if _has(default, name)}
    own = some | parts | _FIXES.get(default.model_type, {})
    return {name: value for name, value in own.items() if value is not _OWN}


def _has(default: PreTrainedConfig, name: str) -> bool:
    """Return whether a configuration has one value ``name``; some have one per layer and raise."""
    try:
        return hasattr(default, name)
    except Exception:  # noqa: BLE001
        return False


def tried(family: str) -> Result:
    """Make a tiny model of ``family`` and compare the engine's output with the model's."""
    random_model = partial(tiny_models.random_model, auto_class=_auto_class(family))
    try:
        config = tiny_config(family)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in random_model(config).parameters())
        if size > _MOST_PARAMETERS:
            return Result(family, "not built", reason=f"{size / 1e6:.0f} M parameters with the generic fields")
        model = random_model(config)
    except Exception as error:  # noqa: BLE001 - whatever a family's own code says
        return Result(family, "not built", reason=_in_short(error))
    try:
        strategy = select_strategy(model)
    except UnsupportedModel as refusal:
        return Result(family, "refused", reason=str(refusal))
    # The long prompt among them fits neither the tiny contexts nor the pages here.
    prompts = [prompt[:_MOST_PROMPT_TOKENS] for prompt in random_prompts(11, 7)]
    try:
        expected = [greedy(model, prompt, _NEW_TOKENS) for prompt in prompts]
    except Exception as error:  # noqa: BLE001
        return Result(family, "generate fails", strategy.name, reason=_in_short(error))
    try:
        records, gaps = _generated(model, prompts)
        equal = sum(record == own for record, own in zip(records, expected, strict=True))
    except Exception as error:  # noqa: BLE001
        return Result(family, "wrong", strategy.name, 0, len(prompts), reason=_in_short(error))
    try:
        half = float(_generated(random_model(config, torch.bfloat16), prompts)[1].mean())
    except Exception:  # noqa: BLE001
        half = None
    gap = float(gaps.max())
    if equal < len(prompts) and all(_is_greedy(model, *pair) for pair in zip(prompts, records, strict=True)):
        reason = "gives other tokens than plain forwards of the same module; the engine's tokens are the forwards'"
        return Result(family, "generate fails", strategy.name, equal, len(prompts), gap, half, reason)
    tolerance = _STATE_TOLERANCE if strategy.name == RecurrentStrategy.name else _TOLERANCE
    if gap > tolerance:
        tolerance = _ROUNDINGS * _own_rounding(model, prompts, records)
    state: Literal["right", "wrong"] = "right" if equal == len(prompts) and gap <= tolerance else "wrong"
    return Result(family, state, strategy.name, equal, len(prompts), gap, half)


def _generated(model: PreTrainedModel, prompts: Sequence[list[int]]) -> tuple[list[list[int]], torch.Tensor]:
    """Return completions, and the distance of each log-probability from a plain forward."""
    states = select_strategy(model).kv_layout().states
    engine = Engine(model, None, policy="static", max_rows=4) if states else tight_engine(model, _PAGES, max_rows=4)
    batch = engine.generate(prompts, SamplingParams(max_new_tokens=_NEW_TOKENS, temperature=0))
    failed = [record.error for record in batch if record.error]
    if failed:
        raise RuntimeError(failed[0])
    assert states or batch.stats.preempted_rows
    gaps = [(teacher_forced(model, record) - torch.tensor(record.logprobs)).abs() for record in batch]
    return [record.completion_ids for record in batch], torch.cat(gaps)


def _own_rounding(model: PreTrainedModel, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> float:
    """Return the distance of the module's float32 log-probabilities from those in float64."""
    exact, most = copy.deepcopy(model).double(), 0.0
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            single, double = (
                own(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
                for own in (model, exact)
            )
        drawn = ids[0, len(prompt) :, None]
        most = max(most, float((single.gather(1, drawn) - double.gather(1, drawn)).abs().max()))
    return most


def _is_greedy(model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int]) -> bool:
    """Return whether a plain forward finds each token of the completion the most probable."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
    return bool(logits[len(prompt) - 1 : -1].argmax(-1).tolist() == list(completion))


def _in_short(error: Exception) -> str:
    """Return the last line of a traceback-like message, else its first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines and "validat" in lines[0] else lines[0] if lines else ""
    return f"{type(error).__name__}: {text}"[:160]


def _child(family: str, answer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
    answer.send(tried(family))


def in_a_process(family: str, seconds: float) -> Result:
    """Run `tried` in a process of its own, with a limit of ``seconds``."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(family, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return Result(family, "not built", reason=f"took more than {seconds:.0f} s")
        result: Result = ours.recv()
        return result
    except EOFError:
        return Result(family, "not built", reason="the process died")
    finally:
        process.kill()
        process.join()


def table(results: Sequence[Result]) -> str:
    """Return the results in Markdown."""
    count = Counter(result.state for result in results)
    strategies = Counter(result.strategy for result in results if result.state == "right")
    lines = [
        f"Of {len(results)} families, {len(results) - count['not built']} could be built tiny. Right: "
        f"{count['right']} ("
        + ", ".join(f"{number} {strategy}" for strategy, number in strategies.items())
        + f"). Wrong: {count['wrong']}. Refused: {count['refused']}. "
        f"Served where `generate` itself is at fault: {count['generate fails']}.",
        "",
        "| family | strategy | rows equal | max Δ logprob, float32 | mean, bfloat16 |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        if result.state in ("right", "wrong"):
            half = "–" if result.half_gap is None else f"{result.half_gap:.0e}"
            equal = f"{result.equal}/{result.rows}" + ("" if result.state == "right" else f" **wrong** {result.reason}")
            lines.append(f"| {result.family} | {result.strategy} | {equal} | {result.gap:.0e} | {half} |")
    for state, title in (
        ("refused", "Refused at start"),
        ("generate fails", "Served, but the family's own `generate` fails or contradicts the module's forward"),
        ("not built", "Not tried: no tiny model could be made"),
    ):
        some = [result for result in results if result.state == state]
        if some:
            lines += ["", f"{title}:", "", "| family | reason |", "|---|---|"]
            lines += [f"| {result.family} | {result.reason.replace('|', '/')} |" for result in some]
    return "\n".join(lines)


def tables(results: Sequence[Result]) -> str:
    """Return one table of the families for text alone, and one of those that also read images or sound."""
    text = [result for result in results if result.family not in _WITH_SENSES]
    senses = [result for result in results if result.family in _WITH_SENSES]
    return f"## Text\n\n{table(text)}\n\n## Text, images and sound\n\n{table(senses)}"


def write(text: str) -> None:
    """Put ``text`` between the markers of the page."""
    page = _PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(_MARKERS[0])
    _, _, after = rest.partition(_MARKERS[1])
    _PAGE.write_text(f"{before}{_MARKERS[0]}\n\n{text}\n\n{_MARKERS[1]}{after}", encoding="utf-8")


def main(arguments: Iterable[str] | None = None) -> None:
    """Try families; print a line per family, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--seconds", type=float, default=240)
    options = parser.parse_args(None if arguments is None else list(arguments))
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    results = []
    for family in options.families:
        results.append(in_a_process(family, options.seconds))
        print(results[-1], flush=True)
    print(tables(results))
    if options.write:
        write(tables(results))


if __name__ == "__main__":
    main()
