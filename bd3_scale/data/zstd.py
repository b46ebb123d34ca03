"""Read zstd files and decompress them on the way."""

from __future__ import annotations

import io
from typing import BinaryIO

import zstandard

# A zstd block has at least 4 bytes and decompresses to at most 128 KiB, so this much decompresses to at most 32 MiB.
READ_BYTES = 1 << 10


class ZstdFile(io.RawIOBase):
    """The bytes compressed in the zstd frames of `raw`; EOFError if the last frame is incomplete.

    `zstandard`'s own reader takes a truncated file for a complete one.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._unpacked:
            self._packed = self._packed or self._raw.read(READ_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is incomplete")
                return 0
            frame = self._frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self._unpacked = memoryview(frame.decompress(self._packed))
            self._packed = frame.unused_data
            self._frame = None if frame.eof else frame
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size
