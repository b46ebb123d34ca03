#!/bin/sh
# What both images do while they are built: image.sh system | install WHEELS | check
set -eu
python=${PYTHON:-python3}

case "$1" in
system)
    # A compiler for Triton, which builds the launcher of each kernel; the user-space half of InfiniBand and RoCE, which
    # NCCL opens where the host has adapters. NCCL and CUDA are among the wheels, the driver is the host's.
    apt-get update
    apt-get install --yes --no-install-recommends gcc libc6-dev ibverbs-providers libibverbs1 librdmacm1 libnuma1
    rm -rf /var/lib/apt/lists/*
    ;;
install)
    # Every wheel by name, so that nothing is looked for elsewhere.
    "$python" -m pip install --no-cache-dir --no-index --no-deps "$2"/*.whl
    ;;
check)
    "$python" -m pip check
    "$python" -c 'import bd3_scale.api, bd3_scale.cli, bd3_scale.train.main
import deepspeed, megatron.core, streaming, torch, transformers, wandb
print("torch", torch.__version__, "CUDA", torch.version.cuda)'
    bd3-scale --help >/dev/null
    ;;
*)
    echo "image.sh system | install WHEELS | check, not $1" >&2
    exit 2
    ;;
esac
