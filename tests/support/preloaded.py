"""What the processes of the tests import; the fork server does it once, which saves seconds a process."""

from __future__ import annotations

import gc
import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads does not survive a fork

import deepspeed  # noqa: F401
import matplotlib.figure  # noqa: F401
import pytest  # noqa: F401 - the main module of whoever asks for a process
from megatron.core.pipeline_parallel import schedules  # noqa: F401

import tests.support.programs  # noqa: F401

gc.collect()
gc.freeze()  # so that a collection in a fork does not copy all of it
