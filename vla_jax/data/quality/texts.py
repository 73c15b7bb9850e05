"""Instructions that are missing, or that nobody would say to a robot."""

import re

import numpy as np

from vla_jax.data.dataset import Dataset
from vla_jax.data.quality.issue import Issue, recorded_numbers

# What programs write where a person has written nothing.
_PLACEHOLDER = re.compile(
    r"(task|todo|tbd|test|none|null|nan|n/?a|unknown|default|dummy|instruction|placeholder|"
    r"untitled|no (instruction|text|language)|language[ _]instruction)[\s_#:-]*\d*\W*",
    re.IGNORECASE,
)
# UTF-8 that was read as Latin-1, and what stands for bytes that are no text.
_GARBLED = re.compile("\ufffd|\u00c3[\u0080-\u00bf]|\u00e2\u20ac|b'|b\"")
_LONGEST = 300  # characters; the longest of Open X-Embodiment have about 200


def texts(dataset: Dataset) -> list[Issue]:
    """One issue for each kind of instruction that is no instruction."""
    issues = []
    if silent := dataset.unused.get("have no text", 0):
        numbers = dataset.source.numbers
        used = set(recorded_numbers(dataset, np.arange(len(dataset.lengths)).tolist()))
        issues.append(
            Issue(
                "instruction_missing",
                f"{silent} trajectories have no text and are not used",
                "Write what they do, or leave it so; data.language can paraphrase, not invent",
                tuple(sorted(set(numbers.tolist()) - used)),
            )
        )
    kinds: dict[str, list[int]] = {}
    for code, text in enumerate(dataset.instructions):
        if kind := odd(text):
            kinds.setdefault(kind, []).append(code)
    trajectory = np.repeat(np.arange(len(dataset.lengths)), np.diff(dataset.text_starts))
    for kind, codes in kinds.items():
        where = np.unique(trajectory[np.isin(dataset.text, codes)])
        issues.append(
            Issue(
                "instruction_odd",
                f"{len(codes)} instructions are {kind}, such as {dataset.instructions[codes[0]]!r}",
                "Let `standardise` return what a person would say to the robot",
                recorded_numbers(dataset, where.tolist()),
            )
        )
    return issues


def odd(text: str) -> str:
    """What is wrong with an instruction, as a predicate; "" if nothing is."""
    text = text.strip()
    if _PLACEHOLDER.fullmatch(text):
        return "placeholders"
    if _GARBLED.search(text):
        return "garbled (another encoding, or bytes printed as text)"
    if not any(letter.isalpha() for letter in text):
        return "without a letter"
    # Scripts without blanks say much in one character; a letter of ours says nothing.
    if len(text) < 3 and text.isascii():
        return "too short to mean anything"
    if text[0] in "{[<" and text[-1] in "}]>":
        return "data, not sentences"
    if "_" in text and " " not in text:
        return "names, with underscores for blanks"
    return "longer than any sentence" if len(text) > _LONGEST else ""
