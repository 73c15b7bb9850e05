"""Collects parity figures and prints them as one table at the end."""

from pathlib import Path

import pytest

from tests.parity.table import Row, render

HERE = Path(__file__).resolve()
ROWS = pytest.StashKey[list[tuple[str, Row]]]()
FOLDERS = pytest.StashKey[list[Path]]()
WAITING = pytest.StashKey[dict[str, str]]()


def pytest_configure(config: pytest.Config):
    config.stash[ROWS], config.stash[WAITING] = [], {}
    config.stash[FOLDERS] = sorted(_folders(config.getoption("--fixtures")).values())
    config.parity_folders, config.parity_waiting = FOLDERS, WAITING  # type: ignore[attr-defined]


def _folders(given: str | None) -> dict[str, Path]:
    """Folder name -> path; by default those shipped, and a development set beside the repo."""
    root = HERE.parents[2]
    roots = (
        [Path(given)] if given else [root / "tests" / "fixtures", root.parent / "shared/fixtures"]
    )
    if given and not Path(given).is_dir():
        raise pytest.UsageError(f"--fixtures {given}: no such folder")
    collected: dict[str, Path] = {}
    for directory in roots:
        if directory.is_dir():
            for path in sorted(directory.iterdir()):
                if path.is_dir():
                    collected.setdefault(path.name, path)
    return collected


@pytest.fixture
def parity_rows(pytestconfig: pytest.Config) -> list[tuple[str, Row]]:
    return pytestconfig.stash[ROWS]


def pytest_terminal_summary(terminalreporter, config: pytest.Config):
    if config.stash[ROWS]:
        terminalreporter.section("parity, float32")
        terminalreporter.write_line(render(config.stash[ROWS], config.stash[WAITING]))
