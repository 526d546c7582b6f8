"""TRL trainers that generate with an `Engine` on their own module; needs the extra ``trl``."""

try:
    from trl import GRPOTrainer
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ModuleNotFoundError(
        "rollout.integrations.trl needs TRL: pip install 'rollout[trl]' (docs/trl.md says which versions).", name="trl"
    ) from error

from rollout.integrations.trl.mixin import RolloutMixin, with_rollout
from rollout.integrations.trl.rollout_function import rollout_func

RolloutGRPOTrainer = with_rollout(GRPOTrainer)
"""TRL's ``GRPOTrainer`` with this engine."""

__all__ = ["RolloutGRPOTrainer", "RolloutMixin", "rollout_func", "with_rollout"]
