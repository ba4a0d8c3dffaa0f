"""Black-and-white pictures for the weights: QR codes, pictures from PNG files, and reading a code back.

A picture is a matrix of +1 (white) and -1 (black). The white margin that a code needs is no part of it; `scan` adds it.
"""

from bisect import bisect_left
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import segno
import torch
import torch.nn.functional as F
import zxingcpp
from einops import repeat
from jaxtyping import Bool, Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

Picture: TypeAlias = Float[Tensor, "rows columns"]

LARGEST = 64  # Pixels a side of a picture: a weight of a hidden dimension and a token for each.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # Pillow's names of what a black-and-white picture may be kept in.
FORMATS = [zxingcpp.BarcodeFormat.QRCode, zxingcpp.BarcodeFormat.MicroQRCode]


def qr_image(
    text: str,
    *,
    version: str | int | None = None,
    micro: bool | None = None,
    error_correction: str | None = None,
    mask: int | None = None,
) -> Picture:
    """`text` as a QR code: +1 for a light module, -1 for a dark one, without the margin.

    Args:
        version: "M1" to "M4" (11, 13, 15, 17 modules a side) or 1 to 40 (21, 25, ...); None for the smallest that fits.
        micro: True for a Micro QR code, False for none; None for whichever is smaller.
        error_correction: "L", "M", "Q" or "H"; None for the highest that needs no larger code. "M1" has none.
        mask: 0 to 3 in a Micro QR code, 0 to 7 in others; None for the one that the standard prefers.

    Raises:
        ValueError: for options that no code has, or if the code does not hold the text, naming the longest beginning
            that fits; or if the reader would not read it back as it was given.
    """
    if not text:
        raise ValueError("the text of the code is empty. Pass at least one character.")
    try:
        code = _encode(text, version, micro, error_correction, mask)
    except segno.DataOverflowError:
        options = {"version": version, "micro": micro, "error_correction": error_correction}
        given = ", ".join(f"{name} {value!r}" for name, value in options.items() if value is not None)
        fits = _longest_beginning(text, version, micro, error_correction, mask)
        raise ValueError(
            f"{text[:80]!r}, of {len(text)} characters, does not fit a QR code of {given or 'any version'}: "
            + (f"{fits[:80]!r}, its first {len(fits)}, would. " if fits else "not even its first character would. ")
            + "Pass a shorter text (digits take least room, then capitals), a larger version or lower error_correction."
        ) from None
    except ValueError as error:  # Of segno: names the option and its values.
        raise ValueError(f"there is no such QR code. {error}.") from error
    picture = torch.tensor([[-1.0 if module else 1.0 for module in row] for row in code.matrix])
    if (read := scan(picture)) != text:
        raise ValueError(
            f"the QR code of {text[:80]!r} is read as {(read or '')[:80]!r}. Pass a text of letters, digits and signs "
            "that are in ASCII."
        )
    return picture


def png_image(path: str | Path, *, largest: int = LARGEST) -> Picture:
    """A picture file as a pattern, a pixel a weight: +1 where it is white, -1 where it is black.

    Args:
        path: any format that Pillow reads; PNG keeps pixels as they are.
        largest: most pixels a side.

    Raises:
        ValueError: if the file is missing, no picture, too large or too deep, or has other colours, saying where.
    """
    try:
        with Image.open(path) as opened:
            if max(opened.size) > largest:  # Before any pixel is decoded.
                raise ValueError(
                    f"{path} has {opened.height} x {opened.width} pixels, but one pixel is one weight: at most "
                    f"{largest} a side. Scale the picture down, to one pixel a module if it is a code."
                )
            if opened.mode not in MODES:  # Pillow would clip deeper pixels, and make greys white.
                raise ValueError(f"{path} has pixels of kind {opened.mode}. Save it with at most 8 bits a channel.")
            pixels = np.asarray(opened.convert("RGBA"))
    except FileNotFoundError:
        raise ValueError(f"there is no picture {path}. Pass the path of a PNG file.") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no picture that Pillow can read. Pass a black-and-white PNG file.") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"the picture {path} is far too large ({error}). At most {largest} pixels a side.") from error
    except (OSError, SyntaxError) as error:  # Pillow raises a SyntaxError for some damaged files.
        raise ValueError(f"the picture {path} cannot be read ({error}). Pass an undamaged PNG file.") from error
    white, black = ((pixels == (value, value, value, 255)).all(axis=2) for value in (255, 0))
    if not (white | black).all():
        row, column = np.argwhere(~(white | black))[0]
        colour = tuple(pixels[row, column].tolist())
        raise ValueError(
            f"{path} is not black and white: the pixel in row {row}, column {column} has (red, green, blue, opacity) "
            f"{colour}. Save it with pure black and pure white only, without smoothing or transparency."
        )
    return torch.where(torch.from_numpy(white), 1.0, -1.0)


def scan(signs: Picture) -> str | None:
    """What a barcode reader (zxing-cpp) reads in a picture, with a white margin around it; None if nothing.

    Args:
        signs: positive is white. Zero and negative are black: a weight that did not move is not white.
    """
    if signs.ndim != 2 or signs.numel() == 0 or not bool(torch.isfinite(signs).all()):
        raise ValueError(f"a picture of finite numbers, (rows, columns), was expected; got shape {tuple(signs.shape)}.")
    image = _enlarged(signs > 0)
    options = {"formats": FORMATS, "try_invert": False, "text_mode": zxingcpp.TextMode.Plain}
    # First as a photograph, in which a code must be found; then as a picture of a code and nothing else, which it is.
    readings = (code for pure in (False, True) for code in zxingcpp.read_barcodes(image, is_pure=pure, **options))
    return next((code.text for code in readings if code.valid), None)


def _encode(
    text: str, version: str | int | None, micro: bool | None, error_correction: str | None, mask: int | None
) -> segno.QRCode:
    # A level that was asked for is kept; otherwise segno raises it as far as the version allows.
    boost = error_correction is None
    return segno.make(text, version=version, micro=micro, error=error_correction, mask=mask, boost_error=boost)


def _longest_beginning(text: str, *options: Any) -> str:
    """The longest beginning of `text` that fits a code of these options, where the whole does not."""

    def overflows(length: int) -> bool:
        try:
            _encode(text[:length], *options)
        except segno.DataOverflowError:
            return True
        return False

    # A beginning of what fits, fits.
    return text[: bisect_left(range(1, len(text)), True, key=overflows)]


def _enlarged(white: Bool[Tensor, "rows columns"], margin: int = 4, scale: int = 8) -> np.ndarray:
    """The picture as grey values, `scale` pixels a module, with `margin` light modules on each side."""
    framed = F.pad(white, (margin,) * 4, value=True)
    large = repeat(framed, "rows columns -> (rows a) (columns b)", a=scale, b=scale)
    return large.numpy(force=True).astype(np.uint8) * 255
