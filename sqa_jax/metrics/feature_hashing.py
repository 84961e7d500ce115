"""Feature hashing: strings to signed counts in a vector of fixed size, without a vocabulary.

The hashing trick of Weinberger et al. (2009, arXiv:0902.2206, section 2), with MurmurHash3 (x86, 32 bits, seed 0):
column and sign of a string are those of scikit-learn's `FeatureHasher`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
from jaxtyping import Int
from scipy import sparse

_ROWS_AT_ONCE = 256  # whose strings are held in memory


def murmurhash3(strings: Sequence[str]) -> Int[np.ndarray, " N"]:
    """Signed 32-bit MurmurHash3 of each string's UTF-8 bytes (Appleby, MurmurHash3_x86_32, seed 0)."""
    encoded = [string.encode() for string in strings]
    lengths = np.array([len(text) for text in encoded], np.uint32)
    width = 4 * (int(lengths.max(initial=0)) // 4 + 1)
    blocks = np.array(encoded, f"S{width}").view("<u4").reshape(len(encoded), width // 4)  # padded with zeros
    hashes = np.zeros(len(encoded), np.uint32)
    for k in range(blocks.shape[1]):
        mixed = _rotate(blocks[:, k] * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
        hashes ^= np.where(lengths > 4 * k, mixed, np.uint32(0))
        # Only a full block of four bytes advances the state; a shorter tail is just mixed in.
        advanced = _rotate(hashes, 13) * np.uint32(5) + np.uint32(0xE6546B64)
        hashes = np.where(lengths >= 4 * (k + 1), advanced, hashes)
    hashes ^= lengths
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashes = (hashes ^ (hashes >> np.uint32(shift))) * np.uint32(factor)
    return (hashes ^ (hashes >> np.uint32(16))).view(np.int32)


def _rotate(values: np.ndarray, bits: int) -> np.ndarray:
    """Rotates 32-bit integers to the left."""
    return (values << np.uint32(bits)) | (values >> np.uint32(32 - bits))


def hashed_counts(rows: Iterable[Sequence[str]], columns: int) -> sparse.csr_array:
    """A sparse [N, columns] matrix: string s adds its sign to column |hash(s)| mod `columns` of its row."""
    rows = iter(rows)
    indices, values, lengths = [], [], []
    while chunk := list(islice(rows, _ROWS_AT_ONCE)):
        known: dict[str, int] = {}
        positions = [known.setdefault(string, len(known)) for row in chunk for string in row]
        hashes = murmurhash3(list(known)).astype(np.int64)[np.array(positions, np.int64)]
        indices.append(np.abs(hashes) % columns)
        values.append(np.where(hashes >= 0, 1.0, -1.0))
        lengths += [len(row) for row in chunk]
    joined = [np.concatenate(arrays) if arrays else np.zeros(0) for arrays in (values, indices)]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    matrix = sparse.csr_array((joined[0], joined[1].astype(np.int64), offsets), shape=(len(lengths), columns))
    matrix.sum_duplicates()
    return matrix
