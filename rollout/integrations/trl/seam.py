"""TRL's private method that turns prompt ids into completion ids: what this version passes and expects back."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rollout.errors import InputError

SINGLE_TURN = "_generate_single_turn"
"""Takes the ids of each prompt and returns one completion for each, in the same order."""
SCORED_STEP = "_generate_and_score_completions"
"""Runs around all turns of one generation, and returns the tensors that the loss reads."""
#: Arguments of every version that can be served. Prompts arrive repeated, so ``num_generations`` adds nothing.
_ARGUMENTS = {"prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"}
_TYPE_IDS = ("token_type_ids", "mm_token_type_ids")
#: What a version may return, by the names of its own variables.
_RETURNED = (("completion_ids",), ("completion_ids", "logprobs"))


@dataclass(frozen=True, slots=True)
class Seam:
    """How one trainer class calls `SINGLE_TURN`."""

    signature: inspect.Signature
    with_logprobs: bool
    """Whether the trainer expects log-probabilities beside the ids."""

    def bind(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Return the arguments of a call by name."""
        return self.signature.bind(*args, **kwargs).arguments


def seam_of(trainer: type) -> Seam:
    """Read how a trainer class calls its generation.

    Raises:
        InputError: the class has no such method, or one that takes or returns something unknown.
    """
    method = getattr(trainer, SINGLE_TURN, None)
    if not (inspect.isfunction(method) and inspect.isfunction(getattr(trainer, SCORED_STEP, None))):
        raise InputError(
            f"{trainer.__name__} {_version()} has no {SINGLE_TURN} that {SCORED_STEP} calls, so this engine cannot "
            f"generate for it: use a trainer and a version that docs/trl.md names, or rollout_func."
        )
    signature = inspect.signature(method)
    names = [name for name in signature.parameters if name != "self"]
    if "prompt_ids" not in names or (unknown := set(names) - _ARGUMENTS):
        what = f"takes {', '.join(sorted(unknown))}" if "prompt_ids" in names else "does not take prompt_ids"
        raise InputError(f"{_described(trainer)} {what}, which is unknown here: use a version that docs/trl.md names.")
    returned = _returned_names(method)
    if len(returned) != 1 or next(iter(returned)) not in _RETURNED:
        shown = " or ".join(sorted(f"({', '.join(names)})" for names in returned)) or "nothing"
        raise InputError(
            f"{_described(trainer)} returns {shown}, which is unknown here: use a version that docs/trl.md names."
        )
    without_self = signature.replace(parameters=list(signature.parameters.values())[1:])
    return Seam(without_self, with_logprobs="logprobs" in returned.pop())


def refuse_images(given: Mapping[str, Any]) -> None:
    """Refuse a call whose prompts are more than token ids.

    Type ids that are all 0 say that everything is text.

    Args:
        given: the arguments of `SINGLE_TURN`, by name.

    Raises:
        InputError: prompts have images or fields of them; the message names one.
    """
    fields = dict(given.get("multimodal_fields") or {})
    if given.get("images"):
        fields["images"] = given["images"]
    for name, values in fields.items():
        rows = values.tolist() if hasattr(values, "tolist") else values
        if name not in _TYPE_IDS or any(any(row) for row in rows):
            raise InputError(
                f"The prompts have {name}, but this engine generates from token ids alone: use TRL's own trainer."
            )


def _returned_names(method: Any) -> set[tuple[str, ...]]:
    """Return the variables that each ``return`` of a method names; ``?`` stands for other expressions."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(method))).body
    except (OSError, SyntaxError, ValueError):
        return set()
    found: set[tuple[str, ...]] = set()
    nodes: list[ast.AST] = list(ast.iter_child_nodes(function))
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Return):
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            found.add(tuple(value.id if isinstance(value, ast.Name) else "?" for value in values))
        nodes.extend(ast.iter_child_nodes(node))
    return found


def _described(trainer: type) -> str:
    owner = next(cls for cls in trainer.__mro__ if SINGLE_TURN in vars(cls))
    return f"{owner.__name__}.{SINGLE_TURN} {_version()}"


def _version() -> str:
    import trl

    return f"of trl {trl.__version__}"
