#!/usr/bin/env bash
# Make a Vulkan driver for a machine without a GPU, in a folder of its own: Mesa's lavapipe, which
# SAPIEN draws with. For tests: ten pictures a second, and ray tracing takes minutes a picture.
#
#   eval_servers/simpler/lavapipe.sh DIR        then: source DIR/env.sh
#
# For Debian 12 (amd64) with a C compiler; changes nothing outside of DIR. apt fetches Mesa 25 from
# bookworm-backports, the Vulkan loader and its headers, from MIRROR or the mirror that this
# machine's own apt uses. Mesa 26 and later need no such thing:
# apt install mesa-vulkan-drivers libvulkan1.
set -euo pipefail

if [[ $# -ne 1 ]]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$1"/{apt/lists/partial,apt/archives/partial,debs,layers}
dir=$(cd "$1" && pwd)

# apt with lists and sources of its own, so that the system's stay as they are.
key=/usr/share/keyrings/debian-archive-keyring.gpg
mirror=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' | awk '!/security/ && !n++')}
for suite in bookworm bookworm-backports; do
    echo "deb [signed-by=$key] $mirror $suite main"
done >"$dir/apt/sources.list"
apt() {
    apt-get -q -o Dir::State::Lists="$dir/apt/lists" -o Dir::Cache="$dir/apt" \
        -o Dir::Etc::SourceList="$dir/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o APT::Sandbox::User=root "$@"
}
apt update
cd "$dir/debs"
backports=bookworm-backports
apt download libvulkan1 libvulkan-dev mesa-vulkan-drivers/$backports \
    libdrm2/$backports libdrm-amdgpu1/$backports
for deb in *.deb; do dpkg-deb -x "$deb" "$dir/unpacked"; done

libraries=$dir/unpacked/usr/lib/x86_64-linux-gnu
driver=$libraries/libvulkan_lvp.so
absent=$(LD_LIBRARY_PATH=$libraries ldd "$driver" | sed -n 's/ => not found//p' | tr -d '\t' | xargs)
if [[ -n $absent ]]; then
    echo "lavapipe: install the packages of $absent (apt-file search finds them)" >&2
    exit 1
fi
version=1.3.239
cat >"$dir/lvp.json" <<JSON
{"file_format_version": "1.0.0", "ICD": {"library_path": "$driver", "api_version": "$version"}}
JSON

layer=VK_LAYER_VLA_no_external_semaphore_fd
"${CC:-cc}" -O2 -Wall -Wextra -fPIC -shared -fvisibility=hidden -I"$dir/unpacked/usr/include" \
    "$here/lavapipe.c" -o "$dir/layers/liblayer.so"
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
export LD_LIBRARY_PATH=$libraries\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}
export VK_LAYER_PATH=$dir/layers VK_INSTANCE_LAYERS=$layer
SH
echo "ready: source $dir/env.sh"
