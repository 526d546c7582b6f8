"""Signatures and names in docs/api.md are those of the code."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

import rollout
from rollout.batcher import types
from rollout.headroom.headroom import Headroom
from rollout.scores import Score, Scores, ScoringStats
from rollout.stats import Parity, Stats

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
OWNERS: dict[str, Any] = {
    **{name: getattr(rollout, name) for name in rollout.__all__},
    **{name: getattr(types, name) for name in ("Policy", "Observation", "Decision", "StepSample", "FinishedRow")},
    "Headroom": Headroom,
    "Stats": Stats,
    **{owner.__name__: owner for owner in (Score, Scores, ScoringStats)},
    "Parity": Parity,
}
SIGNATURES = re.findall(r"^```python\n(\w+(?:\.\w+)?)\(([^`]*)\)\n```$", PAGE, re.MULTILINE)


def parameters(of: Any) -> list[tuple[str, bool, str]]:
    """Return name, whether it is by keyword alone, and the default of each parameter."""
    found = inspect.signature(of).parameters.values()
    own = fields(of) if is_dataclass(of) else ()
    made = {field.name: field.default_factory for field in own if field.default_factory is not MISSING}

    def default(p: inspect.Parameter) -> str:
        return "" if p.default is p.empty else repr(made[p.name]() if p.name in made else p.default)

    return [(p.name, p.kind is p.KEYWORD_ONLY, default(p)) for p in found if p.name != "self"]


def written(arguments: str) -> list[tuple[str, bool, str]]:
    """Return the same of parameters as the page writes them."""
    function = ast.parse(f"def f(\n{arguments}\n): ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    found = function.args
    defaults = [*[None] * (len(found.args) - len(found.defaults)), *found.defaults]
    pairs = [(arg, default, False) for arg, default in zip(found.args, defaults, strict=True)]
    pairs += [(arg, default, True) for arg, default in zip(found.kwonlyargs, found.kw_defaults, strict=True)]
    return [(arg.arg, only, "" if node is None else repr(ast.literal_eval(node))) for arg, node, only in pairs]


@pytest.mark.parametrize(("name", "arguments"), SIGNATURES, ids=[name for name, _ in SIGNATURES])
def test_signature_is_that_of_the_code(name: str, arguments: str) -> None:
    owner, _, method = name.partition(".")
    assert written(arguments) == parameters(getattr(OWNERS[owner], method) if method else OWNERS[owner])


def test_page_has_a_signature_of_every_public_class_and_method() -> None:
    names = {name for name, _ in SIGNATURES}
    protocols = {"Policy.decide", "Headroom.free_bytes"}
    methods = {f"Engine.{name}" for name, value in vars(rollout.Engine).items() if inspect.isfunction(value)}
    public = {name for name in methods if not name.split(".")[1].startswith("_")}
    assert names >= {*rollout.__all__, "Stats", "Observation", "Decision", *public, *protocols}


@pytest.mark.parametrize("name", ["Record", "Observation", "SamplingParams"])
def test_table_names_every_field(name: str) -> None:
    section = PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]
    fields = [field for field, _, _ in parameters(OWNERS[name])]
    assert [field for field in fields if f"`{field}`" not in section.split("```")[-1]] == []


def test_modules_that_the_page_names_exist() -> None:
    for module, name in re.findall(r"`(rollout(?:\.[a-z_]+)+)\.([A-Z]\w+)`", PAGE):
        assert hasattr(__import__(module, fromlist=[name]), name)


def test_example_policy_decides() -> None:
    from tests.support.observations import observe

    (block,) = re.findall(r"^```python\n(from rollout import Engine\n.*?)^engine", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/api.md", "exec"), names)  # a page of this repository
    policy = names["HalfOfMemory"]()
    assert policy.decide(observe(eta=1000)).rows == 8
    assert policy.decide(observe([50, 50], prompt=300, eta=1000)).rows == 2
