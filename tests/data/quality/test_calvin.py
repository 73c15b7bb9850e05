"""The checks of quality on a CALVIN download: frames in files of their own, annotated spans."""

import pytest

from tests.data.look_alikes import START, calvin_frame, write_calvin_npz
from vla_jax.data.find_spec import find_spec
from vla_jax.data.inspection import inspect
from vla_jax.data.quality.check import check

# The third annotation is frames 60 to 74, the only ones behind this.
LAST = START + 60


@pytest.fixture
def find(tmp_path):
    """Looks at a download in which each of some frames is another."""

    def run(change=lambda number, frame: {}):
        def made(number):
            frame = calvin_frame(number)
            return frame | change(number, frame)

        folder = write_calvin_npz(tmp_path / "task_B_B", splits=("training",), frame=made)
        report = inspect("calvin", find_spec("calvin"), folder, cache_dir=str(tmp_path / "cache"))
        quality = check(report.dataset)
        assert {role: observed["frames"] for role, observed in quality.looked_at.items()} == {
            "primary": 50,
            "wrist": 50,
        }
        return [(issue.check, issue.camera, issue.episodes) for issue in quality.issues]

    return run


def test_a_sound_download_has_no_issues(find):
    assert find() == []


def frozen(number, frame):
    return {"rgb_gripper": calvin_frame(LAST)["rgb_gripper"]} if number >= LAST else {}


def black(number, frame):
    return {"rgb_static": frame["rgb_static"] * 0} if number >= LAST else {}


def still(number, frame):
    frame["rel_actions"][-1] = 1
    return {}


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (frozen, ("camera_frozen", "wrist", (2,))),
        (black, ("camera_black", "primary", (2,))),
        (still, ("gripper_still", "", ())),
    ],
)
def test_faults_are_named(find, fault, expected):
    assert find(fault) == [expected]
