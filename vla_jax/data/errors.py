"""What can be wrong with a dataset, each kind by name and with the place where it is wrong."""

from pathlib import Path


class DataError(ValueError):
    """A dataset that cannot be used as asked; the message names file, episode and frame.

    Attributes:
        file: shard or metadata file, "" when unknown.
        episode: number of the episode within the shard, -1 when it does not apply.
        frame: number of the frame within the episode, -1 when it does not apply.
    """

    def __init__(self, problem: str, file: str | Path = "", episode: int = -1, frame: int = -1):
        place = [str(file)] if str(file) else []
        place += [f"episode {episode}"] if episode >= 0 else []
        place += [f"frame {frame}"] if frame >= 0 else []
        super().__init__(f"{', '.join(place)}: {problem}" if place else problem)
        self.problem, self.file, self.episode, self.frame = problem, str(file), episode, frame


class TruncatedShardError(DataError):
    """A shard that ends early, or holds another number of episodes than dataset_info.json says."""


class CorruptRecordError(DataError):
    """A record whose checksum or protobuf structure is wrong."""


class FeatureError(DataError):
    """A feature that does not exist, or does not hold what features.json says."""


class EmptyTrajectoryError(DataError):
    """An episode without steps."""


class ImageDecodeError(DataError):
    """An image that is neither a sound JPEG nor a sound PNG."""


class TextLengthError(ValueError):
    """A prompt with more tokens than there are text columns."""
