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
from typing import Literal

import torch
from transformers import (
    PreTrainedModel,
)
from transformers.utils import logging

from jobs.bench.lib.family_configs import FAMILIES, WITH_SENSES, auto_class, tiny_config
from rollout import Engine, SamplingParams
from rollout.models.errors import UnsupportedModel
from rollout.models.runners.recurrent import RecurrentStrategy
from rollout.models.runners.select import select_strategy
from tests.support import tiny_models
from tests.support.parity import greedy, random_prompts, teacher_forced, tight_engine

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


def tried(family: str) -> Result:
    """Make a tiny model of ``family`` and compare the engine's output with the model's."""
    random_model = partial(tiny_models.random_model, auto_class=auto_class(family))
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
    text = [result for result in results if result.family not in WITH_SENSES]
    senses = [result for result in results if result.family in WITH_SENSES]
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
