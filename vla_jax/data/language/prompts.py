"""What today's policies are told: the instruction, and with some the robot's state, as one text.

| form | source | text |
|---|---|---|
| pi0 | openpi | instruction, line break |
| pi05 | openpi | Task: instruction, State: bins;, line break, Action: |
| pi0fast | openpi | Task: lower-cased instruction, State: bins;, line break |
| smolvla | LeRobot | instruction, line break if it does not end with one |
| openvla | OpenVLA(-OFT) | In: What action should the robot take to lower-cased instruction? Out: |
| openvla_v01 | the first OpenVLA | the same question in Vicuna's chat |

OpenVLA's end with a blank and the stop token, between which the actions stand: the blank is a token
of its own there (29871 of Llama's), as it was in training.

The state is the normalized one, without padding; each number becomes one of 256 bins between -1
and 1. What lies below them is written -1, as openpi writes it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from vla_jax.data.language.tokenizer import Tokenizer

_BINS = 256
# Names of the start token: PaliGemma's, and that of a sentencepiece file.
_STARTS = ("<bos>", "<s>")


def _clean(instruction: str) -> str:
    return instruction.strip().replace("_", " ").replace("\n", " ")


def _clean_lower(instruction: str) -> str:
    return instruction.lower().strip().replace("_", " ")  # line breaks inside stay


def _lower(instruction: str) -> str:
    return instruction.lower()


def _as_it_is(instruction: str) -> str:
    return instruction.removesuffix("\n")


@dataclass(frozen=True)
class Form:
    """One way to write a prompt.

    Attributes:
        template: with {instruction}, and {state} if the state is part of it.
        clean: what happens to the instruction before.
        begins: whether the tokenizer's start token stands before the text.
    """

    template: str
    clean: Callable[[str], str] = _clean
    begins: bool = True

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


_QUESTION = "What action should the robot take to {instruction}?"
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)
# Blanks and line breaks are the originals', which the pretrained weights expect.
FORMS = {
    "pi0": Form("{instruction}\n"),
    "pi05": Form("Task: {instruction}, State: {state};\nAction: "),
    "pi0fast": Form("Task: {instruction}, State: {state};\n", _clean_lower),
    "smolvla": Form("{instruction}\n", _as_it_is, begins=False),
    # Llama's tokenizer writes the start token itself.
    "openvla": Form(f"In: {_QUESTION}\nOut: </s>", _lower, begins=False),
    "openvla_v01": Form(f"{_VICUNA}USER: {_QUESTION} ASSISTANT: </s>", _lower, begins=False),
}


def state_bins(state: Float[np.ndarray, "*n s"]) -> Int[np.ndarray, "*n s"]:
    """Normalized numbers -> bins 0 to 255; -1 below -1, and 255 from 1 on."""
    # Without the last edge, so that numbers from 1 on stay in bin 255.
    return np.digitize(state, np.linspace(-1, 1, _BINS + 1)[:-1]) - 1


class Writer:
    """Instruction, and perhaps the robot's state -> ids of the prompt and their mask.

    Attributes:
        needs_state: whether the state is part of the text, which must then be written anew at
            every step.
    """

    def __init__(self, tokenizer: Tokenizer, length: int, template: str, form: str = ""):
        """Keeps what all prompts share.

        Args:
            tokenizer: of the backbone.
            length: text columns.
            template: with {instruction}.
            form: a key of `FORMS`, which then takes the place of the template; "" = none.
        """
        self._tokenizer, self._length, self._template = tokenizer, length, template
        self._form = FORMS[form] if form else None
        self._begin = ""
        if self._form and self._form.begins:
            self._begin = next((t for t in _STARTS if tokenizer.has_token(t)), "")
        self.needs_state = bool(self._form and self._form.has_state)

    def __call__(
        self, instruction: str, state: Float[np.ndarray, "s"] | None = None
    ) -> tuple[Int32[np.ndarray, "t"], Bool[np.ndarray, "t"]]:
        """Ids padded on the right, and the mask of real tokens.

        Raises:
            TextLengthError: the prompt needs more columns.
        """
        if self._form is None:
            text = self._template.format(instruction=instruction.strip())
        else:
            text = self._begin + self._form.write(instruction, state)
        return self._tokenizer.encode(text, self._length)
