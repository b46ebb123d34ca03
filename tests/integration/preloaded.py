"""What every rank of the integration tests imports; the fork server does it once, which saves seconds a rank."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed  # noqa: F401
from megatron.core.pipeline_parallel import schedules  # noqa: F401

import bd3_scale.train.loop  # noqa: F401
