"""Decompression of gzip and zstd files: of one member or several, padded, or damaged at some place."""

import zlib
from collections.abc import Callable, Iterator

_BLOCK = 1 << 20  # bytes given at a time, or a little more
_FED = 1 << 12  # compressed bytes at a time: no more than 128 MiB come out, whatever a file claims
_MAX_WINDOW = 1 << 31  # bytes; zstd's largest, of `--long=31`: a frame takes what it declares, no more
_MAGIC_BYTES = 4


def decompressed(file, kind: str, warn: Callable[[str], None]) -> Iterator[bytes]:
    """Yields the bytes of all members (gzip) or frames (zstd), one after the other, in blocks.

    Zeros after a member are padding. Other bytes there that begin no member are left out, as `gzip -d`
    leaves them out, and told to `warn`.

    Args:
      file: binary, seekable, at its beginning.
      kind: "gzip" or "zstd".

    Raises:
      OSError: damaged or cut short; what lies before has been given by then.
    """
    held, size, failure = [], 0, None
    try:
        for piece in _pieces(file, kind, warn):
            held.append(piece)
            size += len(piece)
            if size >= _BLOCK:
                yield b"".join(held)
                held, size = [], 0
    except OSError as error:
        failure = error
    if held:
        yield b"".join(held)
    if failure is not None:
        raise failure


def _pieces(file, kind, warn) -> Iterator[bytes]:
    new_decoder, errors, begins = _format(kind)
    data, is_first = file.read(_FED), True
    while data:
        if not begins(data):
            if is_first:
                raise OSError(f"not what {kind} writes")
            warn(f"bytes after its last {kind} member belong to none, and are left out")
            return
        begin, decoder = file.tell() - len(data), new_decoder()
        while not decoder.eof:
            data = data or file.read(_FED)
            if not data:
                raise OSError(f"cut short: it ends inside a {kind} member")
            try:
                piece = decoder.decompress(data)
            except errors as error:
                yield from _before_damage(file, new_decoder(), errors, begin, data)
                raise OSError(f"damaged: {error}") from error
            yield piece
            data = decoder.unused_data
        data, is_first = _without_padding(file, data), False


def _before_damage(file, decoder, errors, begin: int, data: bytes) -> Iterator[bytes]:
    """Yields the good part of `data`, the last bytes read: a member that began at `begin` is damaged.

    A decoder that fails gives nothing of the call it fails in: so the bytes are fed again, one at a time.
    """
    end = file.tell() - len(data)
    file.seek(begin)
    while file.tell() < end:
        decoder.decompress(file.read(min(_FED, end - file.tell())))
    try:
        for byte in data:
            yield decoder.decompress(bytes([byte]))
    except errors:
        return


def _without_padding(file, data: bytes) -> bytes:
    """`data` and what follows it, from the first byte on that is not zero, as far as it tells what it is."""
    while len(data := data.lstrip(b"\0")) < _MAGIC_BYTES and (more := file.read(_FED)):
        data += more
    return data


def _format(kind: str):
    """(makes a decoder of one member, what it raises, whether bytes begin a member)."""
    if kind == "gzip":
        return (lambda: zlib.decompressobj(31)), zlib.error, lambda data: data.startswith(b"\x1f\x8b\x08")
    import zstandard

    def begins(data):  # a frame, or one that is to be skipped
        is_skippable = data[1:4] == b"\x2a\x4d\x18" and data[0] >> 4 == 5
        return data.startswith(b"\x28\xb5\x2f\xfd") or is_skippable

    context = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    return context.decompressobj, zstandard.ZstdError, begins
