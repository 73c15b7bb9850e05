#!/usr/bin/env bash
# Make a Vulkan driver for a machine without a GPU, in a folder of its own: Mesa's lavapipe, which
# SAPIEN draws with. For tests: ten pictures a second, and ray tracing takes minutes a picture.
#
#   eval_servers/simpler/lavapipe.sh DIR [DRIVER.deb ...]
#
# DIR     folder to make; then: source DIR/env.sh
# *.deb   mesa-vulkan-drivers 25 and the libdrm packages it wants; default: downloaded by apt from
#         bookworm-backports, whose line must be in the machine's apt sources
#
# Needs libvulkan1, mesa-vulkan-drivers of the system (for the libraries it depends on), libvulkan-dev
# and a C compiler. Mesa 26 and later need none of this: apt install mesa-vulkan-drivers.
set -euo pipefail

if [[ $# -lt 1 ]]; then
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$1"
dir=$(cd "$1" && pwd)
shift

debs=()
for deb in "$@"; do debs+=("$(realpath "$deb")"); done
if [[ ${#debs[@]} -eq 0 ]]; then
    mkdir -p "$dir/debs"
    cd "$dir/debs"
    apt-get download -q -t bookworm-backports mesa-vulkan-drivers libdrm2 libdrm-amdgpu1
    debs=("$dir"/debs/*.deb)
fi
for deb in "${debs[@]}"; do dpkg-deb -x "$deb" "$dir/root"; done

library=$(find "$dir/root" -name libvulkan_lvp.so | head -n 1)
if [[ -z $library ]]; then
    echo "lavapipe: no libvulkan_lvp.so in ${debs[*]}" >&2
    exit 1
fi
version=1.3.239
cat >"$dir/lvp.json" <<JSON
{"file_format_version": "1.0.0", "ICD": {"library_path": "$library", "api_version": "$version"}}
JSON

layer=VK_LAYER_VLA_no_external_semaphore_fd
mkdir -p "$dir/layers"
cc -O2 -Wall -Wextra -fPIC -shared -fvisibility=hidden "$here/lavapipe.c" -o "$dir/layers/liblayer.so"
cat >"$dir/layers/layer.json" <<JSON
{
  "file_format_version": "1.2.0",
  "layer": {
    "name": "$layer",
    "type": "GLOBAL",
    "library_path": "./liblayer.so",
    "api_version": "$version",
    "implementation_version": "1",
    "description": "SAPIEN on lavapipe before Mesa 26"
  }
}
JSON
cat >"$dir/env.sh" <<SH
export VK_ICD_FILENAMES=$dir/lvp.json VK_DRIVER_FILES=$dir/lvp.json
export LD_LIBRARY_PATH=$(dirname "$library")\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}
export VK_LAYER_PATH=$dir/layers VK_INSTANCE_LAYERS=$layer
SH
echo "ready: source $dir/env.sh"
