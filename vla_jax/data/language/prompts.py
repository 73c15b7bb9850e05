"""What today's policies are told: the instruction, and with some the robot's state, as one text.

| form | source | text |
|---|---|---|
| pi0 | openpi | instruction, line break |
| pi05 | openpi | Task: instruction, State: bins;, line break, Action: |
| pi0fast | openpi | Task: lower-cased instruction, State: bins;, line break |
| smolvla | LeRobot | instruction, line break if it does not end with one |

The state is the normalized one, without padding; each number becomes one of 256 bins between -1
and 1. What lies below them is written -1, as openpi writes it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

_BINS = 256


def _clean(instruction: str) -> str:
    return instruction.strip().replace("_", " ").replace("\n", " ")


def _clean_lower(instruction: str) -> str:
    return instruction.lower().strip().replace("_", " ")  # line breaks inside stay


def _as_it_is(instruction: str) -> str:
    return instruction.removesuffix("\n")


@dataclass(frozen=True)
class Form:
    """One way to write a prompt.

    Attributes:
        template: with {instruction}, and {state} if the state is part of it.
        clean: what happens to the instruction before.
    """

    template: str
    clean: Callable[[str], str] = _clean

    @property
    def has_state(self) -> bool:
        """Whether the state is part of the text."""
        return "{state}" in self.template

    def write(self, instruction: str, state: Float[np.ndarray, "s"] | None = None) -> str:
        """The text.

        Args:
            instruction: as the person says it.
            state: normalized, not padded; needed where the form has one.

        Raises:
            ValueError: it is needed and not there.
        """
        if self.has_state and state is None:
            raise ValueError("the prompt has the robot's state in it, and there is none")
        numbers = "" if state is None else " ".join(map(str, state_bins(state).tolist()))
        return self.template.format(instruction=self.clean(instruction), state=numbers)


FORMS = {
    "pi0": Form("{instruction}\n"),
    "pi05": Form("Task: {instruction}, State: {state};\nAction: "),
    "pi0fast": Form("Task: {instruction}, State: {state};\n", _clean_lower),
    "smolvla": Form("{instruction}\n", _as_it_is),
}


def state_bins(state: Float[np.ndarray, "*n s"]) -> Int[np.ndarray, "*n s"]:
    """Normalized numbers -> bins 0 to 255; -1 below -1, and 255 from 1 on."""
    return np.digitize(state, np.linspace(-1, 1, _BINS + 1)[:-1]) - 1
