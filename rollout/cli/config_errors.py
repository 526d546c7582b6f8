"""Explain in one sentence why Hydra cannot compose a configuration, or OmegaConf not resolve it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
    ValidationError,
)
from yaml import MarkedYAMLError, YAMLError

from rollout.batcher.suggestions import near_name
from rollout.cli.overrides import Known, explain_unknown_key
from rollout.cli.quoting import shell_word
from rollout.cli.values import describe_wrong_type
from rollout.config.compose import CONFIG_NAME
from rollout.errors import InputError
from rollout.models.errors import first_line

#: What composing raises for a user's own files and overrides.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError, AttributeError)
_REWARD_TARGETS = ("reward.target", "reward.fn", "reward.func", "reward.function", "reward.name", "reward.path")
_IN_FILE = re.compile(r"In '([^']+)'")


def explain(error: BaseException, known: Known) -> str:
    """Return one sentence that names the key, the value or the file at fault and what to do."""
    causes = list(_chain(error))
    if refused := next((cause for cause in causes if isinstance(cause, InputError)), None):
        return str(refused)
    file = next((match[1] for cause in causes if (match := _IN_FILE.match(str(cause)))), "")
    where = f"In {file}: " if file and file != CONFIG_NAME else ""
    for cause in causes:
        if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key == file.split("/")[0] != "":
            return f"{file}.yaml has no package: begin it with the line `# @package _global_`."
        sentence = _sentence(cause, known)
        if sentence:
            return where + sentence
    message = first_line(error).rstrip(".")
    # OmegaConf's inner errors still have their placeholders.
    details = [first_line(cause).rstrip(".") for cause in causes[1:2] if "$VALUE" not in str(cause)]
    whole = ": ".join(dict.fromkeys(part for part in [message, *details] if part))
    if match := re.match(r"Error merging override (hydra\.[^=]+)=(.*?): (.*)", whole):
        wanted = _wanted_by_hydra(match[3])
        return f"{match[1]} is {match[2]}, but must be {wanted}: --cfg hydra prints Hydra's own keys."
    return f"{whole}."


def _sentence(cause: BaseException, known: Known) -> str | None:
    if isinstance(cause, MissingConfigException):
        return _missing_file(cause)
    if isinstance(cause, OmegaConfBaseException):
        return _omegaconf(cause, known)
    if isinstance(cause, UnicodeDecodeError):
        return "A file of --config-dir is not UTF-8 text: save it as UTF-8."
    if isinstance(cause, YAMLError):
        mark = cause.problem_mark if isinstance(cause, MarkedYAMLError) else None
        place = f"{mark.name}, line {mark.line + 1}" if mark else "A configuration file"
        problem = cause.problem if isinstance(cause, MarkedYAMLError) else first_line(cause)
        return f"{place} is not YAML ({problem})."
    return _override(str(cause), known) if isinstance(cause, HydraException) else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _missing_file(error: MissingConfigException) -> str | None:
    if error.missing_cfg_file is None:
        return None
    group, _, name = error.missing_cfg_file.rpartition("/")
    offered = sorted(option for option in error.options or () if not option.startswith(("_", "schema")))
    if group:
        near = near_name(name, offered)
        hint = f"; did you mean {near}" if near else ""
        return f"There is no {group}={name}{hint}; {group} is one of {', '.join(offered)}." if offered else None
    return f"There is no configuration {name}: --config-name names a file of --config-dir, without .yaml."


def _override(message: str, known: Known) -> str | None:
    if match := re.match(r"Could not override '([^']+)'\.\s+To append to your config use (\+.*)", message, re.DOTALL):
        key, argument = match[1], match[2].strip()
        if key.replace("_", "") in _REWARD_TARGETS:
            target = argument.partition("=")[2] or "MODULE.FUNCTION"
            return f"There is no key {key}; here it is reward._target_: write reward._target_={target}."
        if key.startswith("reward."):
            return f"An argument of the reward is added to its configuration: write {shell_word(argument)}."
        if key in known.keys and key.startswith("batcher."):
            return _other_policy(key)
        if any(key.startswith(f"{name}.") for name in known.keys):
            return f"{key} is added to its configuration: write {shell_word(argument)}."
        if key.startswith("hydra."):
            return f"There is no key {key}: --cfg hydra prints Hydra's own keys."
        return explain_unknown_key(key, argument.partition("=")[2], known)
    if match := re.search(r"Could not override '([^']+)'\. No match in the defaults list", message):
        if match[1] in known.groups:
            return f"The configuration lacks the group {match[1]}: begin its defaults list with `- {CONFIG_NAME}`."
        return f"There is no group {match[1]} to override; the groups are {', '.join(known.groups)}."
    if match := re.match(r"Multiple values for (\w+)\. To override a value use 'override \w+: (\S+)'", message):
        return f"The defaults list chooses {match[1]} a second time: write `- override /{match[1]}: {match[2]}` there."
    if match := re.match(r"Cannot find primary config '([^']+)'", message):
        return f"There is no configuration {match[1]}: --config-name names a file of --config-dir, without .yaml."
    return None


def _wanted_by_hydra(message: str) -> str:
    """Return what a key of Hydra's takes, by the message about a value that it does not take."""
    if choices := re.search(r"expected one of \[(.*)\]", message):
        return f"one of {choices[1]}"
    kinds = {"Integer": "a whole number", "Float": "a number", "bool": "true or false", "to string": "text"}
    return next((wanted for kind, wanted in kinds.items() if kind in message), "of another type")


def _other_policy(key: str) -> str:
    from rollout.config.schema import BATCHER_SCHEMAS

    name = key.rpartition(".")[2]
    policies = [policy for policy, kind in BATCHER_SCHEMAS.items() if name in kind.__dataclass_fields__]
    chosen = " or ".join(f"batcher={policy}" for policy in policies)
    return f"{key} belongs to another policy: add {chosen}, or leave it out."


def _omegaconf(error: OmegaConfBaseException, known: Known) -> str | None:
    key, message = error.full_key or "", first_line(error)
    if isinstance(error, InterpolationResolutionError | UnsupportedInterpolationType):
        return _interpolation(error, key, message)
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        return explain_unknown_key(key, None, known) if key else None
    if match := re.search(r"is not a subclass of \w+Config\. value: (.*)", message):
        return f"A group of keys has the value {match[1]}: write its keys below it."
    if isinstance(error, ValidationError) and key in known.keys:
        # The value stands in the message alone.
        value = re.search(r"[Vv]alue '(.*?)' (?:of type|for field)", message)
        return describe_wrong_type(known.keys[key], None, value[1] if value else None)
    return None


def _interpolation(error: OmegaConfBaseException, key: str, message: str) -> str:
    if match := re.search(r"Environment variable '([^']+)' not found", str(error)):
        return (
            f"{key} needs the environment variable {match[1]}, which is not set: "
            f"export it, or write ${{oc.env:{match[1]},DEFAULT}}."
        )
    if isinstance(error, InterpolationKeyError) and (match := re.search(r"Interpolation key '([^']+)'", message)):
        return (
            f"{key} has ${{{match[1]}}}, but there is no key {match[1]}: for the text itself write \\${{{match[1]}}}."
        )
    if isinstance(error, UnsupportedInterpolationType):
        name = re.search(r"interpolation type (\S+)", message)
        shown = name[1] if name else "unknown"
        return f"{key} has ${{{shown}:…}}, which stands for nothing here: write ${{oc.env:NAME}} for a variable."
    return f"{key} cannot be resolved: {message.rstrip('.')}."
