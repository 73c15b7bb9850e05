"""What a run asks of a dataset, held against what the dataset has: cameras, columns, episodes."""

import logging
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from vla_jax.data.decode import decode, image_size
from vla_jax.data.errors import DataError
from vla_jax.data.features import STEPS, Feature
from vla_jax.data.filters import Filters
from vla_jax.data.source import Source
from vla_jax.data.source_streamed import StreamSource
from vla_jax.data.spec import DatasetSpec, Path

log = logging.getLogger(__name__)
_LOOKED_AT = 3  # trajectories whose first images are held against the size that is declared
_SHOWN = 10  # numbers listed in a message


def find_feature(features: Mapping[str, Feature], path: Path) -> str | None:
    """The first of the alternatives that there is, below `steps/` or not."""
    candidates = [path] if isinstance(path, str) else list(path)
    # Specs leave out `steps/`, and what is recorded once an episode has no such prefix.
    spelled = [p for c in candidates for p in (STEPS + c, c)]
    return next((p for p in spelled if p in features), None)


def find_cameras(
    spec: DatasetSpec, features: Mapping[str, Feature], cameras: Sequence[str]
) -> dict[str, str]:
    """The image feature of each of these roles that the dataset has."""
    paths = {
        role: find_feature(features, spec.images[role]) for role in cameras if role in spec.images
    }
    return {role: path for role, path in paths.items() if path}


def partners(spec: DatasetSpec, cameras: Sequence[str]) -> tuple[str, ...]:
    """The cameras that may take the place of some of these."""
    return spec.swap if spec.swap and set(spec.swap) & set(cameras) else ()


def lacking_cameras(
    spec: DatasetSpec, features: Mapping[str, Feature], roles: Sequence[str]
) -> str:
    """A sentence about the roles that the dataset has no camera for; "" if there are none."""
    if not roles:
        return ""
    have = {role: path for role, path in spec.images.items() if find_feature(features, path)}
    lacking = " and ".join(repr(role) for role in roles)
    if not have:
        named = dict(spec.images)
        return f"no camera {lacking}: the data have none of those that the spec names, {named}"
    return f"no camera {lacking}; its cameras are {have}"


def unfit(
    features: Mapping[str, Feature], cameras: Mapping[str, str], columns: Iterable[str]
) -> list[str]:
    """Sentences about features that cannot play the part they are asked for.

    Args:
        features: all of the dataset.
        cameras: role -> path of its images.
        columns: paths of the numbers and texts.
    """
    problems = [_unfit_camera(role, path, features[path]) for role, path in cameras.items()]
    problems += [
        f"{path!r} holds {features[path].kind}s, not numbers or text"
        for path in columns
        if features[path].kind not in ("tensor", "text")
    ]
    return [problem for problem in problems if problem]


def _unfit_camera(role: str, path: str, feature: Feature) -> str:
    """Why a feature cannot be a camera, and what to do about it; "" if it can."""
    held = f"{feature.dtype} {list(feature.shape)}"
    if feature.kind == "depth":
        return f"camera {role!r} ({path}) is marked as a depth camera, which is not read as colors"
    if feature.kind == "text":
        return f"camera {role!r} ({path}) is text, not images"
    if feature.kind != "image":
        return (
            f"camera {role!r} ({path}) is stored as numbers ({held}), not as encoded images: write "
            "the dataset anew with an image feature (RLDS: features.image, LeRobot: image or video)"
        )
    if feature.dtype != "uint8":
        return f"camera {role!r} ({path}) holds images of {held}, not of uint8: depth is not read"
    channels = feature.shape[2] if len(feature.shape) == 3 else 0
    if channels not in (None, 1, 3, 4):
        return f"camera {role!r} ({path}) is described as {held}, not as [height, width, 3]"
    return ""


def check_episodes(filters: Filters, source: Source, name: str) -> None:
    """Holds `data.filters.episodes` against the numbers there are.

    Raises:
        DataError: a number is none of the split's, or nothing can be known of the numbers because
            recordings were left out.
    """
    if filters.episodes is None or filters.by_span:
        return
    if source.every is None:
        problem = (
            "data.filters.episodes cannot be numbers here, as recordings that had to be left out "
            "may have held some of the annotated spans; list [start, end] pairs"
        )
        raise DataError(f"{name}: {problem}", source.root)
    unknown = sorted(number for number in filters.episodes if number not in source.every)
    if unknown:
        available = f"{source.every[0]} to {source.every[-1]}" if len(source.every) else "none"
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise DataError(
            f"{name}: data.filters.episodes names {unknown[:_SHOWN]}{more}, which are no episodes "
            f"of the split; it has {available}",
            source.root,
        )


def held_size(
    source: Source, path: str, frames: Sequence[int], name: str, skip: bool
) -> tuple[tuple[int, int], bool]:
    """Height and width that the images of a camera have, whatever the dataset declares.

    Args:
        source: of the images.
        path: of the camera.
        frames: first frame of each trajectory.
        name: of the dataset, for messages.
        skip: go on to the next trajectory where an image is wrong; its windows are left out when
            they are drawn.

    Returns:
        The size, and whether all images should have it.

    Raises:
        DataError: no image can be read, or the first one, without `skip`.
    """
    declared = tuple(source.features[path].shape[:2])
    fixed = None not in declared
    wanted = 1 if isinstance(source, StreamSource) else _LOOKED_AT  # a stream begins anew each time
    # Spread over the dataset, as parts of it may have images of another size.
    apart = [frames[len(frames) * i // wanted] for i in range(wanted)] if len(frames) else []
    sizes: list[tuple[int, int]] = []
    wrong: DataError | None = None
    # The rest come only in place of images that are broken or absent.
    for frame in dict.fromkeys([*apart, *frames]):
        if len(sizes) >= min(wanted, len(frames)):
            break
        try:
            data = source.read(path, frame, frame)[0]
            if len(data):
                size = image_size(data)
                if not sizes and not isinstance(data, np.ndarray):
                    decode(data)  # what is no picture, such as distances, is noticed at once
                sizes.append(size)
            elif sizes:
                break  # an image that is absent is no mistake
        except DataError as error:
            # A decoder does not know the place.
            if not error.file:
                error = type(error)(f"{path!r}: {error.problem}", *source.place(frame))
            if not skip:
                raise error from None
            wrong = wrong or error
            if sizes:
                break
    if not sizes:
        raise wrong or DataError(f"{name}: camera {path!r} has no images", source.root)
    held = max(sizes, key=sizes.count)
    if fixed and held != declared:
        log.warning(
            "%s: camera %r is declared as %d x %d, its images are %d x %d",
            name, path, *declared, *held,
        )  # fmt: skip
    return held, fixed
