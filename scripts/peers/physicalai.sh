#!/usr/bin/env bash
# Intel's physicalai runtime as a peer for the tests, in .venv-physicalai: it loads the policy packages that vlac writes.
# Installed without its camera and robot drivers, transformers and OpenVINO's tokenizers, which no package of ours uses.
# Wants Python 3.11 or later; exits 3 with a reason where that is not there.
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=.venv-physicalai
stamp=$venv/.vlac-stamp
want=$(sha256sum <scripts/peers/physicalai.sh | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
  exit 0
fi
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "physicalai is not set up: it wants Python 3.11 or later" >&2
  exit 3
fi

echo "setting up physicalai in $venv (about 500 MB, once)"
[ -x $venv/bin/python ] || "$python" -m venv $venv
pip="$venv/bin/python -m pip --disable-pip-version-check install --quiet"
$pip --no-deps physicalai==0.3.0
$pip "numpy>=1.24,<2.5" "onnxruntime>=1.23,<2" "openvino>=2026.4,<2027" "opencv-python-headless<6" "pydantic>=2.5,<3" \
  "pyyaml>=6,<7" "safetensors>=0.4.3,<1" "jsonargparse[signatures]>=4.50,<5" "loguru>=0.7,<1" \
  "huggingface_hub>=0.34,<2" "typing-extensions>=4.5,<5"
# vlac's base install
$pip "tokenizers>=0.22,<1" "Pillow>=11,<14" "typer<1" "rich<16"
HF_HUB_OFFLINE=1 $venv/bin/python -c "from physicalai.inference import InferenceModel"
echo "$want" >"$stamp"
