#!/usr/bin/env bash
# ggml-compiler (PyPI) as a peer of `vlac bench --peers`: in .venv-ggml-compiler, on the torch and LeRobot of .venv-lerobot.
#   scripts/peers/ggml_compiler.sh                          sets it up
#   scripts/peers/ggml_compiler.sh CHECKPOINT OUT [PRECISION ...]  and compiles SmolVLA with its own command line:
#                                                           OUT/PRECISION/model.gguf; default q8_0 bf16
set -euo pipefail
repository="$(cd "$(dirname "$0")/../.." && pwd)"
venv=$repository/.venv-ggml-compiler
lerobot=$repository/.venv-lerobot

if ! "$venv/bin/ggml-compiler" --help >/dev/null 2>&1; then
  [ -x "$lerobot/bin/python" ] || "$repository/scripts/peers/lerobot.sh"
  "$lerobot/bin/python" -m venv "$venv"
  "$venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps ggml-compiler==0.1.0 "gguf>=0.19,<1"
  "$lerobot/bin/python" -c "import site; print(site.getsitepackages()[0])" \
    >"$("$venv/bin/python" -c "import site; print(site.getsitepackages()[0])")/lerobot.pth"
fi
[ $# -ge 2 ] || exit 0

export VLAC_CHECKPOINT="$(cd "$1" && pwd)" HF_HUB_OFFLINE=1
out=$2
shift 2
[ $# -gt 0 ] || set -- q8_0 bf16
for precision in "$@"; do
  mkdir -p "$out/$precision"
  printf 'rules:\n- {match: "**", dtype: %s}\nfallback: [q8_0, f16]\n' "$precision" >"$out/$precision/policy.yaml"
  "$venv/bin/ggml-compiler" compile "$repository/scripts/peers/ggml_compiler_program.py:program" --out "$out/$precision" \
    --policy "$out/$precision/policy.yaml" -O2
done
