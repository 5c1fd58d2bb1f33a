#!/usr/bin/env bash
# llama-cpp-python, whose ggml is one of the providers of the ggml engine, unpacked into .venv-llama-cpp for the tests.
# Its package is source only: building takes twenty minutes or more on two cores (pip keeps the wheel it built).
set -euo pipefail
cd "$(dirname "$0")/../.."

folder=.venv-llama-cpp
version=0.3.36
[ -f $folder/llama_cpp_python-$version.dist-info/METADATA ] && exit 0

echo "setting up llama-cpp-python $version in $folder"
rm -rf $folder
CMAKE_ARGS="-DLLAVA_BUILD=OFF" .venv/bin/python -m pip --disable-pip-version-check install --quiet --no-deps \
  --target $folder "llama-cpp-python==$version"
