#!/usr/bin/env bash
# Make the Python environment in which CALVIN is evaluated.
#
#   eval_servers/calvin/setup.sh VENV [CALVIN_ENV]
#
# VENV        folder of the environment to make, outside of this repository's own
# CALVIN_ENV  a calvin_env source tree; cloned there (one commit) if the folder does not exist;
#             default: VENV/calvin_env
#
# PYTHON chooses the interpreter (3.8 to 3.11: pybullet has no wheels beyond); default: python3.
set -euo pipefail

if [[ $# -lt 1 || $# -gt 2 ]]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$1
tree=${2:-$venv/calvin_env}
python=${PYTHON:-python3}
commit=797142c588c21e76717268b7b430958dbd13bf48

# shellcheck source=eval_servers/setup_common.sh
source "$here/../setup_common.sh"
check_python "$python" 8 11 "calvin: pybullet has wheels"
make_venv "$python" "$venv" \
    --only-binary pybullet,numpy,scipy,numpy-quaternion,opencv-python-headless -r "$here/requirements.txt"
get_tree calvin_env https://github.com/mees/calvin_env.git "$commit" \
    "$tree" calvin_env/envs/play_table_env.py
# What follows is run from the repository.
venv=$(cd "$venv" && pwd)
tree=$(cd "$tree" && pwd)

# One picture tells whether it works; without an EGL driver the tiny renderer still does.
cd "$here/../.."
for renderer in egl tiny; do
    if "$venv/bin/python" -m eval_servers.calvin.probe --calvin-env="$tree" --renderer=$renderer; then
        echo "ready: CALVIN_ENV=$tree $venv/bin/python eval_servers/calvin/rollout.py --renderer=$renderer ..."
        exit 0
    fi
done
exit 1
