"""Sampling parameters that an input row has in columns of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rollout.errors import InputError, PromptError
from rollout.sampling_params import SamplingParams

_TEXTS = ("stop", "bad_words")
"""Parameters that a text itself may be a value of."""


class RowParams:
    """Puts the values of an input row's columns in place of a job's sampling parameters.

    Args:
        params: of the job; they hold where a row has null.
        columns: column by parameter.
        check: raises InputError if parameters do not suit the model.
    """

    def __init__(
        self,
        params: SamplingParams,
        columns: Mapping[str, str],
        check: Callable[[SamplingParams], None] = lambda _: None,
    ) -> None:
        self._params = params
        self._columns = columns
        self._check = check

    def of(self, row: Mapping[str, Any]) -> SamplingParams:
        """Return the parameters of a row.

        Raises:
            PromptError: a value is of the wrong type or out of range; the message names its column.
        """
        given = given_params(row, self._columns)
        if not given:
            return self._params
        try:
            params = replace(self._params, **given)
            self._check(params)
        except InputError as error:
            # The sentence begins with the name of the parameter.
            parameter = str(error).partition(" ")[0]
            columns = [self._columns[parameter]] if parameter in given else [self._columns[name] for name in given]
            message = f"data.sampling_columns, column {' or '.join(columns)}: {error}"
            raise PromptError("bad_params", message) from error
        return params


def given_params(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the values that a row has for parameters, as `SamplingParams` takes them."""
    values = {parameter: _plain(parameter, row[column]) for parameter, column in columns.items()}
    return {parameter: value for parameter, value in values.items() if value is not None}


def _plain(parameter: str, value: Any) -> Any:
    """Return a value without what the file's format did to it: text instead of numbers, nulls instead of absence."""
    if isinstance(value, dict):
        # Arrow gives every row the fields of all rows.
        return {key: item for key, item in value.items() if item is not None}
    if not isinstance(value, str):
        return value
    if not value:
        # An empty field of a CSV file.
        return None
    if parameter in _TEXTS and not value.startswith("["):
        return value
    try:
        return json.loads(value.lower() if parameter == "ignore_eos" else value)
    except ValueError:
        return value
