"""Cut a PNG down to the chunks its pixels need: Pillow refuses a whole file because of one large text chunk."""

import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ANCILLARY = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")  # beside the critical ones, what decides pixels
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_TURNING = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # texts in which Pillow looks for the orientation
# a compressed text above this is taken for a bomb
MAX_TEXT_BYTES = 32 * 2**20


def bare_png(data: bytes) -> bytes | None:
    """The file without ancillary chunks that say nothing of the pixels; None where it is no PNG, or none is left out.

    Texts (a generator's whole workflow, of many megabytes), profiles and private chunks go, whatever is wrong with
    them; transparency, animation and orientation stay. What follows the last whole chunk stays too.
    """
    if not data.startswith(SIGNATURE):
        return None
    kept = [SIGNATURE]
    for name, whole in _chunks(data):
        is_critical = not name[:1].islower()
        kept.append(whole if is_critical or name in _ANCILLARY else _turning_text(name, whole[8:-4]))
    bare = b"".join(kept)
    return bare if bare != data else None


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and bytes (length, name, content, checksum) of each chunk; the last one may be cut off."""
    position = len(SIGNATURE)
    while position < len(data):
        length, name = struct.unpack_from(">I4s", data, position) if position + 8 <= len(data) else (0, b"")
        yield name, data[position : position + 12 + length]
        position += 12 + length


def _turning_text(name: bytes, content: bytes) -> bytes:
    """A text chunk that can hold the orientation, as an uncompressed tEXt; b"" for any other chunk."""
    keyword, _, rest = content.partition(b"\0")
    if name not in _TEXTS or keyword not in _TURNING:
        return b""
    is_compressed = name == b"zTXt"
    if name == b"zTXt":
        rest = rest[1:]  # method of compression: there is only one
    elif name == b"iTXt":
        is_compressed, rest = rest[:1] != b"\0", rest[2:].split(b"\0", 2)[-1]  # language, translated keyword, text
    if is_compressed:
        inflate = zlib.decompressobj()
        try:
            rest = inflate.decompress(rest, MAX_TEXT_BYTES)
        except zlib.error:
            return b""
    if len(rest) >= MAX_TEXT_BYTES:
        return b""
    chunk = b"tEXt" + keyword + b"\0" + rest
    return struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
