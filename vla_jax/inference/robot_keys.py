"""A robot's own observation -> the keys that policies take.

Every policy takes openpi's keys (`protocol.IMAGE_KEYS` and the two beside it) as well: a profile
adds names, so that one server answers its robot, our simulators and other projects' clients.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.cameras import CAMERAS
from vla_jax.config import ConfigError
from vla_jax.config.observation import PROFILES, ZEROS, ObservationConfig, Profile
from vla_jax.inference.protocol import IMAGE_KEYS, PROMPT_KEY, STATE_KEY

# A robot may send None, so what is missing has a mark of its own.
_MISSING = object()
_SLICE = re.compile(r"(.+)\[(-?\d*):(-?\d*)\]")
_NUMBERS = (int, float, np.number)


class RobotKeys:
    """Reads observations by a profile.

    Attributes:
        profile: the complete one.
        name: of the known robot or client that it starts from.
        aliases: further names of the dataset.
        action_space: what the numbers of an action are; "" where nobody has said it.
    """

    def __init__(self, config: ObservationConfig | None = None) -> None:
        """Complete a config by its profile.

        Raises:
            ConfigError: listing camera roles that do not exist and parts that are no key.
        """
        config = config or ObservationConfig()
        base = PROFILES[config.profile]
        images = {**base.images, **{role: _listed(k) for role, k in config.images.items()}}
        self.name, self.aliases = config.profile, config.aliases
        self.action_space = config.action_space
        self.profile = Profile(images, config.state or base.state, config.prompt or base.prompt)
        problems = [
            f"observation.images: {role!r} is none of {list(CAMERAS)}"
            for role in images
            if role not in CAMERAS
        ]
        keys = [
            *self.aliases,
            *self.profile.prompt,
            *(key for role in images for key in images[role]),
        ]
        # By `type`, because True is an instance of int and no number of a state.
        parts = [part for part in self.profile.state if type(part) not in (int, float)]
        problems += [
            f"observation: {key!r} is no key, expected a text"
            for key in (*keys, *parts)
            if not isinstance(key, str) or not key
        ]
        # With two of them nobody could say how many zeros each stands for.
        if self.profile.state.count(ZEROS) > 1:
            problems.append(f"observation.state: {ZEROS!r} can stand there once")
        if problems:
            raise ConfigError("; ".join(problems))

    def to_json(self) -> dict[str, Any]:
        """What a server says of it: keys by role, in the order in which they are looked for."""
        images = {r: [*k, *_fallback(IMAGE_KEYS[r], k)] for r, k in self.profile.images.items()}
        return {
            "profile": self.name,
            "images": images,
            "state": list(self.profile.state),
            "prompt": [*self.profile.prompt, *_fallback(PROMPT_KEY, self.profile.prompt)],
            "aliases": list(self.aliases),
            "action_space": self.action_space,
        }

    def image_names(self, role: str) -> str:
        """The keys of a camera, for an error."""
        return " or ".join(self.to_json()["images"][role])

    def state_names(self) -> str:
        """The keys of the state, for an error."""
        return " + ".join(str(part) for part in self.profile.state)

    def standardize(self, obs: Mapping[str, Any], state_dim: int = 0) -> dict[str, Any]:
        """The observation with what this profile finds added under openpi's keys.

        An image [3, h, w] is turned to [h, w, 3]. What is not found, or makes no state, is left
        out: `Policy.check` says so.

        Args:
            obs: as the robot sends it; not changed.
            state_dim: numbers that the policy takes; 0 leaves the state alone.
        """
        standard = dict(obs)
        for role, keys in self.profile.images.items():
            key = IMAGE_KEYS[role]
            # openpi's own key comes last, so that what a robot sends under its own names is
            # preferred.
            image = _first(obs, keys, obs.get(key, _MISSING))
            if image is not _MISSING:
                standard[key] = _turned(image)
        prompt = _first(obs, self.profile.prompt, _MISSING)
        if prompt is not _MISSING:
            standard[PROMPT_KEY] = prompt
        if state_dim and (state := self._state(obs, state_dim)) is not None:
            standard[STATE_KEY] = state
        return standard

    def _state(self, obs: Mapping[str, Any], dim: int) -> np.ndarray | None:
        """The parts put together, or None where one is missing or is no list of numbers."""
        parts: list[Any] = [_part(obs, part) for part in self.profile.state]
        if any(part is None for part in parts):
            return None
        if ZEROS in self.profile.state:
            length = sum(len(part) for part in parts)
            # A state that is too long already gets no zeros; `Policy.check` refuses it in words.
            parts[self.profile.state.index(ZEROS)] = np.zeros(max(0, dim - length))
        return np.concatenate(parts)


def load(choice: str) -> ObservationConfig:
    """A profile by its name, or what a JSON file of the user's says.

    Raises:
        ConfigError: no such profile or file, or a file that holds something else.
    """
    if choice in PROFILES:
        return ObservationConfig(choice)
    path = Path(choice)
    if not path.is_file():
        raise ConfigError(f"observation {choice!r}: neither one of {list(PROFILES)} nor a file")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    fields = {field.name for field in dataclasses.fields(ObservationConfig)}
    if not isinstance(content, dict) or not content.keys() <= fields:
        raise ConfigError(f"{path}: expected an object with some of {sorted(fields)}")
    profile, images = content.get("profile", "openpi"), content.get("images", {})
    if profile not in PROFILES or not isinstance(images, dict):
        raise ConfigError(f"{path}: profile: one of {list(PROFILES)}; images: role -> key")
    state, prompt, aliases = (_listed(content.get(k, ())) for k in ("state", "prompt", "aliases"))
    space = str(content.get("action_space", ""))
    config = ObservationConfig(profile, images, state, prompt, space, aliases)
    # Made for its checks alone: a bad file is to end the start of a server, not its first request.
    RobotKeys(config)
    return config


def _listed(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _fallback(key: str, keys: Iterable[str]) -> list[str]:
    return [] if key in keys else [key]


def _first(obs: Mapping[str, Any], keys: Sequence[str], default: Any) -> Any:
    return next((x for key in keys if (x := _find(obs, key)) is not _MISSING), default)


def _find(obs: Any, key: str) -> Any:
    """The value under a key, or under its parts between dots in nested maps."""
    if not isinstance(obs, Mapping):
        return _MISSING
    if key in obs:
        return obs[key]
    if "." not in key:
        return _MISSING
    # Maps' own keys may hold dots, so each is tried as the end of the first name.
    for i, letter in enumerate(key):
        if letter == "." and key[:i] in obs:
            value = _find(obs[key[:i]], key[i + 1 :])
            if value is not _MISSING:
                return value
    return _MISSING


def _turned(image: Any) -> Any:
    """An image whose channels come first, with its channels last; others as they are."""
    if not isinstance(image, np.ndarray) or image.ndim != 3:
        return image
    # With 3 at both ends nobody can tell the order, and the protocol's is channels last.
    if image.shape[0] != 3 or image.shape[2] == 3:
        return image
    return np.ascontiguousarray(image.transpose(1, 2, 0))


def _part(obs: Mapping[str, Any], part: Any) -> np.ndarray | None:
    if part == ZEROS:
        return np.zeros(0)
    if not isinstance(part, str):
        return np.array([part], np.float64)
    cut = _SLICE.fullmatch(part)
    value = _find(obs, cut[1] if cut else part)
    # A gripper is often sent as a bare number.
    value = [value] if isinstance(value, _NUMBERS) else value
    listed = isinstance(value, list) and all(isinstance(x, _NUMBERS) for x in value)
    if not listed and not isinstance(value, np.ndarray):
        return None
    numbers = np.atleast_1d(np.asarray(value))
    # Booleans are no numbers of a state, though numpy would join them to some without a word.
    if numbers.ndim != 1 or numbers.dtype.kind not in "fiu":
        return None
    begin, end = (int(n) if n else None for n in cut.groups()[1:]) if cut else (None, None)
    return numbers[begin:end]
