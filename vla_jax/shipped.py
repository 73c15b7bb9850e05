"""Where the files that come with the package are, in a checkout and in an installed wheel alike.

`configs/` and `launch/` lie at the top of a checkout and are linked into the package, so that a
wheel carries them as `vla_jax.configs` and `vla_jax.launch`. Nobody has to know the path of an
installed package: `--config=quickstart` names a shipped config from any folder.
"""

import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CONFIGS = PACKAGE / "configs"
DISTRIBUTION = "vla_jax"


def config_names() -> list[str]:
    """Names of the shipped configs, sorted, without `.py`."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if not path.stem.startswith("_"))


def config_path(where: str) -> str:
    """A config by file or by name -> its file, with the argument behind a colon kept.

    Args:
        where: `FILE.py`, `FILE.py:ARGUMENT`, or the name of a shipped config in place of the file,
            also with the `configs/` and `.py` that a checkout's commands have.
    """
    path, colon, argument = where.partition(":")
    name = re.sub(r"^configs/|\.py$", "", path)
    # A file of the user's goes first, even under the name of a shipped config.
    if not Path(path).is_file() and name in config_names():
        path = str(CONFIGS / f"{name}.py")
    return path + colon + argument


def with_config_path(argv: Sequence[str]) -> list[str]:
    """A command line whose `--config=NAME` names a file, as `ml_collections` wants it."""
    is_value, result = False, []
    for word in argv:
        if is_value:  # the word behind a lone --config
            word, is_value = config_path(word), False
        elif word in ("--config", "-config"):
            is_value = True
        elif match := re.fullmatch(r"(--?config=)(.*)", word):
            word = match[1] + config_path(match[2])
        result.append(word)
    return result


def requirements() -> dict[str, list[str]]:
    """Extra -> what it needs, as setup.py lists it; the core's key is "".

    Raises:
        PackageNotFoundError: the package is not installed, not even in editable form.
    """
    needed: dict[str, list[str]] = {"": []}
    # An extra that needs nothing is named by no requirement.
    for extra in importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or ():
        needed[extra] = []
    for line in importlib.metadata.requires(DISTRIBUTION) or ():
        text, _, marker = (part.strip() for part in line.partition(";"))
        extra = re.search(r"extra == ['\"]([\w.-]+)['\"]", marker)
        needed[extra[1] if extra else ""].append(text)
    return needed


def install_hint(extra: str) -> str:
    """The command that installs an extra from where the user is.

    A checkout installs itself; a wheel came from a file that may be gone, so its requirements are
    named one by one. No index has a package of our name, and a stranger could publish one.
    """
    if (PACKAGE.parent / "setup.py").is_file():
        return f"pip install -e '{PACKAGE.parent}[{extra}]'"
    return "pip install " + " ".join(f"'{each}'" for each in requirements()[extra])
