#!/usr/bin/env bash
# NVIDIA's TensorRT for RTX as a peer for the tests, in .venv-tensorrt-rtx: its parser and builder run without a GPU, so
# that every graph of the tensorrt targets can be parsed and built here. About 500 MB; proprietary licence, never a
# dependency of vlac. Exits 3 with a reason where it cannot be set up.
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=.venv-tensorrt-rtx
version=1.7.1.116
stamp=$venv/.vlac-stamp
want=$(sha256sum <scripts/peers/tensorrt_rtx.sh | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
  exit 0
fi
if [ "$(uname -sm)" != "Linux x86_64" ]; then
  echo "tensorrt-rtx is not set up: its libraries are for Linux on x86-64, this is $(uname -sm)" >&2
  exit 3
fi

echo "setting up tensorrt-rtx $version in $venv (about 500 MB, once)"
[ -x $venv/bin/python ] || "${PYTHON:-python3}" -m venv $venv
if ! $venv/bin/python -m pip --disable-pip-version-check install --quiet --no-deps \
  "tensorrt-rtx-cu13-libs==$version" "tensorrt-rtx-cu13-bindings==$version" "tensorrt-rtx-cu13==$version"; then
  echo "tensorrt-rtx is not set up: the registry does not give it" >&2
  exit 3
fi
if ! $venv/bin/python -c "import tensorrt_rtx as trt; trt.Builder(trt.Logger())"; then
  echo "tensorrt-rtx is not set up: its library does not load here" >&2
  exit 3
fi
echo "$want" >"$stamp"
