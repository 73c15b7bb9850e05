"""placeholder until the train branch lands"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageSpec:
    size: int
    mean: tuple
    std: tuple
    resample: str
