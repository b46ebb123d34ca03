"""Import what the tests' processes use; the fork server does it once, which saves seconds for each process."""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil
import warnings

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads does not survive a fork

import bd3_scale

LIBRARIES = (
    "deepspeed",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.transformer.moe.experts",  # imported by the first layer that is built
    "pytest",  # the main module of each process that is requested
    "tests.support.programs",
    "torch.distributed.run",
    "transformers",
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # these modules warn about each other
    for module in pkgutil.walk_packages(bd3_scale.__path__, "bd3_scale."):
        # Triton reads its switches once; exported code belongs to transformers; the rest are programs.
        if not any(part in module.name for part in ("kernels", "remote_code", "__main__", "harness")):
            importlib.import_module(module.name)
    for name in LIBRARIES:
        importlib.import_module(name)
gc.collect()
gc.freeze()  # so that a garbage collection in a fork does not copy all of it
