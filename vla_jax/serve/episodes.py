"""When an episode begins: what clients say of it, and a rule for those that say nothing.

openpi's client keeps one connection for fifty episodes of one instruction and its `reset` sends
nothing, so a policy with a history would start all but the first with the end of the one before.
The rule begins an episode only where both are seen:

* a pause: the client took three times as long as it mostly does before it asked again, and at least
  half a second. A simulator's reset takes seconds, executing a chunk always about the same time;
* a return: the robot is back where the episode began, in one move that no motion since explains.
  Looked at are those numbers of its state that ended further from their first value than twice
  their largest change between two requests; four of five must have come back by half or more. A
  client that sends no state is judged by its pictures, as one number: how much they differ.

A robot that is slow, waits or is paused has not moved meanwhile; one that drives home does so in
many requests; one whose network stalls goes on from where its chunk has led it. So none of them
loses its history. An episode that ends where it began cannot be told from a pause, and is not.

Of 7 changes of episodes in LIBERO 6 are seen, by state and by pictures, the seventh is that of a
policy which does not move; the thresholds were chosen on these. Inside episodes the return alone is
never seen, pauses left aside: 62 requests of LIBERO, 1028 of Bridge and a humanoid (at strides of 1
to 20 control steps).
"""

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from vla_jax.inference.protocol import IMAGE_KEYS, PROMPT_KEY, STATE_KEY

log = logging.getLogger(__name__)

AUTO, OFF = "auto", "off"
MIN_REQUESTS = 3  # of an episode before another may begin: fewer show no habit
MIN_PAUSE = 0.5  # seconds
LONGER = 3.0  # than the usual pause
RETURNED = 0.5  # of the way back
_MOST = 0.8  # of the numbers that went far
_SIDE = 8  # pictures are compared at this size


@dataclass(frozen=True)
class View:
    """What an observation shows of where the robot is.

    Attributes:
        values: the state's numbers, or the gray levels of small pictures.
        pictures: which of the two.
    """

    values: Float[np.ndarray, "n"]
    pictures: bool

    def differs(self, other: "View") -> Float[np.ndarray, "m"]:
        """How much from `other`: each number of a state, or pictures as a whole."""
        change = np.abs(self.values - other.values)
        return change.mean(keepdims=True) if self.pictures else change

    def like(self, other: "View") -> bool:
        """Whether the two can be compared."""
        return self.pictures == other.pictures and self.values.shape == other.values.shape


def view(obs: Mapping[str, Any]) -> View | None:
    """The robot's state, else its pictures; None of an observation with neither.

    Args:
        obs: under openpi's keys; not checked yet, so anything may stand there.
    """
    state = obs.get(STATE_KEY)
    if isinstance(state, np.ndarray) and state.ndim == 1 and state.dtype.kind in "fiu":
        return View(state.astype(np.float64), False) if np.isfinite(state).all() else None
    images = [obs.get(key) for key in IMAGE_KEYS.values()]
    small = [_small(x) for x in images if isinstance(x, np.ndarray) and x.dtype == np.uint8]
    readable = [x for x in small if x is not None]
    return View(np.concatenate(readable), True) if readable else None


def _small(image: np.ndarray) -> Float[np.ndarray, "n"] | None:
    if image.ndim != 3 or min(image.shape[:2]) < _SIDE:
        return None
    # Every few pixels are enough, and a tenth of the work.
    steps = [max(1, side // (8 * _SIDE)) for side in image.shape[:2]]
    pixels = image[:: steps[0], :: steps[1]]
    rows, columns = (side // _SIDE for side in pixels.shape[:2])
    blocks = pixels[: rows * _SIDE, : columns * _SIDE].reshape(_SIDE, rows, -1)
    # Whole rows first, which lie together in memory: this runs in the event loop at every request,
    # and a mean over all three axes of a block takes several times as long.
    sums = np.add.reduce(blocks.astype(np.float32), axis=1).reshape(_SIDE * _SIDE, -1)
    return np.add.reduce(sums, axis=1) / np.float32(rows * sums.shape[1])


@dataclass
class Evidence:
    """What one client has shown since its episode began.

    Attributes:
        first: of the episode.
        last: of the request before.
        largest: change between two requests, of each number.
        requests: so far.
    """

    first: View | None = None
    last: View | None = None
    largest: Any = 0.0
    requests: int = 0

    def add(self, current: View | None) -> None:
        """Note what a request of this episode shows."""
        self.requests += 1
        if current is None:
            return
        if self.first is None or self.last is None or not current.like(self.first):
            self.first, self.largest = current, 0.0
        else:
            self.largest = np.maximum(self.largest, current.differs(self.last))
        self.last = current

    def returned(self, current: View | None) -> bool:
        """Whether `current` is back at the first view, as no motion so far explains."""
        if (
            current is None
            or self.first is None
            or self.last is None
            or not current.like(self.first)
        ):
            return False
        away, home = self.last.differs(self.first), current.differs(self.first)
        # A single number of a state changes more evenly than what pictures show.
        further = 1.0 if current.pictures else 2.0
        # The rounding of numbers that stand still is no motion.
        far = (away > further * self.largest) & (away > 1e-6)
        return bool(far.any()) and float((home <= RETURNED * away)[far].mean()) >= _MOST


@dataclass
class Habit:
    """A client's pauses, from a reply to the next request, in all its episodes.

    Attributes:
        pauses: in seconds, the last ones.
    """

    pauses: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    def add(self, pause: float) -> None:
        """Note a pause within an episode."""
        if math.isfinite(pause):
            self.pauses.append(pause)

    def broken(self, pause: float) -> bool:
        """Whether a pause is none of those within an episode."""
        if not MIN_PAUSE <= pause < math.inf:  # nearly always, so the median is not asked for
            return False
        # The median, so that a few long pauses within an episode do not hide the one between two.
        usual = statistics.median(self.pauses) if self.pauses else math.inf
        return pause >= LONGER * usual


@dataclass
class Course:
    """One client's episodes as far as the server knows of them.

    Attributes:
        says: whether the client has ever said itself that an episode begins.
        episode: its name, where the client gives one.
        prompt: of the episode.
    """

    says: bool = False
    episode: str | None = None
    prompt: str | None = None
    evidence: Evidence = field(default_factory=Evidence)
    habit: Habit = field(default_factory=Habit)

    def begin(self) -> None:
        """Forget the episode, but not the client's habits."""
        self.prompt, self.evidence = None, Evidence()


class Episodes:
    """The rule of one server."""

    def __init__(self, choice: str = AUTO, remembers: bool = False) -> None:
        """Choose the rule.

        Args:
            choice: `AUTO`, `OFF`, or how many seconds without a request begin an episode.
            remembers: whether a missed beginning would change the policy's actions.

        Raises:
            ValueError: none of these.
        """
        self._choice, self._warns = choice, remembers
        self._seconds = seconds_of(choice)

    def to_json(self) -> dict[str, Any]:
        """What the server says of it to its clients."""
        silent = {
            AUTO: f"a pause {LONGER:g} times as long as usual, {MIN_PAUSE:g} s at least, after"
            " which the robot is back where its episode began",
            OFF: "nothing",
        }
        return {
            "begin": "a connection, another prompt, a reset, another episode_id",
            "reset": ['{"endpoint": "reset"}', '{"__ctrl__": "episode_start"}'],
            "silent_clients": silent.get(self._choice, f"{self._choice} s without a request"),
        }

    def begins(
        self, course: Course, obs: Mapping[str, Any], episode: str | None, pause: float
    ) -> bool:
        """Whether this request is the first of an episode; `course` is kept up to date.

        Args:
            course: of the client.
            obs: under openpi's keys, not checked yet.
            episode: name of the episode, where the client gives one.
            pause: seconds between the last reply and this request.
        """
        course.says |= episode is not None
        prompt = obs.get(PROMPT_KEY)
        # Nobody asks for what is seen where the client speaks, or the clock alone decides.
        looks = self._choice == AUTO and not course.says
        current = view(obs) if looks else None
        same = not isinstance(prompt, str) or prompt == course.prompt
        begins = not same or episode != course.episode
        if not begins and not course.says and self._silent(course, current, pause):
            log.info("an episode begins: %.1f s after the last reply", pause)
            begins = True
        if begins:
            course.begin()
        else:
            course.habit.add(pause)
        course.prompt = prompt if isinstance(prompt, str) else course.prompt
        course.episode = episode
        course.evidence.add(current)
        return begins

    def _silent(self, course: Course, current: View | None, pause: float) -> bool:
        if self._seconds is not None:
            return math.isfinite(pause) and pause >= self._seconds
        if course.evidence.requests < MIN_REQUESTS or not course.habit.broken(pause):
            return False
        if self._choice == AUTO and course.evidence.returned(current):
            return True
        if self._warns:
            self._warns = False  # once is enough
            log.warning(
                "a client paused for %.1f s and says nothing of episodes: its history goes on. If "
                "one ended there, let it send a reset or an episode_id, or set --new-episode",
                pause,
            )
        return False


def seconds_of(choice: str) -> float | None:
    """The seconds of a choice, None of `AUTO` and `OFF`.

    Raises:
        ValueError: it is neither of these nor a positive number.
    """
    if choice in (AUTO, OFF):
        return None
    try:
        seconds = float(choice)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"new_episode: {choice!r} is neither auto, off nor a number of seconds")
    return seconds
