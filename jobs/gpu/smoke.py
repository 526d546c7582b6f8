"""Check that tiny models run on the device and give the model's own numbers: dtypes, graphs, sampling, memory, caps.

    python -m jobs.gpu.smoke [FAMILY ...] [rest] [invariant] [calls]

``rest`` is what does not depend on the family, ``invariant`` is ``batch_invariant``, and ``calls`` is what later calls
reuse: sessions, kept prefixes, resumed records, scores. Without arguments all of it runs.
"""

from __future__ import annotations

import gc
import platform
import random
import sys
import time
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import transformers
import triton

from jobs.bench.lib.spies import Spies, watched
from jobs.gpu.common import CUDA, DEVICE, TINY, ended, guarded, say, start, synchronize
from rollout import Engine, FinishedPerPrompt, Record, SamplingParams

_BASE: dict[str, Any] = {
    "vocab_size": 1999,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: What each family's configuration has beside `_BASE`; "attn_implementation" is for loading.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 64},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "mistral": {"head_dim": 64, "sliding_window": 48},
    "gemma3_text": {"head_dim": 256, "sliding_window": 48, "query_pre_attn_scalar": 256},
    "gemma2": {"head_dim": 128, "sliding_window": 48, "query_pre_attn_scalar": 128, "attn_implementation": "eager"},
    "gpt_oss": {"head_dim": 64, "sliding_window": 48, "num_experts": 4, "num_local_experts": 4}
    | {"num_experts_per_tok": 2},
}
OTHERS = ("rest", "invariant", "calls")
_NEW_TOKENS = 24
_LENGTHS = (1, 7, 15, 16, 17, 60, 130, 300)
_draws = random.Random(3)
PROMPTS = [[_draws.randrange(3, 1900) for _ in range(length)] for length in _LENGTHS]


def tiny_model(family: str, dtype: torch.dtype) -> Any:
    """Draw a tiny model of a family, on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = _BASE | FAMILIES[family]
    implementation = fields.pop("attn_implementation", None)
    torch.manual_seed(1)
    extra = {"attn_implementation": implementation} if implementation else {}
    config = AutoConfig.for_model(family, **fields)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, **extra)
    return model.to(DEVICE).eval()


def completions(records: Any) -> list[list[int]]:
    """List the token ids of each record."""
    return [list(record.completion_ids) for record in records]


def same(ours: Any, others: Any) -> int:
    """Count the completions that are equal."""
    return sum(a == b for a, b in zip(completions(ours), completions(others), strict=True))


def own_numbers(model: Any, prompt: list[int], record: Record) -> tuple[list[int], float]:
    """Return the greedy tokens of ``generate``, and how far the record's log-probabilities are off a plain forward."""
    ids = torch.tensor([prompt], device=DEVICE)
    limits = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS}
    mask = torch.ones_like(ids)
    with torch.no_grad():
        generated = model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **limits)
        whole = torch.tensor([prompt + list(record.completion_ids)], device=DEVICE)
        logits = model(whole, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.float().log_softmax(-1).gather(1, whole[0, len(prompt) :, None])[:, 0].cpu()
    gap = float((logprobs - torch.tensor(record.logprobs)).abs().max())
    return generated[0, len(prompt) :].tolist(), gap


def parity(family: str, dtype: torch.dtype, spies: Spies) -> None:
    """Compare greedy tokens and log-probabilities with transformers', and a second call with the first."""
    model = tiny_model(family, dtype)
    params = SamplingParams(temperature=0.0, max_new_tokens=_NEW_TOKENS, ignore_eos=True)
    times = [time.perf_counter()]
    engine = Engine(model, None)
    times.append(time.perf_counter())
    spies.clear()
    batches = []
    for _ in range(2):
        batches.append(engine.generate(PROMPTS, params))
        times.append(time.perf_counter())
    made, first, second = (after - before for before, after in pairwise(times))
    found = [own_numbers(model, prompt, record) for prompt, record in zip(PROMPTS, batches[0], strict=True)]
    equal = sum(tokens == ours for (tokens, _), ours in zip(found, completions(batches[0]), strict=True))
    say(
        f"  {family:12s} {str(dtype)[6:]:9s} attention {engine.attention:8s} greedy == generate {equal}/{len(PROMPTS)}"
        f"  |dlogp| {max(gap for _, gap in found):.1e}  repeats {same(*batches) == len(PROMPTS)}"
        f"  engine {made:.1f} s, calls {first:.2f} and {second:.2f} s"
        f"  {spies if CUDA else ''}"
    )


def chosen_kernels() -> None:
    """Report which of the Triton kernels passed their own tests on this device."""
    from rollout.models.patches.pointwise_triton import triton_pointwise
    from rollout.models.sampling.sampler import _triton_kernel
    from rollout.models.sampling.top_p import _kernel_works

    served = {
        "sampling": _triton_kernel(DEVICE) is not None,
        "top-p": _kernel_works(DEVICE),
        "pointwise": triton_pointwise(DEVICE) is not None,
    }
    for name, found in served.items():
        say(f"  {name}: {'triton' if found else 'FALLBACK'}")
    synchronize()


def caps_and_filters(dtype: torch.dtype) -> None:
    """Compare samples at different caps on the live rows, and run every filter."""
    model = tiny_model("qwen2", dtype)
    prompts = PROMPTS[1:7] * 2
    params = SamplingParams(n=4, max_new_tokens=48, ignore_eos=True)
    base = Engine(model, None, max_rows=64).generate(prompts, params, seed=5)
    for cap in (7,) if TINY else (1, 7, 24):
        other = Engine(model, None, max_rows=cap).generate(prompts, params, seed=5)
        gaps = [
            abs(x - y)
            for a, b in zip(base, other, strict=True)
            if list(a.completion_ids) == list(b.completion_ids)
            for x, y in zip(a.logprobs, b.logprobs, strict=True)
        ]
        say(
            f"  {str(dtype)[6:]}: cap {cap} against 64: identical {same(base, other)}/{len(base)},"
            f" |dlogp| of those {max(gaps, default=0.0):.1e}"
        )
    filters: list[dict[str, Any]] = [{"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05}]
    filters.append({"temperature": 0.7, "top_p": 0.95, "top_k": 100})
    mixed = [SamplingParams(max_new_tokens=16, ignore_eos=True, **filter_) for filter_ in filters]
    records = Engine(model, None).generate(PROMPTS[:4], mixed)
    right = all(
        sampler >= model_own - 1e-4
        for record in records
        for sampler, model_own in zip(record.sampler_logprobs, record.logprobs, strict=True)
    )
    say(f"  {str(dtype)[6:]}: filters run; sampler_logprobs >= logprobs: {right}")


def invariant(dtype: torch.dtype) -> None:
    """Compare samples at different caps with ``batch_invariant``; all must be identical, log-probabilities too."""
    model = tiny_model("qwen2", dtype)
    prompts = PROMPTS[1:7] * 2
    params = [SamplingParams(n=2, temperature=0.7 * (i % 2), max_new_tokens=48, ignore_eos=True) for i in range(12)]
    base = Engine(model, None, max_rows=64, batch_invariant=True).generate(prompts, params, seed=5)
    for cap in (5,) if TINY else (1, 7, 24):
        other = Engine(model, None, max_rows=cap, batch_invariant=True).generate(prompts, params, seed=5)
        bits = sum(a.logprobs == b.logprobs for a, b in zip(base, other, strict=True))
        say(
            f"  {str(dtype)[6:]}: batch_invariant, cap {cap} against 64: identical {same(base, other)}/{len(base)},"
            f" log-probabilities {bits}/{len(base)}"
        )


def reuse(dtype: torch.dtype) -> None:
    """Compare what reuses memory or results with what computes anew."""
    model = tiny_model("qwen3", dtype)
    params = SamplingParams(n=2, max_new_tokens=40, ignore_eos=True)
    engine = Engine(model, None)
    wanted = engine.generate(PROMPTS, params, seed=2)

    scored = engine.score(wanted).logprobs
    gaps = (abs(x - y) for r, s in zip(wanted, scored, strict=True) for x, y in zip(r.logprobs, s or [], strict=True))
    say(f"  {str(dtype)[6:]}: scores of records: |dlogp| {max(gaps):.1e}")

    few = Engine(model, None, max_rows=3)  # so that samples do not end in the same step
    stopped = few.generate(PROMPTS, params, seed=2, stop_when=FinishedPerPrompt(1))
    resumed = engine.generate(resume=stopped, params=params, seed=2)
    say(f"  resumed {len(stopped.aborted)} aborted records: same {same(wanted, resumed)}/{len(wanted)}")

    longer = [record.prompt_ids + record.completion_ids + [7, 8, 9] for record in wanted]
    plain = engine.generate(longer, params, seed=3)
    with engine.session() as session:
        session.generate(PROMPTS, params, seed=2)
        turn = session.generate(longer, params, seed=3)
        held = session.kv_bytes_held
    say(f"  second turn in a session ({held >> 10} KiB held): same {same(plain, turn)}/{len(plain)}")

    keeping = Engine(model, None, keep_prefixes_bytes=1 << 28)
    for _ in range(2):
        again = keeping.generate(longer, params, seed=3)
    say(f"  second call with kept prefixes: same {same(plain, again)}/{len(plain)}")


def little_memory() -> None:
    """Compare samples under many preemptions with those of an engine that has room."""
    model = tiny_model("llama", torch.float32)
    engine = Engine(model, None)
    page_bytes = engine._module.strategy.kv_layout().bytes_per_page
    params = SamplingParams(n=3, max_new_tokens=64, ignore_eos=True)
    wanted = engine.generate(PROMPTS[:6], params, seed=1)
    small = Engine(model, None, policy="static", max_kv_bytes=40 * page_bytes)
    found = small.generate(PROMPTS[:6], params, seed=1)
    say(f"  preempted {found.stats.preempted_rows}, same {same(wanted, found)}/{len(wanted)}")


def memory_given_back() -> None:
    """Report what memory is held after each of four calls."""
    model = tiny_model("qwen2", torch.bfloat16)
    engine = Engine(model, None)
    held = []
    for _ in range(4):
        engine.generate(PROMPTS, SamplingParams(n=8, max_new_tokens=64, ignore_eos=True))
        gc.collect()
        torch.cuda.empty_cache()
        synchronize()
        free, total = torch.cuda.mem_get_info()
        held.append((torch.cuda.memory_allocated() >> 10, torch.cuda.memory_reserved() >> 20, (total - free) >> 20))
    say("  after each call: KiB allocated, MiB reserved, MiB of the driver:", held)


def main() -> None:
    """Run the checks that were asked for."""
    where = f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_capability()}" if CUDA else "CPU"
    versions = (torch.__version__, transformers.__version__, triton.__version__, platform.python_version())
    start("torch, transformers, triton, Python", *versions, where)
    asked = sys.argv[1:] or [*(["qwen2"] if TINY else FAMILIES), *OTHERS]
    both = (torch.float32, torch.bfloat16)
    if CUDA and "rest" in asked:
        guarded("kernels that were chosen", chosen_kernels)
    with watched() as spies:
        for family in (name for name in asked if name not in OTHERS):
            for dtype in (*both, torch.float16) if family == "qwen2" and not TINY else both:
                guarded(f"{family} {dtype}", partial(parity, family, dtype, spies))
    for dtype in both:
        if "rest" in asked:
            guarded(f"caps, seeds, filters {dtype}", partial(caps_and_filters, dtype))
        if "invariant" in asked:
            guarded(f"batch_invariant {dtype}", partial(invariant, dtype))
        if "calls" in asked:
            guarded(f"sessions, prefixes, resumed, scores {dtype}", partial(reuse, dtype))
    if "rest" in asked:
        guarded("little memory, many preemptions", little_memory)
        if CUDA:
            guarded("memory given back", memory_given_back)
    ended()


if __name__ == "__main__":
    main()
