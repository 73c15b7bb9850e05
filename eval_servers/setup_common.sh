# shellcheck shell=bash
# What the simulators' setup.sh share; sourced by them, not run.

# check_python PYTHON LOW HIGH WHAT: stop unless PYTHON is of version 3.LOW to 3.HIGH.
check_python() {
    "$1" - "$2" "$3" "$4" <<'PY'
import sys

low, high = int(sys.argv[1]), int(sys.argv[2])
if not (3, low) <= sys.version_info[:2] <= (3, high):
    sys.exit(
        "{} for Python 3.{} to 3.{}, this is {}.{}: set PYTHON".format(
            sys.argv[3], low, high, *sys.version_info[:2]
        )
    )
PY
}

# make_venv PYTHON VENV FLAGS...: an environment, unless there is one, with what pip is told.
make_venv() {
    local python=$1 venv=$2
    shift 2
    [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

# get_tree NAME URL COMMIT FOLDER FILE: clone one commit, unless the folder exists; FILE shows that
# it is the right one. An interrupted clone leaves nothing behind that would pass for it.
get_tree() {
    local name=$1 url=$2 commit=$3 folder=$4 file=$5
    if [[ ! -e $folder ]]; then
        rm -rf "$folder.part"
        git clone --quiet "$url" "$folder.part"
        git -C "$folder.part" checkout --quiet "$commit"
        mv "$folder.part" "$folder"
    fi
    if [[ ! -f $folder/$file ]]; then
        echo "$folder is no $name source tree" >&2
        return 1
    fi
}
