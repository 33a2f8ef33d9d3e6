"""One dataclass per verb. YAML files and the command line fill the same fields; the strings under them are the help."""

from sartor.config.compare import CompareConfig
from sartor.config.discover import DiscoverConfig
from sartor.config.files import from_yaml, to_yaml
from sartor.config.rlhf import RlhfConfig, passed_on
from sartor.config.training import (
    AnsweringConfig,
    DpoConfig,
    PlanConfig,
    PpoConfig,
    RewardConfig,
    SamplingConfig,
    SftConfig,
    TrainingConfig,
)
from sartor.config.verbs import DemoConfig, LossesConfig, SampleConfig

__all__ = [
    "AnsweringConfig",
    "CompareConfig",
    "DemoConfig",
    "DiscoverConfig",
    "DpoConfig",
    "LossesConfig",
    "PlanConfig",
    "PpoConfig",
    "RewardConfig",
    "RlhfConfig",
    "SampleConfig",
    "SamplingConfig",
    "SftConfig",
    "TrainingConfig",
    "from_yaml",
    "passed_on",
    "to_yaml",
]
