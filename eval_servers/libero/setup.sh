#!/usr/bin/env bash
# Make the Python environment in which LIBERO and LIBERO-PRO are evaluated; 2 GB, from PyPI alone.
#
#   eval_servers/libero/setup.sh VENV
#
# VENV  folder of the environment to make, outside of this repository's own
#
# PYTHON chooses the interpreter (3.10 or 3.11: mujoco 2.3.7 has no wheels beyond); default: python3.
# Drawing needs EGL (Debian: libegl1 libgl1-mesa-dri, or a GPU's own driver) or libosmesa6.
set -euo pipefail

if [[ $# -ne 1 ]]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$1
python=${PYTHON:-python3}

# shellcheck source=eval_servers/setup_common.sh
source "$here/../setup_common.sh"
check_python "$python" 10 11 "libero: mujoco 2.3.7 has wheels"
make_venv "$python" "$venv" --only-binary mujoco,numpy,numba,scipy,opencv-python -r "$here/requirements.txt"
# What follows is run from the repository.
venv=$(cd "$venv" && pwd)

# One picture tells whether it works; without an EGL driver OSMesa may still do.
cd "$here/../.."
for renderer in egl osmesa; do
    if "$venv/bin/python" -m eval_servers.libero.probe --renderer=$renderer; then
        echo "ready: $venv/bin/python eval_servers/libero/rollout.py --renderer=$renderer ..."
        exit 0
    fi
done
exit 1
