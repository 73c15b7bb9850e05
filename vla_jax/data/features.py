"""features.json of TFDS: which features an episode has, and how each lies in a record.

Only what RLDS uses: nested FeaturesDict, the `steps` Dataset (or Sequence), Tensor and Scalar with
encodings none, bytes and zlib, Text, Image, ClassLabel. Anything else is kept as `other`: it is an
error to ask for it, not to have it. Source: tensorflow_datasets/core/features and feature.proto.
"""

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_jax.data.errors import DataError, FeatureError
from vla_jax.data.places import DataPath
from vla_jax.data.rlds import records
from vla_jax.files import explain_content, problem_of

_CLASS = "tensorflow_datasets.core.features."
STEPS = "steps/"  # prefix of everything recorded once a step


@dataclass(frozen=True)
class Feature:
    """One leaf of features.json.

    Attributes:
        kind: image | tensor | text | depth (a camera of distances) | other.
        shape: of one step (or of the episode, outside `steps`); None where it varies.
        dtype: numpy name; "string" for text.
        encoding: tensor: none | bytes | zlib; image: jpeg | png | "" (either).
    """

    kind: str
    shape: tuple[int | None, ...] = ()
    dtype: str = "string"
    encoding: str = "none"


def image(height: int, width: int, encoding: str = "jpeg") -> Feature:
    """An RGB camera."""
    return Feature("image", (height, width, 3), "uint8", encoding)


def tensor(shape: tuple[int, ...] = (), dtype: str = "float32") -> Feature:
    """Numbers or flags; shape () is a scalar."""
    return Feature("tensor", shape, dtype, "none")


def text() -> Feature:
    """A UTF-8 string."""
    return Feature("text")


def load_features(path: DataPath) -> dict[str, Feature]:
    """features.json -> {slash path: Feature}; step features start with `steps/`.

    Raises:
        DataError: the file is missing or is not a features.json.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        problem = problem_of(path, f"cannot be read: {error}")
        raise DataError(problem, path) from error
    return parse_features(text, path)


def parse_features(text: str, path: DataPath) -> dict[str, Feature]:
    """The text of a features.json; `path` is for messages.

    Raises:
        DataError: it is not a features.json.
    """
    try:
        return dict(_flatten(json.loads(text), ""))
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        problem = explain_content(text[:256].encode()) or f"not a TFDS features.json ({error!r})"
        raise DataError(problem, path) from error


def _flatten(node: dict[str, Any], path: str):
    if "featuresDict" in node:
        for key, child in node["featuresDict"].get("features", {}).items():
            yield from _flatten(child, f"{path}/{key}" if path else key)
    # TFDS describes its Dataset as a sequence; sequences elsewhere are not read.
    elif "sequence" in node and path == "steps":
        yield from _flatten(node["sequence"]["feature"], path)
    elif "image" in node:
        body = node["image"]
        encoding = body.get("encodingFormat", "")
        yield path, Feature("image", _shape(body), body.get("dtype", "uint8"), encoding)
    elif "text" in node:
        yield path, Feature("text")
    elif "tensor" in node:
        body = node["tensor"]
        feature = Feature("tensor", _shape(body), body["dtype"], body.get("encoding", "none"))
        text = feature.dtype == "string"
        yield path, Feature("text" if text else "other") if not _numeric(feature) else feature
    # A label is stored as its number.
    elif "classLabel" in node:
        yield path, Feature("tensor", (), "int64", "none")
    else:
        yield path, Feature("other")


def _numeric(feature: Feature) -> bool:
    try:
        return np.dtype(feature.dtype).kind in "fiub"
    except TypeError:  # such as bfloat16, and no number at all
        return False


def _shape(body: dict[str, Any]) -> tuple[int | None, ...]:
    sizes = [int(d) for d in body.get("shape", {}).get("dimensions", ())]
    # TFDS writes -1 for a size that varies.
    return tuple(None if size < 0 else size for size in sizes)


def to_json(features: Mapping[str, Feature]) -> str:
    """Inverse of `load_features`, as text."""
    tree: dict[str, Any] = {}
    for path, feature in sorted(features.items()):
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = feature
    return json.dumps(_dict_node(tree), indent=1)


def _dict_node(tree: dict[str, Any]) -> dict[str, Any]:
    children = {}
    for key, child in tree.items():
        if isinstance(child, Feature):
            children[key] = _leaf_node(child)
        elif key == "steps":
            sequence = {"feature": _dict_node(child), "length": "-1"}
            name = _CLASS + "dataset_feature.Dataset"
            children[key] = {"pythonClassName": name, "sequence": sequence}
        else:
            children[key] = _dict_node(child)
    name = _CLASS + "features_dict.FeaturesDict"
    return {"pythonClassName": name, "featuresDict": {"features": children}}


def _leaf_node(feature: Feature) -> dict[str, Any]:
    shape = {"dimensions": [str(-1 if d is None else d) for d in feature.shape]}
    shape = shape if feature.shape else {}  # TFDS writes no dimensions for a scalar
    if feature.kind == "text":
        return {"pythonClassName": _CLASS + "text_feature.Text", "text": {}}
    if feature.kind == "image":
        body = {"shape": shape, "dtype": feature.dtype, "encodingFormat": feature.encoding}
        return {"pythonClassName": _CLASS + "image_feature.Image", "image": body}
    body = {"shape": shape, "dtype": feature.dtype, "encoding": feature.encoding}
    # TFDS reads no encoding of a Scalar.
    scalar = not feature.shape and feature.encoding == "none"
    name = "scalar.Scalar" if scalar else "tensor_feature.Tensor"
    return {"pythonClassName": _CLASS + name, "tensor": body}


def decode(record: bytes, field: records.Field, feature: Feature) -> np.ndarray:
    """All rows of one tensor or text feature: [rows, *shape], text as an object array of str.

    Raises:
        FeatureError: the record does not hold what features.json says (the caller adds the place).
    """
    if feature.kind == "text":
        # A text that is not stored as bytes has no rows, which the caller notices.
        spans = records.byte_spans(record, field).tolist() if field.kind == records.BYTES else []
        out = np.empty(len(spans), object)
        out[:] = [record[a:b].decode("utf-8", errors="replace") for a, b in spans]
        return out
    # Values lie back to back: rows can be told apart only if their size is fixed.
    if 0 in feature.shape:
        raise FeatureError(f"its shape is {feature.shape}, without a single number")
    if feature.kind != "tensor" or None in feature.shape:
        raise FeatureError(f"features of kind {feature.kind} {feature.shape} cannot be read")
    if feature.encoding in ("bytes", "zlib"):
        blobs = [record[start:stop] for start, stop in records.byte_spans(record, field)]
        blobs = [zlib.decompress(b) for b in blobs] if feature.encoding == "zlib" else blobs
        values = np.frombuffer(b"".join(blobs), np.dtype(feature.dtype))
    elif field.kind == records.FLOAT:
        values = records.floats(record, field)
    elif field.kind == records.INT:
        values = records.ints(record, field)
    else:
        raise FeatureError(f"holds no numbers, features.json says {feature.dtype}")
    shape = tuple(size for size in feature.shape if size is not None)
    if values.size % math.prod(shape):
        raise FeatureError(f"{values.size} numbers do not fill rows of shape {shape}")
    return cast(values.reshape(-1, *shape), feature.dtype)


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """Recorded numbers as the type that the dataset declares, where that changes none of them.

    Raises:
        FeatureError: it would cut off fractions, wrap or overflow (the caller adds the place).
    """
    # What overflows is looked for below, so numpy need not warn of it.
    with np.errstate(over="ignore", invalid="ignore"):
        converted = values.astype(dtype, copy=False)
    if np.can_cast(values.dtype, converted.dtype, "safe"):
        return converted
    if converted.dtype.kind == "f":
        # Rounding is what a narrower float means; a number that becomes infinite is lost.
        lost = np.isinf(converted) & np.isfinite(values) if values.dtype.kind == "f" else False
    else:
        # Whole numbers must survive the way there and back.
        lost = converted.astype(values.dtype) != values
    if np.any(lost):
        raise FeatureError(f"holds {values.dtype} numbers that are no {dtype}")
    return converted
