"""Compiled programs that outlive a process: jax's persistent cache, bounded and in one place.

A program of full size compiles for minutes. Every restart of a run, of a server, or of a server
that an evaluation starts again, would pay them anew.
"""

import hashlib
import os
import platform
from pathlib import Path

MAX_BYTES = 8 * 2**30  # least recently used programs go first
VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def folder(setting: str = "auto") -> Path | None:
    """Where compiled programs are kept.

    Args:
        setting: "auto" is the environment's JAX_COMPILATION_CACHE_DIR, else ~/.cache/vla_jax/xla
            (under XDG_CACHE_HOME where that is set); "off" is none; else a folder.

    Returns:
        None where it is off, and with "auto" where this user has no home folder.
    """
    if setting == "off":
        return None
    if setting != "auto":
        return Path(setting).expanduser()
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        # A container's user may have neither HOME nor an entry in passwd.
        return None
    return root / "vla_jax" / "xla"


def enable(setting: str = "auto") -> Path | None:
    """Keep what this process compiles, and use what earlier ones have kept.

    Call it before the first compilation, and after `jax.distributed.initialize`.

    Returns:
        The folder; None where there is none.
    """
    import jax  # not with the module: `folder` is also asked where nothing is computed

    where = folder(setting)
    if where is None:
        # The environment may have turned it on.
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if setting == "auto" and os.environ.get(VARIABLE):
        return where  # jax has read it, and its bounds are the user's as well
    if jax.default_backend() == "cpu":
        # Machines with one home folder may have processors of several kinds.
        where = where / f"cpu-{_processor()}"
    jax.config.update("jax_compilation_cache_dir", str(where))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    return where


def _processor() -> str:
    """A short name for what instructions this processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        kind = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        # Other systems than Linux have no /proc.
        kind = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {kind}".encode()).hexdigest()[:8]
