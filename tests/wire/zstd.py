"""The system's libzstd through ctypes, its streaming call: a frame need not declare its size."""

from __future__ import annotations

import ctypes
import ctypes.util

from .reader import RECEIVE, ProtocolError


class ZstdBuffer(ctypes.Structure):
    """Mirror ZSTD_inBuffer and ZSTD_outBuffer, which have one layout."""

    _fields_ = [("start", ctypes.c_void_p), ("size", ctypes.c_size_t), ("position", ctypes.c_size_t)]


def load_zstd() -> ctypes.CDLL | None:
    """Return libzstd where the system has it."""
    name = ctypes.util.find_library("zstd")
    if name is None:
        return None
    library = ctypes.CDLL(name)
    library.ZSTD_createDStream.restype = ctypes.c_void_p
    library.ZSTD_freeDStream.argtypes = [ctypes.c_void_p]
    library.ZSTD_isError.argtypes = [ctypes.c_size_t]
    library.ZSTD_decompressStream.restype = ctypes.c_size_t
    library.ZSTD_decompressStream.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(ZstdBuffer),
        ctypes.POINTER(ZstdBuffer),
    ]
    return library


ZSTD = load_zstd()
HAS_ZSTD = ZSTD is not None


def zstd_decompress(packed: bytes) -> bytes:
    """Return what one whole zstd frame holds; raise ProtocolError for anything else."""
    if ZSTD is None:
        raise ProtocolError("a zstd body, but this host has no libzstd")
    stream = ZSTD.ZSTD_createDStream()
    room = ctypes.create_string_buffer(RECEIVE)
    held = ctypes.create_string_buffer(packed, len(packed))
    source = ZstdBuffer(ctypes.cast(held, ctypes.c_void_p), len(packed), 0)
    parts = []
    try:
        while True:
            target = ZstdBuffer(ctypes.cast(room, ctypes.c_void_p), len(room), 0)
            left = ZSTD.ZSTD_decompressStream(stream, ctypes.byref(target), ctypes.byref(source))
            if ZSTD.ZSTD_isError(left) or (left and not target.position and source.position == source.size):
                raise ProtocolError("a broken zstd body")
            parts.append(room.raw[: target.position])
            if left == 0:
                break
    finally:
        ZSTD.ZSTD_freeDStream(stream)
    if source.position != source.size:
        raise ProtocolError("bytes after the zstd frame")
    return b"".join(parts)
