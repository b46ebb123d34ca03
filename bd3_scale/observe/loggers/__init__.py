"""Register the loggers of the package: `wandb` and `tensorboard`. `metrics.jsonl` is always written."""

from bd3_scale.observe.loggers import tensorboard, weights_and_biases  # noqa: F401 - the import registers them
from bd3_scale.observe.loggers.base import LoggedRun as LoggedRun
from bd3_scale.observe.loggers.base import Logger as Logger
from bd3_scale.registry import loggers as loggers
