#!/bin/sh
# Gather what the images are built from: cluster/container/wheels.sh [options of pip wheel]
# Every package at the version of constraints-cuda.txt as a wheel, some built here, and bd3_scale itself, in wheels/
# beside this file. Python must be the images', 3.12, on Linux x86_64: PYTHON=/path/to/python3.12 names it.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
repository=$(cd "$here/../.." && pwd)
wheels=${WHEELS:-$here/wheels}

# Of an earlier version there may be other wheels, and every one would be installed; or modules that are no more.
rm -rf "$wheels" "$repository/build/lib"
DS_BUILD_OPS=0 "${PYTHON:-python3.12}" -m pip wheel --constraint "$repository/constraints-cuda.txt" \
    --wheel-dir "$wheels" "$@" "${repository}[harness,mauve,sentencepiece]"
ls -l "$wheels"
