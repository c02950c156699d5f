"""What a JPEG's header says, and the scales at which libjpeg decodes one."""

import struct

JPEG_START = b"\xff\xd8"
_OTHER_FRAMES = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
# libjpeg-turbo has 3/8 and others too, but Pillow offers these alone
_SCALES = (8, 4, 2)
# px; below this, two of libjpeg-turbo's scales can give the same size, and simplejpeg takes the smaller one
_LEAST_SCALED = 8


def plain_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an 8-bit grey or colour JPEG, Huffman-coded, without Exif or XMP; None for anything else."""
    if data[:2] != JPEG_START:
        return None
    size, position = None, 2
    try:
        while True:
            prefix, marker, length = struct.unpack_from(">BBH", data, position)
            if marker == 0xDA:  # the scan begins
                return size
            # APP1 is where Exif and XMP are: both can turn the image, and Pillow reads them
            if prefix != 0xFF or marker == 0xE1 or marker < 0xC0 or marker in _OTHER_FRAMES:
                return None
            if marker in (0xC0, 0xC1, 0xC2):
                precision, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
                if precision != 8 or components not in (1, 3) or size is not None:
                    return None
                size = height, width
            position += 2 + length
    except struct.error:
        return None


def shrunk(extent: int, scale: int) -> int:
    """px that libjpeg makes of `extent` px: it rounds up."""
    return -(-extent // scale)


def largest_scale(extent: int, least: int) -> int:
    """The largest of 1, 2, 4 and 8 that leaves `least` px of `extent` px."""
    least = max(least, _LEAST_SCALED)
    return next((scale for scale in _SCALES if shrunk(extent, scale) >= least), 1)
