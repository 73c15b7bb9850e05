"""The one record of an episode, from the simulator's process to the report.

A row is a line of DIR/episodes.jsonl. What every simulator knows has a field of its own; what one
of them adds (a suite, a profile's statistics) stands under its name in `more` and beside the other
keys in the file.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Dict, Mapping, Optional, Tuple

# The fields that came later have defaults, so that rows of earlier versions still load.
REQUIRED = ("index", "task", "seed", "instruction", "success", "steps")
SUCCESS, FAILURE = "success", "failure"


@dataclass(frozen=True)
class Stage:
    """One task of a chain that was begun.

    Attributes:
        task: its name.
        success: whether it was solved.
        steps: actions taken.
        seconds: time it took.
    """

    task: str
    success: bool
    steps: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """How one attempt at an episode ended.

    Attributes:
        success: whether all of it was solved.
        steps: actions taken.
        stages: of a chain, the tasks that were begun.
        more: what else the simulator wants in the row, as JSON values.
    """

    success: bool
    steps: int
    stages: Tuple[Stage, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One episode: what was asked, how it ended, and how long the policy took.

    Attributes:
        index: number of the episode within the protocol.
        seed: where it started.
        task: what counts as success.
        instruction: what the policy was told.
        success: whether the task was solved, at the end or on the way as the simulator counts.
        steps: actions taken.
        seconds: time the episode took, of its last attempt and those before it.
        first_frame: hash of the first observation's images; "" where there is none.
        round_trip_ms: of each request, as the client saw it.
        server_ms: of each request, inside the server.
        jerk: mean length of the second difference of the arm's commands, in robot units a control
            step squared: where commands are motions, of the third difference of the position; None
            of fewer than three commands.
        restarts: how often the connection dropped and the episode started over.
        error: why there is no outcome, of an episode lost to a crash of the simulator.
        video: path of its film, relative to the run's folder once it is stored.
        tasks: of a chain, all its tasks.
        stages: of a chain, those that were begun.
        more: what its simulator adds, by name.
    """

    index: int
    seed: int
    task: str
    instruction: str
    success: bool
    steps: int
    seconds: float = 0.0
    first_frame: str = ""
    round_trip_ms: Tuple[float, ...] = ()
    server_ms: Tuple[float, ...] = ()
    jerk: Optional[float] = None
    restarts: int = 0
    error: Optional[str] = None
    video: Optional[str] = None
    tasks: Tuple[str, ...] = ()
    stages: Tuple[Stage, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, episode: Any, outcome: Outcome, **measured: Any) -> Row:
        """The row of an episode that was attempted.

        Args:
            episode: dataclass with index, seed, task and instruction; its further fields are kept.
            outcome: how it ended.
            measured: further fields of the row.
        """
        values = dict(dataclasses.asdict(episode), **outcome.more)
        values.update(success=outcome.success, steps=outcome.steps, **measured)
        # `from_json` builds stages from JSON's maps, and these are built already.
        row = cls.from_json(values)
        return dataclasses.replace(row, stages=outcome.stages)

    @classmethod
    def crashed(cls, episode: Any, reason: str) -> Row:
        """The row of an episode whose simulator died."""
        return cls.of(episode, Outcome(success=False, steps=0), error=reason)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Row:
        """A row as it was written, by this version or an earlier one.

        Raises:
            ValueError: listing what is missing.
        """
        missing = sorted(set(REQUIRED) - set(values))
        if missing:
            raise ValueError("no {}".format(", ".join(missing)))
        names = {f.name for f in dataclasses.fields(cls)} - {"more", "stages"}
        fields = {key: value for key, value in values.items() if key in names}
        # JSON knows lists alone, and a frozen row must hold what nobody can change.
        for key in ("round_trip_ms", "server_ms", "tasks"):
            fields[key] = tuple(fields.get(key, ()))
        stages = (
            Stage(s["task"], s["success"], s.get("steps", 0), s.get("seconds", 0.0))
            for s in values.get("stages", ())
        )
        # Unknown keys are kept, because merging writes the rows of any simulator again.
        more = {k: v for k, v in values.items() if k not in names and k != "stages"}
        return cls(**fields, stages=tuple(stages), more=more)

    def to_json(self) -> Dict[str, Any]:
        """The row as one JSON object; a chain's keys and a film's only where there is one."""
        values = dataclasses.asdict(self)
        more = values.pop("more")
        for key in ("video", "tasks", "stages"):
            if not values[key]:
                del values[key]
        if self.jerk is None:
            del values["jerk"]
        return {**values, **more}

    @property
    def key(self) -> Tuple[int, int, str]:
        """The episode, by which rows of two runs are paired."""
        return self.index, self.seed, self.task

    @property
    def result(self) -> str:
        """`SUCCESS` or `FAILURE`."""
        return SUCCESS if self.success else FAILURE

    @property
    def tried(self) -> Tuple[Stage, ...]:
        """The tasks that were begun: the episode's own, or those of a chain."""
        return self.stages or (Stage(self.task, self.success, self.steps, self.seconds),)

    @property
    def solved_in_a_row(self) -> int:
        """Tasks of a chain that were solved before the first failure."""
        # A chain ends with its first failure, so all its successes are in a row.
        return sum(1 for stage in self.stages if stage.success)
