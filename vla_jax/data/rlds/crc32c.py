"""CRC-32C (Castagnoli, RFC 3720 appendix B.4): google-crc32c's where it is installed, else numpy's.

The numpy one is a hundred times slower and needs nothing. A CRC is linear over GF(2): the buffer is
cut into lanes that are advanced together, one byte of each at a time, and the lanes' remainders are
joined pairwise by the operator "append n zero bytes", a 32 x 32 bit matrix that is squared from one
level to the next.
"""

import functools

import numpy as np
from jaxtyping import UInt32

try:
    import google_crc32c
except ImportError:
    google_crc32c = None

FAST = google_crc32c is not None and google_crc32c.implementation == "c"
_POLYNOMIAL = 0x82F63B78  # reflected
_LANE_BYTES = 256  # about; keeps the per-byte numpy calls few and the lanes wide


@functools.cache
def _table() -> UInt32[np.ndarray, "256"]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table


@functools.cache
def _table_list() -> list[int]:
    return _table().tolist()


def crc32c(data: bytes) -> int:
    """CRC-32C of `data`, as an unsigned 32-bit integer."""
    return google_crc32c.value(data) if google_crc32c else numpy_crc32c(data)


def numpy_crc32c(data: bytes) -> int:
    """CRC-32C of `data` without google-crc32c."""
    if len(data) < 2 * _LANE_BYTES:
        table, crc = _table_list(), 0xFFFFFFFF
        for byte in data:
            crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
        return crc ^ 0xFFFFFFFF
    return int(_remainder(data)) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """The checksum TFRecord files store: rotated by 15 bits plus a constant."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _remainder(data: bytes) -> np.uint32:
    table = _table()
    # A power of two, so that the lanes can be joined in pairs to the end.
    lanes = 1 << ((len(data) // _LANE_BYTES).bit_length() - 1)
    width = -(-len(data) // lanes)
    # Leading zeros leave a zero register unchanged; the initial value of all ones is the same as
    # inverting the first four bytes. The 32 extra lanes carry unit vectors over `width` zero bytes:
    # the columns of the joining operator.
    padded = np.zeros((lanes + 32, width), np.uint8)
    flat = padded[:lanes].reshape(-1)
    flat[-len(data) :] = np.frombuffer(data, np.uint8)
    flat[-len(data) : len(flat) - len(data) + 4] ^= 0xFF
    register = np.zeros(lanes + 32, np.uint32)
    register[lanes:] = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for column in np.ascontiguousarray(padded.T):
        register = table[(register ^ column) & np.uint32(0xFF)] ^ (register >> np.uint32(8))
    crc, operator = register[:lanes], register[lanes:]
    while len(crc) > 1:
        # The earlier lane of a pair is moved over the bytes of the later one.
        crc = _apply(operator, crc[0::2]) ^ crc[1::2]
        operator = _apply(operator, operator)  # joined lanes are twice as long
    return crc[0]


def _apply(
    operator: UInt32[np.ndarray, "32"], vectors: UInt32[np.ndarray, "n"]
) -> UInt32[np.ndarray, "n"]:
    bits = (vectors[:, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    return np.bitwise_xor.reduce(bits * operator, axis=1)
