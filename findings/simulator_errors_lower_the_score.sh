#!/usr/bin/env bash
# Packages: vla-eval 0.8.0, Python 3.10 or later (a harness that runs simulators against policies).
#
# A simulator can fail where the policy has no part in it: assets that are not installed, no display,
# a GPU that has gone. One would expect such episodes to be left out of the success rate or to be run
# again, and a run in which they happen to end with a status other than 0.
#
# What happens: an episode whose simulator raises before the policy is asked for anything counts as a
# failure of the policy, in the task's and in the overall "mean_success", and `vla-eval run` ends with
# 0, also where every episode went so. The number of such episodes stands beside the score
# ("num_errors"), and the reason in each of them, so a script that reads the score has to look there.
#
# Seen: of four episodes of a policy that always succeeds the simulator fails in two. Status 0,
# mean_success 0.5, num_errors 2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet vla-eval==0.8.0
cat > "$folder/reach.py" <<'EOF'
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.model_servers.serve import serve

FOLDER = Path(__file__).resolve().parent


class Specs:
    def get_action_spec(self):
        return {}

    def get_observation_spec(self):
        return {}


class Still(Specs, PredictModelServer):
    def predict(self, obs, ctx):
        return {"actions": [0.0]}


class Reach(Specs, StepBenchmark):
    """Solved at the first step; its simulator fails to start every second time."""

    starts = 0

    def get_tasks(self):
        return [{"name": "reach"}]

    def reset(self, task):
        self.starts += 1
        if self.starts % 2:
            raise RuntimeError("the simulator has no display")
        return 0

    def step(self, action):
        return StepResult(obs=0, reward=1.0, done=True, info={})

    def make_obs(self, raw_obs, task):
        return {"state": [0.0], "task_description": "reach"}

    def get_step_result(self, step_result):
        return {"success": True}


def main():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    benchmark = {"benchmark": "reach:Reach", "episodes_per_task": 4, "max_steps": 2}
    config = {"server": {"url": f"ws://127.0.0.1:{port}"}, "output_dir": str(FOLDER / "out")}
    (FOLDER / "config.yaml").write_text(json.dumps({**config, "benchmarks": [benchmark]}))
    server = subprocess.Popen([sys.executable, __file__, str(port)])
    try:
        for _ in range(150):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        command = [sys.executable, "-m", "vla_eval.cli.main", "run", "--no-docker", "-c"]
        done = subprocess.run(
            [*command, str(FOLDER / "config.yaml")],
            env={**os.environ, "PYTHONPATH": str(FOLDER)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    finally:
        server.kill()
    score = json.loads(next((FOLDER / "out").rglob("*_aggregate.json")).read_text())
    seen = (done.returncode, score["mean_success"], score["num_errors"])
    print(f"status {seen[0]}, mean_success {seen[1]}, num_errors {seen[2]}")
    raise SystemExit(0 if seen == (0, 0.5, 2) else "the behavior has changed")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(Still(), host="127.0.0.1", port=int(sys.argv[1]))
    else:
        main()
EOF
"$folder/venv/bin/python" "$folder/reach.py" 2>/dev/null
