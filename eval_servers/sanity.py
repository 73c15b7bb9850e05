"""Does the policy see, listen, and speak the robot's units? Asked before a long evaluation.

Most wrong scores come from a few mistakes that run without an error: an image that never reaches
the network, an instruction that is cut away, statistics of another dataset, a gripper that opens
when it should close. Each shows within a few dozen requests, on the simulator's own first frames.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from eval_servers.client import ActionChunks
from eval_servers.episode import ActionError, Episode, control_steps, select
from eval_servers.findings import Finding

STEPS = 24  # of each of the episodes that are begun
EPISODES = 3
INSTRUCTIONS = 6  # tried on the first frame
# Tried where the evaluation has a single instruction.
MADE_UP = "turn off the light, then close the drawer"
_NOTHING = 1e-6  # change, in action ranges, that counts as none
_NARROW = 0.2  # robot units; of ranges near [-1, 1] un-normalizing once or twice is the same
_LITTLE = 0.01  # change that a policy which looks or listens should exceed


@dataclass
class Answers:
    """Answers of the policy; arrays are chunks [f, a] in robot units.

    Attributes:
        plain: to the first frame, asked several times, each with an empty history.
        black_white: (to black, to white images) in all cameras, under "", or in one alone.
        told: another instruction -> answer on the first frame.
        rolled: all answers while a few episodes were begun.
        refusal: what the simulator said of an action it could not take.
    """

    plain: List[np.ndarray] = field(default_factory=list)
    black_white: Dict[str, Tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    told: Dict[str, np.ndarray] = field(default_factory=dict)
    rolled: List[np.ndarray] = field(default_factory=list)
    refusal: str = ""

    def everything(self) -> np.ndarray:
        """All actions, [n, a]."""
        pairs = [answer for pair in self.black_white.values() for answer in pair]
        parts = [*self.plain, *pairs, *self.told.values(), *self.rolled]
        return np.concatenate(parts, axis=0)


def check(env: Any, client: Any, episodes: Sequence[Episode], steps: int = STEPS) -> List[Finding]:
    """Ask the policy and judge its answers.

    Args:
        env: adapter of the simulator, see `eval_servers.episode.Env`.
        client: `PolicyClient`.
        episodes: of the evaluation; the first few, of different instructions, are begun.
        steps: of each.

    Raises:
        PolicyServerError, SessionLostError: as `PolicyClient.infer`.
    """
    answers = ask(env, client, episodes, steps)
    gripper, arm_range = getattr(env, "gripper", None), getattr(env, "arm_range", None)
    return judge(answers, client.metadata, gripper, arm_range)


def ask(env: Any, client: Any, episodes: Sequence[Episode], steps: int) -> Answers:
    """Collect the answers; see `check`."""
    # Reversed, so that the first episode of each instruction is the one that stays.
    distinct = {episode.instruction: episode for episode in reversed(episodes)}
    ordered = sorted(distinct.values(), key=lambda episode: episode.index)
    begun, answers = ordered[:EPISODES], Answers()
    obs = select(env.reset(begun[0]), client.metadata)
    cameras = [key for key, value in obs.items() if getattr(value, "ndim", 0) == 3]

    def answer(instruction: str, **images: np.ndarray) -> np.ndarray:
        # An empty history each time, so that answers differ by their inputs alone.
        client.reset()
        return _actions(client.infer(dict(obs, **images, prompt=instruction)))

    instruction = env.told(begun[0])
    # Asked three times because a sampling policy moves by itself; that is the noise floor.
    answers.plain = [answer(instruction) for _ in range(3)]
    groups = {"": cameras, **({camera: [camera] for camera in cameras} if cameras[1:] else {})}
    for name, group in groups.items():
        black = {camera: np.zeros_like(obs[camera]) for camera in group}
        white = {camera: np.full_like(obs[camera], 255) for camera in group}
        answers.black_white[name] = answer(instruction, **black), answer(instruction, **white)
    other_texts = [
        e.instruction for e in ordered[:INSTRUCTIONS] if e.instruction not in ("", instruction)
    ]
    for text in other_texts or [MADE_UP]:
        answers.told[text] = answer(text)
    try:
        for episode in begun:
            answers.rolled += _roll(env, client, episode, steps)
    except ActionError as error:
        answers.refusal = str(error)
    return answers


def judge(
    answers: Answers,
    metadata: Dict[str, Any],
    gripper: Optional[Dict[str, float]] = None,
    arm_range: Optional[Tuple[float, float]] = None,
) -> List[Finding]:
    """Judge the answers, one finding a question.

    Args:
        answers: see `Answers`.
        metadata: of the server.
        gripper: the simulator's commands, {"closed": ..., "open": ...}, if it says.
        arm_range: (lowest, highest) arm number that the simulator takes, if it says.
    """
    commands = metadata.get("gripper") or gripper
    low, high = _bounds(metadata, answers)
    scale = np.append(high - low, abs(commands["open"] - commands["closed"]) if commands else 1.0)
    scale = scale[: answers.everything().shape[1]]  # some robots have no gripper
    scale = np.where(scale > 0, scale, np.inf)  # of constant dimensions nothing can be said

    def change(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.max(np.abs(a - b) / scale))

    # What an unchanged input already does; a smaller effect than twice this proves nothing.
    noise = max(change(answers.plain[0], other) for other in answers.plain)
    findings = [_image(answers, change, noise), _instruction(answers, change, noise)]
    findings += _cameras(answers, change, noise)
    findings.append(_range(answers.everything(), metadata))
    findings.append(_units(answers, low, high, arm_range))
    findings.append(_polarity(metadata.get("gripper"), gripper))
    findings.append(_grip(answers.rolled, metadata))
    return findings


def _image(answers: Answers, change: Any, noise: float) -> Finding:
    moved = change(*answers.black_white[""])
    text = "black against white images move the action by {}".format(_percent(moved))
    if moved <= max(_NOTHING, 2 * noise):
        return Finding(
            "image",
            "fail",
            text + _floor(noise),
            "the images do not reach the network: look at the camera names (policy's metadata"
            " 'cameras'), at the weights of the vision tower and its connector, and at the image's"
            " scaling",
        )
    if moved < _LITTLE:
        return Finding(
            "image",
            "warn",
            text,
            "the policy hardly looks: is it trained, or does it answer the mean of its data?",
        )
    return Finding("image", "ok", text)


def _cameras(answers: Answers, change: Any, noise: float) -> List[Finding]:
    blind = [
        name
        for name, pair in answers.black_white.items()
        if name and change(*pair) <= max(_NOTHING, 2 * noise)
    ]
    if not blind or blind == [name for name in answers.black_white if name]:
        return []  # of all of them `_image` has spoken
    return [
        Finding(
            "cameras",
            "warn",
            "{} alone changes nothing".format(" and ".join(blind)),
            "this camera does not reach the network: is it masked, or fed another camera's frames?",
        )
    ]


def _instruction(answers: Answers, change: Any, noise: float) -> Finding:
    moved = max(change(answers.plain[0], other) for other in answers.told.values())
    # A policy taught a single instruction may answer any other alike.
    made_up = MADE_UP in answers.told
    which = "a made-up" if made_up else "another"
    text = "{} instruction moves the action by {}".format(which, _percent(moved))
    if moved <= max(_NOTHING, 2 * noise):
        return Finding(
            "instruction",
            "warn" if made_up else "fail",
            text + _floor(noise),
            "the instruction does not reach the network: look at the prompt's template, the"
            " tokenizer, and whether the text is cut before the words that differ",
        )
    if moved < _LITTLE and not made_up:
        return Finding(
            "instruction",
            "warn",
            text,
            "the policy hardly listens: a score with swapped instructions would show how much",
        )
    return Finding("instruction", "ok", text)


def _range(actions: np.ndarray, metadata: Dict[str, Any]) -> Finding:
    spec = metadata.get("action")
    if not spec:
        return Finding("action range", "skip", "the server does not say its statistics' range")
    low, high = np.asarray(spec["low"]), np.asarray(spec["high"])
    moving = high > low
    arm, low, high = actions[:, : len(low)][:, moving], low[moving], high[moving]
    # In these units the statistics' range is [-1, 1].
    scaled = 2 * (arm - low) / (high - low) - 1
    if not scaled.size:
        return Finding("action range", "skip", "every arm dimension is constant")
    largest, stuck = float(np.abs(scaled).max()), float(np.mean(np.abs(scaled) > 0.999))
    dimension = int(np.flatnonzero(moving)[np.abs(scaled).max(axis=0).argmax()])
    text = "the arm reaches {:.2f} times its statistics' range".format(largest)
    if largest > 3:
        return Finding(
            "action range",
            "fail",
            "{} (dimension {})".format(text, dimension),
            "un-normalized twice, or the weights answer in robot units already: look at"
            " data.normalization and at the dataset whose statistics are used",
        )
    if stuck > 0.9:
        return Finding(
            "action range",
            "fail",
            "{:.0%} of the arm's numbers lie at the ends of their range".format(stuck),
            "the network's output is far outside [-1, 1]: a head trained on numbers that were not"
            " normalized, or diverged",
        )
    # Un-normalizing maps [-1, 1] to [low, high]; a second time, [low, high] to a part of itself.
    reach, inside = np.abs(scaled).max(axis=0), np.maximum(np.abs(low), np.abs(high))
    if inside.min() < _NARROW and (reach <= 1.2 * inside).all():
        return Finding(
            "action range",
            "warn" if _untrained(metadata) else "fail",
            text + ", and no dimension beyond what its own units allow",
            "un-normalized twice, or the policy hardly moves: look at data.normalization, and at"
            " whether the head's output is un-normalized elsewhere as well",
        )
    if largest > 1.1:
        return Finding("action range", "warn", text, "the head answers outside what it was taught")
    return Finding("action range", "ok", text)


def _units(
    answers: Answers, low: np.ndarray, high: np.ndarray, arm_range: Optional[Tuple[float, float]]
) -> Finding:
    if answers.refusal:
        return Finding(
            "simulator's units",
            "fail",
            answers.refusal,
            "the checkpoint's actions are of another robot: look at its dataset and action space",
        )
    if arm_range is None:
        return Finding("simulator's units", "skip", "the simulator does not say what it takes")
    reach = float(np.abs(np.append(low, high)).max()) / max(abs(bound) for bound in arm_range)
    text = "the arm's largest number is {:.2f} times the largest the simulator takes".format(reach)
    if not 0.02 <= reach <= 2:
        wrong = "still normalized" if reach < 1 else "un-normalized twice"
        return Finding(
            "simulator's units",
            "fail",
            text,
            "{}, or in other units than the simulator's (metres, radians, or a unit of its own):"
            " look at the dataset's standardization".format(wrong),
        )
    return Finding("simulator's units", "ok", text)


def _polarity(policy: Optional[Dict[str, float]], simulator: Optional[Dict[str, float]]) -> Finding:
    if not policy or not simulator:
        who = "server" if not policy else "simulator"
        return Finding("gripper commands", "skip", "the {} does not say its commands".format(who))
    text = "the policy says {closed:g} for closed, {open:g} for open".format(**policy)
    if policy["closed"] == simulator["closed"] and policy["open"] == simulator["open"]:
        return Finding("gripper commands", "ok", text)
    takes = "; the simulator takes {closed:g} and {open:g}".format(**simulator)
    turned = (policy["open"] > policy["closed"]) != (simulator["open"] > simulator["closed"])
    return Finding(
        "gripper commands",
        "fail",
        text + takes,
        "the gripper would {}: gripper_env of the dataset's spec is not this simulator's".format(
            "open where it should close" if turned else "not be understood"
        ),
    )


def _grip(rolled: Sequence[np.ndarray], metadata: Dict[str, Any]) -> Finding:
    commands, spec = metadata.get("gripper"), metadata.get("action") or {}
    recorded = spec.get("gripper_open")
    if not commands or recorded is None:
        return Finding("gripper polarity", "skip", "the server does not say how often it is open")
    gripper = np.concatenate([chunk[:, -1] for chunk in rolled]) if rolled else np.zeros(0)
    if len(gripper) < 32:
        return Finding("gripper polarity", "skip", "too few actions to tell")
    # Commands differ by robot (-1 and 1, 0 and 1), and either end may be the larger.
    middle = (commands["open"] + commands["closed"]) / 2
    is_open = (gripper > middle) == (commands["open"] > commands["closed"])
    open_rate = float(is_open.mean())
    text = "open in {:.0%} of the answers, in {:.0%} of the training data".format(
        open_rate, recorded
    )
    # Robots begin with an open gripper: always open says less than always closed.
    sure = (recorded >= 0.6 and open_rate <= 0.05) or (recorded <= 0.25 and open_rate >= 0.95)
    if sure or (recorded >= 0.4 and open_rate <= 0.05) or (recorded <= 0.4 and open_rate >= 0.95):
        advice = (
            "open and closed are the wrong way round somewhere (the dataset's standardization, the"
            " imported weights), or the policy never moves its gripper"
        )
        # Random weights answer either way at all times.
        level = "fail" if sure and not _untrained(metadata) else "warn"
        return Finding("gripper polarity", level, text, advice)
    return Finding("gripper polarity", "ok", text)


def _roll(env: Any, client: Any, episode: Episode, steps: int) -> List[np.ndarray]:
    replies: List[np.ndarray] = []

    class Listening:
        metadata, reset = client.metadata, client.reset

        def infer(self, request: Dict[str, Any]) -> Dict[str, Any]:
            reply = client.infer(request)
            replies.append(_actions(reply))
            return reply

    env.reset(episode)
    listening = Listening()
    for _ in control_steps(env, listening, ActionChunks(listening), env.told(episode), steps):
        pass
    return replies


def _bounds(metadata: Dict[str, Any], answers: Answers) -> Tuple[np.ndarray, np.ndarray]:
    """(low, high) of each arm dimension: from the statistics, else as seen."""
    spec = metadata.get("action")
    if spec:
        return np.asarray(spec["low"], float), np.asarray(spec["high"], float)
    actions = answers.everything()[:, :-1]
    return actions.min(axis=0), actions.max(axis=0)


def _actions(reply: Dict[str, Any]) -> np.ndarray:
    return np.array(reply["actions"], np.float64)


def _untrained(metadata: Dict[str, Any]) -> bool:
    return bool(metadata.get("untrained"))


def _percent(change: float) -> str:
    return "{:.3g} % of its range".format(100 * change)


def _floor(noise: float) -> str:
    return " (asked twice the same: {})".format(_percent(noise)) if noise > _NOTHING else ""
