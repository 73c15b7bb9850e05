#!/usr/bin/env bash
# Packages: jax and jaxlib 0.10.2, numpy 2.4.6, Python 3.11 or later. The same was seen with 0.12.0.1.
#
# jax's persistent compilation cache, of which one entry has lost its last bytes, as when a machine goes
# down or a quota is reached while it is copied. One would expect the program that is compiled in its place
# to be written over it, so that the next start has it again.
#
# What happens: the entry cannot be read, which is said in a warning, the program is compiled and the
# result is right; but nothing is written, as an entry of this name is there. So every later process warns
# and compiles anew, for good, until somebody removes the file. The warning says neither that nor which
# file it is.
#
# Seen, warnings and whether the entry is whole again: with the whole entry 0; after the cut 1 and no, in
# each of three further processes; with the entry removed 0, and it is written and as large as before.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$folder/start.py" <<'EOF'
import sys
import warnings

import jax
import jax.numpy as jnp

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    total = float(jax.jit(lambda x: jnp.sin(x @ x).sum())(jnp.zeros((64, 64))))
assert total == 0.0
print(sum("persistent compilation cache" in str(each.message) for each in told))
EOF
cat > "$folder/show.py" <<'EOF'
import subprocess
import sys
from pathlib import Path

folder = Path(sys.argv[1])
cache = folder / "cache"


def start():
    command = [sys.executable, folder / "start.py", cache]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def entry():
    return max(cache.glob("jit__lambda*-cache"), key=lambda file: file.stat().st_size)


rows = [start()]
whole = entry().stat().st_size
rows.append(start())
print(f"an entry of {whole} bytes; warnings of the first two starts: {rows}")
entry().write_bytes(entry().read_bytes()[:-100])
cut = [(start(), entry().stat().st_size == whole) for _ in range(3)]
print(f"cut short; warnings of each further start, and whether the entry is whole: {cut}")
entry().unlink()
again = (start(), entry().stat().st_size == whole)
print(f"removed; the same: {again}")
expected = rows == [0, 0] and cut == [(1, False)] * 3 and again == (0, True)
raise SystemExit(0 if expected else "the behavior has changed")
EOF
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py" "$folder"
