"""The text of ``--help``: usage, examples, and every key with its default and its meaning, from ``conf/``."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable

from rollout.cli.command_line import FLAGS, VALUED
from rollout.config.key_comments import Group, Key, groups, options, top_keys

_USAGE = """\
Generate completions for a dataset with a Hugging Face causal language model.

Usage:
  python -m rollout [+experiment=NAME] [GROUP=OPTION ...] [GROUP.KEY=VALUE ...]

Examples:
  python -m rollout +experiment=ppo_sampling data.limit=4 output.dir=runs/first
  python -m rollout +experiment=bulk_inference data.path=prompts.jsonl \\
    data.as_chat=true output.dir=runs/answers
  One job for each temperature:
  python -m rollout -m +experiment=ppo_sampling sampling.temperature=0.5,1.0
  Print the values, run nothing:
  python -m rollout +experiment=grpo_sampling --cfg job
  One process per GPU:
  accelerate launch --num_processes 4 -m rollout +experiment=ppo_sampling

Values:
  A value with a comma, a quote, a bracket or another special character has
  quotes of its own inside the shell's:
    'data.system_prompt="You are helpful, honest and brief."'
    'sampling.stop=["\\n\\n", "###"]'
  null is no value, and true and false are written small. A key is given once.
"""
_END = """\
Exit status: 0 complete; 1 crashed; 2 wrong configuration or input;
4 complete, with rows in error; 75 stopped early.
The same command on the same output.dir resumes a run.
See also: python -m rollout.verify DIR, python -m rollout.report DIR,
python -m rollout.rescore DIR.
"""


def help_text(width: int | None = None) -> str:
    """Return the whole text, for a terminal of ``width`` columns."""
    columns = min(width or shutil.get_terminal_size((80, 24)).columns, 120)
    lines = _USAGE.splitlines()
    lines += ["", "Options:"]
    lines += _table([(", ".join(names), meaning) for names, meaning in FLAGS.items()], columns)
    lines += _table([(f"{', '.join(names)} {value}", meaning) for names, (value, meaning) in VALUED.items()], columns)
    lines += ["", "Experiments (+experiment=NAME):"]
    lines += _table([(option.name, option.description) for option in options("experiment")], columns)
    for group in groups():
        lines += ["", *_group(group, columns)]
    lines += ["", "Keys of no group:", *_keys(top_keys(), columns), "", *_END.splitlines()]
    return "\n".join(lines)


def _group(group: Group, columns: int) -> list[str]:
    lines = [f"Group {group.name}:"]
    if len(group.options) > 1:
        offered = [(f"{group.name}={option.name}", option.description) for option in group.options]
        lines += _table(offered, columns)
    for section in group.sections:
        lines += [f"  with {group.name}={section.policy}:"] if section.policy else []
        lines += _keys(section.keys, columns)
    return lines


def _keys(keys: Iterable[Key], columns: int) -> list[str]:
    return _table([(f"{key.name}={_default(key)}", key.meaning) for key in keys], columns)


def _default(key: Key) -> str:
    return f"{key.type.upper()} (required)" if key.default == "???" else key.default


def _table(rows: Iterable[tuple[str, str]], columns: int) -> list[str]:
    """Return rows of a name and its meaning; a name that is too long has a line of its own."""
    at = 38
    lines = []
    for name, meaning in rows:
        wrapped = textwrap.wrap(meaning, max(columns - at, 30)) or [""]
        first = f"  {name}"
        if len(first) > at - 2:
            lines.append(first)
            first = ""
        lines.append(f"{first:<{at}}{wrapped[0]}".rstrip())
        lines += [" " * at + line for line in wrapped[1:]]
    return lines
