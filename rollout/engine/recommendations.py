"""Tell the caller what a model recommends and a call does not use."""

from __future__ import annotations

import logging
from typing import Any

from rollout.generation_defaults import not_offered
from rollout.sampling_params import SamplingParams, describe_parameters, unapplied_recommendations

logger = logging.getLogger(__name__)


class Recommendations:
    """Logs once what a ``generation_config`` recommends; at once, what this engine does not offer."""

    def __init__(self, generation_config: Any) -> None:
        self._config: Any = generation_config
        """None once reported."""
        for name, value in not_offered(generation_config).items():
            logger.warning("The model's generation_config sets %s=%r, which this engine does not apply.", name, value)

    def report(self, params: SamplingParams) -> None:
        """Log what the model recommends and ``params`` do not use; nothing from the second call on."""
        config, self._config = self._config, None
        if recommended := unapplied_recommendations(config, params):
            logger.info(
                "The model's generation_config recommends %s; SamplingParams.from_generation_config applies this.",
                describe_parameters(recommended),
            )
