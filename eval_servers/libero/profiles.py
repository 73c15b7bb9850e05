"""How published evaluations run LIBERO, as data.

Cabinets, stoves and racks are no part of an initial state: each reset places them anew, from
numpy's global generator. So its seed, and how often an environment has been reset before, decide
where a drawer is; see `simulator.Simulator.reset`.

Sources: openpi (github.com/Physical-Intelligence/openpi, examples/libero/main.py) and openvla
(github.com/openvla/openvla, experiments/robot/libero/run_libero_eval.py).
"""

from __future__ import annotations

from typing import NamedTuple


class Profile(NamedTuple):
    """One way to run an evaluation.

    Attributes:
        seed: of the generator, set after a task's world is made.
        execute_steps: actions of a chunk that are executed before the policy is asked again.
        settle: steps without motion and with open fingers, before the policy sees anything.
        size: height and width of both pictures in pixels; what the policy makes of them is its own.
    """

    seed: int
    execute_steps: int
    settle: int = 10
    size: int = 256


PROFILES = {
    "openpi": Profile(seed=7, execute_steps=5),
    "openvla": Profile(seed=0, execute_steps=1),
}
