"""What a file really is when it is not what its name says, in words that help."""

import os
from typing import Any

_HEAD = 256  # bytes that are looked at
_LFS = b"version https://git-lfs.github.com/spec/"
_GZIP, _ZSTD, _XZ, _BZIP = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\x00", b"BZh"
_PACKED = {_GZIP: "gzip", _ZSTD: "zstd", _XZ: "xz", _BZIP: "bzip2"}


def explain_content(head: bytes) -> str:
    """Says what the first bytes of a file tell about it when it cannot be read; "" is nothing.

    A clone without Git LFS leaves a pointer of 130 bytes in a file's place, a download may leave a
    web page or nothing at all, and some datasets are published packed.
    """
    if not head:
        return "the file is empty: its download or copy did not finish"
    if head.startswith(_LFS):
        return (
            "is a Git LFS pointer, not the file itself: run `git lfs pull` in the clone it comes "
            "from, or download the file"
        )
    for magic, name in _PACKED.items():
        if head.startswith(magic):
            return f"is packed with {name}: unpack it first"
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "is a web page, not the file itself: the download went wrong"
    return ""


def explain_file(path: Any) -> str:
    """Says the same of a file; "" where there is nothing to say or nothing to read."""
    try:
        # A path that is none of this machine opens its file itself.
        on_disk = isinstance(path, (str, os.PathLike))
        with open(path, "rb") if on_disk else path.open("rb") as file:
            return explain_content(file.read(_HEAD))
    # This explains another error, and must not hide it behind one of its own.
    except (OSError, TypeError, AttributeError):
        return ""


def is_pointer(path: Any) -> bool:
    """Whether a file is what a clone without Git LFS leaves in the place of a large one."""
    return "Git LFS" in explain_file(path)


def problem_of(path: Any, otherwise: str) -> str:
    """Says what a file that cannot be read is, or `otherwise` when its first bytes do not tell."""
    return explain_file(path) or otherwise


def is_foreign(path: Any) -> bool:
    """Whether a file lies beside data by accident: hidden, as what macOS leaves (`._name`)."""
    return path.name.startswith((".", "__MACOSX"))
