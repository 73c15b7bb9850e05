#!/usr/bin/env bash
# Make the Python environment in which SimplerEnv is evaluated.
#
#   eval_servers/simpler/setup.sh VENV [REAL2SIM]
#
# VENV      folder of the environment to make, outside of this repository's own
# REAL2SIM  a ManiSkill2_real2sim source tree; cloned there (one commit) if the folder does not
#           exist; default: VENV/ManiSkill2_real2sim
#
# PYTHON chooses the interpreter (3.9 to 3.11: sapien 2 has no wheels beyond); default: python3.
# Drawing needs Vulkan: a GPU's own driver, or see lavapipe.sh.
set -euo pipefail

if [[ $# -lt 1 || $# -gt 2 ]]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$1
tree=${2:-$venv/ManiSkill2_real2sim}
python=${PYTHON:-python3}
commit=ef7a4d4fdf4b69f2c2154db5b15b9ac8dfe10682

# shellcheck source=eval_servers/setup_common.sh
source "$here/../setup_common.sh"
check_python "$python" 9 11 "simpler: sapien has wheels"
make_venv "$python" "$venv" \
    --only-binary :all: -r "$here/requirements.txt"
get_tree ManiSkill2_real2sim https://github.com/simpler-env/ManiSkill2_real2sim.git "$commit" \
    "$tree" mani_skill2_real2sim/envs/sapien_env.py
# What follows is run from the repository.
venv=$(cd "$venv" && pwd)
tree=$(cd "$tree" && pwd)

# One picture tells whether it works.
cd "$here/../.."
"$venv/bin/python" -m eval_servers.simpler.probe --real2sim="$tree"
echo "ready: REAL2SIM=$tree $venv/bin/python eval_servers/simpler/rollout.py ..."
