#!/usr/bin/env bash
# QVAC's own VLA engine (npm @qvac/vla-ggml) as a peer for the tests, in .venv-qvac: pinned, no build, no install scripts.
# Its packages carry every platform; what is not this Linux is removed again (750 MB -> about 120 MB).
# Needs node's npm and glibc 2.36 or so; exits 3 with a reason where it cannot be had.
set -euo pipefail
cd "$(dirname "$0")/../.."

dir=.venv-qvac
stamp=$dir/.vlac-stamp
want=$(cat scripts/peers/qvac.sh scripts/peers/qvac_run.js | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
  exit 0
fi
if ! command -v npm >/dev/null; then
  echo "QVAC's engine is not set up: no npm here" >&2
  exit 3
fi
case "$(uname -s)-$(uname -m)" in
  Linux-x86_64) host=linux-x64 ;;
  Linux-aarch64) host=linux-arm64 ;;
  *)
    echo "QVAC's engine is not set up: no Linux on x86-64 or arm64" >&2
    exit 3
    ;;
esac

echo "setting up QVAC's engine in $dir (about 120 MB, once)"
mkdir -p $dir
printf '{"name": "vlac-peer-qvac", "version": "1.0.0", "private": true}\n' >$dir/package.json
npm install --prefix $dir --ignore-scripts --no-audit --no-fund --loglevel=error \
  @qvac/vla-ggml@0.27.1 @qvac/fabric@0.15.0 bare@1.31.2 bare-process@4.5.1
for package in $dir/node_modules/@qvac/fabric $dir/node_modules/@qvac/vla-ggml; do
  find $package/prebuilds -mindepth 1 -maxdepth 1 -type d ! -name $host -exec rm -rf {} +
  find $package/prebuilds \( -name 'libqvac-ggml-hip.so' -o -name 'libqvac-ggml-vulkan.so' \) -delete
done
cp scripts/peers/qvac_run.js $dir/run.js
echo "$want" >"$stamp"
