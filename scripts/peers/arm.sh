#!/usr/bin/env bash
# What scripts/test-arm runs vlac's runtime in: Debian's arm64 Python under QEMU's user-mode emulation, with the unmodified
# aarch64 wheels of the base install and its engines. No root, nothing compiled, nothing installed on this system.
#   scripts/peers/arm.sh           prepares it (about 190 MB to fetch, a minute) and prints the folder; at once when it stands
#   scripts/peers/arm.sh --where   prints the folder, there or not
# The folder is ~/.cache/vlac/arm/KEY (VLAC_ARM_CACHE names another parent); KEY: this file, the wheels' versions and CPUs.
# Exits 3 with a reason where it cannot be had: not x86-64 Linux, not Debian 12, no packages, too little room.
set -euo pipefail
cd "$(dirname "$0")/../.."

parent=${VLAC_ARM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vlac/arm}
key=$(cat scripts/peers/arm.sh scripts/peers/arm_cpus.txt constraints.txt | sha256sum | cut -c1-16)
dir=$parent/$key
if [ "${1:-}" = --where ]; then
  echo "$dir"
  exit 0
fi
if [ -f "$dir/ready" ]; then
  echo "$dir"
  exit 0
fi

skip() {
  echo "ARM is not tested here: $*" >&2
  exit 3
}
[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || skip "it emulates ARM on x86-64 Linux; this is $(uname -s) on $(uname -m)"
python=python3
[ ! -x .venv/bin/python ] || python=.venv/bin/python
for tool in apt-get dpkg $python; do
  command -v $tool >/dev/null || skip "no $tool"
done
grep -q '^VERSION_CODENAME=bookworm' /etc/os-release || skip "the recipe is for Debian 12's packages"
mkdir -p "$parent" || skip "$parent cannot be made"
[ "$(df -Pk "$parent" | awk 'NR == 2 {print $4}')" -gt 800000 ] || skip "less than 800 MB free in $parent"

work=$(mktemp -d "$parent/making.XXXXXX")
trap 'rm -rf "$work"' EXIT
log=$work/log

# apt with a state of its own: nobody's package lists are touched, and no root is needed. Arguments: architecture, command
apt() {
  local state=$work/apt-$1
  mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
  : >"$state/status"
  apt-get -qq "-oAPT::Architecture=$1" "-oAPT::Architectures=$1" "-oDir::State::Lists=$state/lists" \
    "-oDir::State::status=$state/status" "-oDir::Cache=$state/cache" -oDebug::NoLocking=1 "${@:2}" >>"$log" 2>&1
}
refused() {
  tail -n 3 "$log" >&2
  skip "$*"
}

echo "preparing ARM emulation in $dir (about 190 MB to fetch, once)" >&2
for arch in amd64 arm64; do
  apt $arch update || true # a source without this architecture counts for nothing: what is missing shows below
done
(cd "$work" && apt amd64 download qemu-user-static) || refused "QEMU cannot be fetched"
dpkg -x "$work"/qemu-user-static_*.deb "$work/qemu"
mv "$work/qemu/usr/bin/qemu-aarch64-static" "$work/"
apt arm64 install -y -d --no-install-recommends python3.11 libstdc++6 libgomp1 || refused "arm64 packages cannot be fetched"
mkdir "$work/sys"
for deb in "$work"/apt-arm64/cache/archives/*.deb; do
  dpkg -x "$deb" "$work/sys"
done

# The base install and its engines as pip resolves them for a Pi: from wheels alone, so it fails where something is missing
$python - >"$work/requirements.txt" <<'PYTHON'
try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["dependencies"], *project["optional-dependencies"]["gguf"], "onnxruntime", sep="\n")
PYTHON
grep -v '^torch==' constraints.txt >"$work/constraints.txt"
platforms=()
for tag in 2_28 2_27 2_26 2_24 2_17; do platforms+=(--platform manylinux_${tag}_aarch64); done
$python -m pip --disable-pip-version-check download --quiet --only-binary=:all: --python-version 3.11 --implementation cp \
  --abi cp311 --abi abi3 --abi none "${platforms[@]}" --platform manylinux2014_aarch64 -d "$work/wheels" \
  -c "$work/constraints.txt" -r "$work/requirements.txt" >>"$log" 2>&1 || refused "the aarch64 wheels cannot be fetched"
mkdir "$work/site"
for wheel in "$work"/wheels/*.whl; do
  $python -m zipfile -e "$wheel" "$work/site"
done
rm -f "$work"/site/transcribe_cpp_native/_native/libggml-vulkan.so # 44 MB that no emulated CPU uses

# One sysroot per CPU, hard links but for /proc/cpuinfo: libraries read it to choose kernels, and it must agree with -cpu
grep -v '^#' scripts/peers/arm_cpus.txt | while IFS='|' read -r name cpu part variant revision features; do
  root=$work/sys-$name
  cp -al "$work/sys" "$root"
  mkdir -p "$root/proc"
  for i in 0 1; do
    printf 'processor\t: %s\nBogoMIPS\t: 108.00\nFeatures\t: %s\nCPU implementer\t: 0x41\nCPU architecture: 8\n' "$i" "$features"
    printf 'CPU variant\t: %s\nCPU part\t: %s\nCPU revision\t: %s\n\n' "$variant" "$part" "$revision"
  done >"$root/proc/cpuinfo"
  # the interpreter by the name that it gives itself (-0), so that what it starts is emulated too
  cat >"$root/usr/bin/python" <<SH
#!/bin/sh
exec "$dir/qemu-aarch64-static" -0 "$dir/sys-$name/usr/bin/python" -L "$dir/sys-$name" -cpu "\${VLAC_ARM_CPU:-$cpu}" \\
  "$dir/sys-$name/usr/bin/python3.11" "\$@"
SH
  chmod +x "$root/usr/bin/python"
done
rm -rf "$work"/{qemu,apt-*,wheels,sys} "$work"/*.deb
touch "$work/ready"
rm -rf "$dir"
mv "$work" "$dir"
trap - EXIT
echo "$dir"
