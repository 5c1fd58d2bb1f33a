#!/usr/bin/env bash
# Settles on a Jetson what no machine without its GPU can: do the plans of the tensorrt targets build, do they answer
# what the graphs say, how fast are they. Prints one block of text to paste into an issue, and keeps it in a file.
#
#   scripts/on-device/jetson.sh out-fp16/ out-int8/ ...     folders that `vlac compile --target tensorrt-...` wrote
#   scripts/on-device/jetson.sh --compile CKPT              compiles every variant here first (slow on a small board)
#
# Wants: vlac in a Python that sees JetPack's TensorRT:
#   python3 -m venv --system-site-packages .venv && .venv/bin/pip install 'vlac-compiler[onnx]'
# VLAC names another command, PYTHON another interpreter. Root is not needed. Exit code 1 if anything failed.
set -uo pipefail

vlac="${VLAC:-vlac}"
python="${PYTHON:-python3}"
report="${REPORT:-vlac-jetson.txt}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

say() { printf '%s\n' "$*" | tee -a "$report"; }

# check NAME COMMAND...: runs it, keeps its output, says how it ended and how long it took
check() {
  local name=$1 begun=$SECONDS code
  shift
  "$@" >"$work/out" 2>"$work/err" </dev/null
  code=$?
  if [ $code -eq 0 ]; then
    say "PASS $name ($((SECONDS - begun)) s)"
  else
    failed=1
    say "FAIL $name (exit code $code, $((SECONDS - begun)) s)"
    tail -n 8 "$work/err" | sed 's/^/     /' | tee -a "$report"
  fi
  return $code
}

first_line() { head -n 1 "$1" 2>/dev/null | tr -d '\0'; }

board() {
  say '```'
  say "board      $(first_line /proc/device-tree/model)"
  say "L4T        $(first_line /etc/nv_tegra_release)"
  say "system     $(sed -n 's/^PRETTY_NAME="\(.*\)"/\1/p' /etc/os-release 2>/dev/null), kernel $(uname -r)"
  say "power mode $(nvpmodel -q 2>/dev/null | tr '\n' ' ' || true)"
  say "memory     $(awk '/MemTotal|MemAvailable/ {printf "%s %d MB  ", $1, $2 / 1024}' /proc/meminfo)"
  say "python     $("$python" --version 2>&1)"
  say "tensorrt   $("$python" -c 'import tensorrt; print(tensorrt.__version__)' 2>&1 | tail -n 1)"
  say "vlac       $("$vlac" --version 2>&1 | tail -n 1)"
  say ""
}

compile_all() {
  local target out
  for target in tensorrt tensorrt-fp16 tensorrt-bf16 tensorrt-int8 tensorrt-int4 tensorrt-fp8; do
    out="out-$target"
    check "compile $target" "$vlac" compile "$1" --target "$target" -o "$out" --quiet && folders+=("$out")
  done
}

# one artifact: plans, answers against the stored ones, graphs against single launches, latency
settle() {
  local folder=${1%/}
  say ""
  say "== $folder: $("$python" -c 'import json, sys; m = json.load(open(sys.argv[1])); print(m["target"], "dialect", m["tensorrt"]["dialect"], m["family"], m["parameters"], "parameters")' "$folder/manifest.json" 2>&1 | tail -n 1)"
  check "build.py alone" "$python" "$folder/build.py" --force || return
  grep -E '"(key|bytes|seconds)"' "$work/out" | tr -d ' "\n' | sed 's/^/     /' | tee -a "$report"
  say ""
  check "vlac build finds these plans" "$vlac" build "$folder" --quiet
  check "vlac parity" "$vlac" parity "$folder" --engine tensorrt --quiet
  grep -v '^$' "$work/out" | head -n 24 | sed 's/^/     /' | tee -a "$report"
  if "$python" -c 'import onnxruntime' 2>/dev/null; then
    check "the same graphs in ONNX Runtime" "$vlac" parity "$folder" --engine onnxruntime --quiet
    grep -v '^$' "$work/out" | head -n 12 | sed 's/^/     /' | tee -a "$report"
  fi
  check "vlac bench" "$vlac" bench "$folder" --engine tensorrt --quiet
  sed 's/^/     /' "$work/out" | tee -a "$report"
}

: >"$report" || exit 2
folders=()
board
if [ "${1:-}" = --compile ] && [ $# -eq 2 ]; then
  compile_all "$2"
elif [ $# -eq 0 ] || [ "${1:0:1}" = - ]; then
  sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
  exit 2
else
  folders=("$@")
fi
for folder in "${folders[@]+"${folders[@]}"}"; do
  settle "$folder"
done
say ""
say "$([ $failed -eq 0 ] && echo 'everything passed' || echo 'something FAILED, see above')"
say '```'
echo "paste the text above, or the file $report, into an issue" >&2
exit $failed
