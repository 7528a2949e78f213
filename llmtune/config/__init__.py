"""What the user asked: keywords, flags, a YAML file and the environment become one frozen ``RunConfig``."""

from llmtune.config.keys import resolve_key, settable_keys
from llmtune.config.load import load_config
from llmtune.config.paths import cache_dir, credential_is_set, has_hub_token, store_url
from llmtune.config.schema import (
    AdapterConfig,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    MonitorConfig,
    OutputConfig,
    RecoverConfig,
    RunConfig,
    SaveConfig,
    SourceConfig,
    TrainConfig,
)

__all__ = [
    "AdapterConfig",
    "DataConfig",
    "EvaluateConfig",
    "ModelConfig",
    "MonitorConfig",
    "OutputConfig",
    "RecoverConfig",
    "RunConfig",
    "SaveConfig",
    "SourceConfig",
    "TrainConfig",
    "cache_dir",
    "credential_is_set",
    "has_hub_token",
    "load_config",
    "resolve_key",
    "settable_keys",
    "store_url",
]
