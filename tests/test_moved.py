"""What stood elsewhere in version 0.1 is imported from there as before, with a warning."""

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from vla_jax import moved

# Names that stood in modules which are packages or hold a class by now, of each module one or more.
NAMES = [
    ("vla_jax.convert.hf", "open_source", "vla_jax.convert.hf.source"),
    ("vla_jax.convert.robovlms", "open_source", "vla_jax.convert.robovlms.source"),
    ("vla_jax.data.calvin", "open_calvin", "vla_jax.data.calvin.source"),
    ("vla_jax.data.dataset", "open_dataset", "vla_jax.data.open_dataset"),
    ("vla_jax.data.lerobot", "open_lerobot", "vla_jax.data.lerobot.source"),
    ("vla_jax.data.rlds.records", "_fields", "vla_jax.data.rlds.records:message_fields"),
    ("vla_jax.models.backbones.llava", "RENAMES", "vla_jax.models.backbones.llava:Llava"),
    (
        "vla_jax.models.backbones.paligemma",
        "RENAMES",
        "vla_jax.models.backbones.paligemma:PaliGemma",
    ),
    ("vla_jax.models.structures", "splice", "vla_jax.models.structures.splicing"),
    ("vla_jax.models.towers", "siglip", "vla_jax.models.towers.vision_families"),
]


def _fresh(code):
    """Runs code in a process that has imported nothing of the package."""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("old", sorted(moved.MODULES))
def test_an_old_module_is_the_new_one(old):
    sys.modules.pop(f"vla_jax.{old}", None)
    new = f"vla_jax.{moved.MODULES[old]}"
    with pytest.warns(FutureWarning, match=f"vla_jax.{old} is now {new}"):
        result = importlib.import_module(f"vla_jax.{old}")
    assert result is importlib.import_module(new)
    assert [result.__name__, getattr(result.__spec__, "name", "")] == [new, new]
    path = Path(moved.__file__).parent / old.replace(".", "/")
    assert not any(p.exists() for p in (path, path.with_suffix(".py")))


def test_the_table_has_each_module_once():
    assert {module.removeprefix("vla_jax.") for module, _, _ in NAMES} == moved.NAMES.keys()
    assert not moved.MODULES.keys() & set(moved.MODULES.values())


@pytest.mark.parametrize(("module", "name", "new"), NAMES)
def test_an_old_name_is_the_new_one(module, name, new):
    home, _, holder = new.partition(":")
    meant = importlib.import_module(home)
    with pytest.warns(FutureWarning, match=f"{module}.{name} is now"):
        result = getattr(importlib.import_module(module), name)
    expected = getattr(meant, holder) if holder else meant
    assert result is getattr(expected, name, expected)


def test_what_neither_has_is_missing():
    from vla_jax.data import lerobot

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hasattr(lerobot, "no_such_name")
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("vla_jax.data.no_such_module")


def test_statements_of_all_forms():
    done = _fresh(
        "from vla_jax.data import records, gripper\n"
        "import vla_jax.data.writer\n"
        "from vla_jax.data.lerobot import open_lerobot, rows\n"
        "import vla_jax.data.rlds.records as new\n"
        "assert records is new and vla_jax.data.writer.RLDSWriter and rows.copy_rows\n"
    )
    warned = [line for line in done.stderr.splitlines() if "FutureWarning" in line]
    # The places are those of the statements.
    lines = [line.split(":")[:2] for line in warned]
    assert lines == [["<string>", str(number)] for number in (1, 1, 2, 3)], done.stderr


def test_the_package_itself_uses_no_old_path():
    done = _fresh("import vla_jax.data.mixture, vla_jax.convert.importing, vla_jax.models.vla")
    assert "FutureWarning" not in done.stderr
