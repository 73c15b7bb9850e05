"""What starts several processes: the local launcher and, with stand-ins, scripts of clusters."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch import local
from vla_jax.train.runtime import multi_process

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def test_environments_of_local_processes():
    env = local.environment(1, 2, "127.0.0.1:5", devices=4, gpus=8, env={"XLA_FLAGS": "--a"})
    assert env["XLA_FLAGS"] == "--a --xla_force_host_platform_device_count=4"
    assert env["JAX_LOCAL_DEVICE_IDS"] == "4,5,6,7"
    assert env["JAX_PROCESS_ID"] == "1"
    assert multi_process(env)


def sleeper(seconds, status=0):
    code = f"import sys, time; time.sleep({seconds}); sys.exit({status})"
    return subprocess.Popen([sys.executable, "-c", code])


def test_one_that_fails_ends_the_others():
    began = time.monotonic()
    assert local.wait([sleeper(60), sleeper(0, 3)], grace=0.5) == 3
    assert time.monotonic() - began < 20
    assert local.wait([sleeper(0), sleeper(0)]) == 0


def test_a_signal_reaches_every_process(tmp_path):
    """The launcher's own processes, with a train.py that says who it is and waits."""
    (tmp_path / "train.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "open(f'{sys.argv[1]}/here' + os.environ['JAX_PROCESS_ID'], 'w').close()\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "local.py").write_text((LAUNCH / "local.py").read_text())
    command = [sys.executable, str(tmp_path / "local.py"), "--processes=2", "--", str(tmp_path)]
    started = subprocess.Popen(command)
    for _ in range(300):
        if len(list(tmp_path.glob("here*"))) == 2:
            break
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    assert started.wait(timeout=30) == 0


def test_flags_that_cannot_be():
    for flags in (["--processes=0"], ["--processes=3", "--gpus=8"]):
        with pytest.raises(SystemExit):
            local.main(flags)


def stand_in(folder, name, text):
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path):
    """Slurm's commands as scripts that write down what they were asked, and a job's variables."""
    stand_in(tmp_path, "srun", 'echo "srun $JAX_LOCAL_DEVICE_IDS $*" >> asked; exec bash -c "$DO"')
    stand_in(tmp_path, "scontrol", 'echo "scontrol $*" >> asked')
    return {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_GPUS_ON_NODE": "8",
    }


@pytest.mark.parametrize(
    ("do", "restarts", "status", "requeued"),
    [("true", 0, 0, False), ("exit 9", 0, 9, True), ("exit 9", 20, 9, False)],
)
def test_the_slurm_script(slurm, tmp_path, do, restarts, status, requeued):
    env = {**slurm, "DO": do, "SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run([LAUNCH / "slurm.sh", "--workdir=x"], env=env, capture_output=True)
    assert done.returncode == status
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("srun 0,1,2,3,4,5,6,7 --kill-on-bad-exit=1 ")
    assert "launch/train.py --workdir=x" in asked
    assert ("scontrol requeue 7" in asked) == requeued


def test_a_slurm_job_that_is_told_to_stop_is_queued_again(slurm, tmp_path):
    env = {**slurm, "DO": "trap 'exit 0' TERM; echo up >> asked; sleep 60 & wait"}
    started = subprocess.Popen([LAUNCH / "slurm.sh"], env=env)
    for _ in range(300):
        if (tmp_path / "asked").exists() and "up" in (tmp_path / "asked").read_text():
            break
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    assert started.wait(timeout=30) == 0
    assert "scontrol requeue 7" in (tmp_path / "asked").read_text()


@pytest.mark.parametrize("endpoints", ["10.0.0.2,10.0.0.3", "a:0:10.0.0.2,a:1:10.0.0.3"])
def test_the_tpu_script(tmp_path, endpoints):
    """The command of gcloud runs here, the metadata server is a script, and train.py says all."""
    home = tmp_path / "home"
    python = home / "vla_jax" / ".venv" / "bin"
    python.mkdir(parents=True)
    stand_in(python, "python", 'env | grep ^JAX_; echo "ran $*"')
    stand_in(tmp_path, "gcloud", 'for last; do :; done; bash -c "${last#--command=}"')
    stand_in(
        tmp_path, "curl", f'case "${{@: -1}}" in *endpoints) echo {endpoints};; *) echo 1;; esac'
    )
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(home)}
    command = [LAUNCH / "tpu_pod.sh", "pod", "zone", "--config=a b.py", "--workdir=gs://x"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "JAX_PROCESS_ID=1" in lines
    assert "JAX_NUM_PROCESSES=2" in lines
    assert "JAX_COORDINATOR_ADDRESS=10.0.0.2:8476" in lines
    assert "ran launch/train.py --config=a b.py --workdir=gs://x" in lines
    short = subprocess.run([LAUNCH / "tpu_pod.sh"], env=env, capture_output=True, text=True)
    assert short.returncode == 2
    assert "NAME ZONE" in short.stderr


def test_the_manifest_is_one_of_several_processes():
    manifest = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    (train,) = manifest["spec"]["replicatedJobs"]
    job = train["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    env = {each["name"]: each.get("value", "3") for each in container["env"]}
    assert multi_process(env)
    assert int(env["JAX_NUM_PROCESSES"]) == job["completions"] == job["parallelism"]
    port = container["ports"][0]["containerPort"]
    name = f"{manifest['metadata']['name']}-{train['name']}-0-0.{manifest['metadata']['name']}"
    assert env["JAX_COORDINATOR_ADDRESS"] == f"{name}:{port}"
    topology = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    assert chips == job["completions"] * container["resources"]["limits"]["google.com/tpu"]
