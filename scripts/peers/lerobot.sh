#!/usr/bin/env bash
# LeRobot 0.6.1 as a reference for the tests, in an environment of its own: .venv-lerobot beside the repository's .venv.
# It asks for newer Pythons and older torches than vlac is tested with, so its own requirements are not followed;
# patch_lerobot.py rewrites the few lines that Python 3.11 cannot parse.
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=.venv-lerobot
stamp=$venv/.vlac-stamp
want=$(cat scripts/peers/lerobot.sh scripts/peers/patch_lerobot.py | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
  exit 0
fi

echo "setting up LeRobot in $venv (about 1.5 GB, once)"
[ -x $venv/bin/python ] || "${PYTHON:-python3}" -m venv $venv
pip="$venv/bin/python -m pip --disable-pip-version-check install --quiet"
$pip torch==2.13.0
$pip "transformers==5.5.4" "draccus>=0.11.6,<0.12" "opencv-python-headless<4.14" "einops>=0.8,<0.9" \
  "gymnasium>=1.1.1,<2" "scipy>=1.14,<2" "num2words>=0.5.14" "pillow<13" "numpy>=2.0,<2.3" requests termcolor tqdm \
  "packaging<26"
# what LeRobot reads and writes datasets with
$pip "datasets>=4.8,<5" "pandas>=2,<3" "pyarrow>=21,<30" "av>=15,<16" "jsonlines>=4,<5" "huggingface_hub>=1.6,<2"
# what the bundled policy is trained in (scripts/train_push_cubes.py)
$pip "pymunk>=7,<8" "matplotlib>=3.9,<4"
# what its RobotClient talks to a server with (tests/test_serve_lerobot.py)
$pip "grpcio>=1.73.1,<2" "protobuf>=6.31,<8"
$pip --no-deps "accelerate>=1.14,<2" "torchvision==0.28.0"
$pip --no-deps --ignore-requires-python lerobot==0.6.1
# transformers is here, so Optimum's command line is tried here as well (tests/test_optimum.py)
$pip --no-deps "optimum>=2.3,<3"
$venv/bin/python scripts/peers/patch_lerobot.py
HF_HUB_OFFLINE=1 $venv/bin/python -c "from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy"
HF_HUB_OFFLINE=1 $venv/bin/python -c "from lerobot.datasets.lerobot_dataset import LeRobotDataset"
echo "$want" >"$stamp"
