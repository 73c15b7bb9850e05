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

"$python" - <<'PY' || exit 1
import sys

if not (3, 8) <= sys.version_info[:2] <= (3, 11):
    sys.exit(
        "calvin: pybullet has wheels for Python 3.8 to 3.11, this is {}.{}: set PYTHON".format(
            *sys.version_info[:2]
        )
    )
PY

[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --only-binary pybullet,numpy,scipy,numpy-quaternion,opencv-python-headless -r "$here/requirements.txt"

if [[ ! -e $tree ]]; then
    git clone --quiet https://github.com/mees/calvin_env.git "$tree"
    git -C "$tree" checkout --quiet "$commit"
fi
if [[ ! -f $tree/calvin_env/envs/play_table_env.py ]]; then
    echo "calvin: $tree is no calvin_env source tree" >&2
    exit 1
fi
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
