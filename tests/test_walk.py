"""How far it is from the jitted step to an attention layer, and imports that point down."""

import ast
from pathlib import Path

import pytest

from bench import walk

ROOT = Path(__file__).resolve().parents[1]
# From the ground up; what stands in one row knows nothing of its neighbors.
FLOORS = (
    (
        "cameras",
        "commands",
        "compilation_cache",
        "config",
        "files",
        "moved",
        "progress",
        "refusal",
        "rules",
        "shipped",
        "types",
        "workers",
    ),
    ("models", "data"),
    ("train", "convert", "inference"),
    ("serve", "plan"),
    ("configs", "launch", "cli"),
)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    return walk.walk(tmp_path_factory.mktemp("index"))


def test_few_calls_lie_between_the_step_and_attention(watched):
    assert watched.seen == set(walk.STATIONS)
    assert set(watched.depths) >= {"VisionTransformer.__call__", "Decoder.run"}
    assert max(len(way) for way in watched.depths.values()) <= 10, watched.depths


def test_few_files_lie_between_a_sample_number_and_the_loss(watched):
    assert len(watched.first) <= 10, watched.first
    assert len(watched.way) <= 18, watched.way


def imports() -> dict[str, set[str]]:
    """Module of ours -> the modules of ours it imports, in functions too; names as `a.b.c`."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "vla_jax").rglob("*.py")
        if not path.is_symlink()
    }
    collected: dict[str, set[str]] = {}
    for module, path in files.items():
        collected[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                # `from a.b import c` may mean a module c or a name within b.
                holder = name if name in files else name.rpartition(".")[0]
                if holder in files:
                    collected[module].add(holder)
    return collected


def floor(module: str) -> int:
    room = module.split(".")[1]
    floors = [i for i, rooms in enumerate(FLOORS) if room in rooms]
    assert floors, f"{room} is on none of the FLOORS: say where it belongs"
    return floors[0]


def test_imports_point_down():
    upward, across = [], []
    for module, targets in imports().items():
        if module == "vla_jax":  # the public names of all floors, lazily
            continue
        for target in targets - {"vla_jax"}:
            if floor(target) > floor(module):
                upward.append(f"{module} -> {target}")
            rooms = {module.split(".")[1], target.split(".")[1]}
            if rooms == {"models", "data"}:
                across.append(f"{module} -> {target}")
    assert not upward
    assert not across


def test_no_imports_go_in_circles():
    graph = imports()
    left = {module: set(targets) - {module} for module, targets in graph.items()}
    # Taking away what imports nothing else, again and again, leaves the circles.
    while ready := [module for module, targets in left.items() if not targets]:
        for module in ready:
            del left[module]
        for targets in left.values():
            targets.difference_update(ready)
    assert not left
