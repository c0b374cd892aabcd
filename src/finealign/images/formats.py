"""Tell by its first bytes what a file is, whatever its name says."""

from collections.abc import Mapping

HEAD = 64  # bytes of a file that are enough
# Formats that are read, by Pillow's names. No other decoder of Pillow is given a file: some start external programs
# (EPS), others read what is no photo. HEIF needs the package pillow-heif.
READ = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "HEIF")
# What the named formats are called where they are refused, and whether a photo is likely in them.
REFUSED: Mapping[str, tuple[str, bool]] = {
    "JPEG XL": ("a JPEG XL image", True),
    "PSD": ("a Photoshop file", True),
    "RAW": ("a camera's raw image", True),
    "EXR": ("an OpenEXR image", True),
    "HDR": ("a Radiance HDR image", True),
    "ICO": ("an icon", False),
    "SVG": ("an SVG drawing", False),
    "PDF": ("a PDF document", False),
    "EPS": ("a PostScript document", False),
    "FITS": ("a FITS file", False),
    "VIDEO": ("a video", False),
}

_MAGIC = {  # a file starts with one of these
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",  # BigTIFF
    b"MM\0+": "TIFF",
    b"II\0*": "TIFF",  # Pillow reads these as well
    b"MM*\0": "TIFF",
    b"\xff\x4f\xff\x51": "JPEG2000",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL",
    b"8BPS": "PSD",
    b"FUJIFILMCCD-RAW": "RAW",
    b"IIU\0": "RAW",
    b"IIRO": "RAW",
    b"v/1\x01": "EXR",
    b"#?RADIANCE": "HDR",
    b"\0\0\x01\0": "ICO",
    b"<svg": "SVG",
    b"%PDF": "PDF",
    b"%!PS": "EPS",
    b"SIMPLE  =": "FITS",
    b"\x1aE\xdf\xa3": "VIDEO",
}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}


def format_of(head: bytes) -> str | None:
    """The format, of those in ``READ`` and ``REFUSED``, by the first ``HEAD`` bytes of a file; else None."""
    if head[4:8] == b"ftyp":
        return _of_brands(head)
    if head[:4] == b"RIFF":
        return {b"WEBP": "WEBP", b"AVI ": "VIDEO"}.get(head[8:12])
    if len(head) > 2 and head[:1] == b"P" and head[1:2] in b"123456" and head[2:3] in b" \t\r\n#":
        return "PPM"
    if head[:4] == b"II*\0" and head[8:10] == b"CR":  # Canon's first raw format, in the shape of a TIFF
        return "RAW"
    if head[:5] == b"<?xml":
        return "SVG" if b"<svg" in head else None
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def is_photo(name: str | None) -> bool:
    """Whether files of this format are meant as images, those included that cannot be read."""
    return name in READ or (name in REFUSED and REFUSED[name or ""][1])


def why_refused(name: str | None) -> str:
    """Why a file of this format is not read, in a few words."""
    if name == "HEIF":
        return "a HEIC image, for which a package is missing: pip install 'finealign[heic]'"
    if name not in REFUSED:
        return "not an image"
    return f"{REFUSED[name or ''][0]}, which is not supported; save it as JPEG or PNG"


def _of_brands(head: bytes) -> str:
    """The format of a file of the MP4 family, by the brands that it says it is compatible with."""
    end = max(16, min(len(head), int.from_bytes(head[:4], "big")))
    brands = {head[8:12], *(head[start : start + 4] for start in range(16, end, 4))}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    if brands & _HEIF_BRANDS:
        return "HEIF"
    return "RAW" if b"crx " in brands else "VIDEO"
