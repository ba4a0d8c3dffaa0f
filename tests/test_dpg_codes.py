"""Codes as patterns: what is drawn is what a reader reads, and what cannot be drawn is refused before any work."""

import re
import string
import struct
import zlib

import numpy as np
import pytest
import torch
import zxingcpp
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dpg.codes import png_image, qr_image, scan

PRINTABLE = string.ascii_letters + string.digits + "!#$%&()*+,-./:;<=>?@[]^_{|}~"
SIDES = {"M1": 11, "M2": 13, "M3": 15, "M4": 17, 1: 21, 2: 25, 7: 45}
# The standard's capacity in digits and bytes at the lowest level (ISO/IEC 18004, table 7); M1 and M2 hold no bytes.
DIGITS = {"M1": 5, "M2": 10, "M3": 23, "M4": 35, 1: 41, 2: 77}
BYTES = {"M3": 9, "M4": 15, 1: 17, 2: 32}


def read(picture, *, rotations=0):
    """An independent reading: pixels set one by one into a Pillow image of 6 pixels a module."""
    rows, columns = picture.shape
    image = Image.new("L", (columns + 8, rows + 8), 255)
    for row in range(rows):
        for column in range(columns):
            image.putpixel((column + 4, row + 4), 255 if picture[row, column] == 1 else 0)
    large = image.resize((6 * (columns + 8), 6 * (rows + 8)), Image.Resampling.NEAREST).rotate(90 * rotations)
    return [found.text for found in zxingcpp.read_barcodes(large)]


def save(path, picture, mode="L"):
    pixels = np.where(picture.numpy() == 1, 255, 0).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@settings(max_examples=25)
@given(st.text(PRINTABLE, min_size=1, max_size=40))
def test_a_code_is_read_as_its_text(text):
    picture = qr_image(text)
    assert set(picture.unique().tolist()) == {-1.0, 1.0}
    assert read(picture) == [text]
    assert scan(picture) == text


@settings(max_examples=25)
@given(st.text(string.digits, min_size=1, max_size=35), st.sampled_from([0, 1, 2, 3, None]))
def test_a_micro_code_is_read_as_its_text(text, mask):
    picture = qr_image(text, micro=True, mask=mask)
    assert picture.shape[0] in (11, 13, 15, 17)
    assert read(picture) == [text] and scan(picture) == text


@pytest.mark.parametrize("version", SIDES)
def test_a_version_has_its_side(version):
    picture = qr_image("67", version=version)
    assert picture.shape == (SIDES[version], SIDES[version])
    assert read(picture, rotations=1) == ["67"]


def test_the_finder_pattern_is_dark_outside_and_inside():
    corner = qr_image("DPG", version="M3")[:8, :8]
    wanted = """
        #######.
        #.....#.
        #.###.#.
        #.###.#.
        #.###.#.
        #.....#.
        #######.
        ........
    """.split()
    assert corner.tolist() == [[-1.0 if module == "#" else 1.0 for module in row] for row in wanted]


@pytest.mark.parametrize(("micro", "side"), [(True, 13), (False, 21), (None, 13)])
def test_micro_is_a_choice(micro, side):
    assert qr_image("DPG", micro=micro).shape == (side, side)


@settings(max_examples=25)
@given(st.text(string.ascii_letters, min_size=1, max_size=7), st.sampled_from(["L", "M", "Q", "H"]), st.data())
def test_damaged_codewords_are_repaired(text, level, data):
    repairs = {"L": 2, "M": 4, "Q": 6, "H": 8}[level]  # Codewords of 26 in version 1 (ISO/IEC 18004, table 9).
    picture = qr_image(text, version=1, error_correction=level)
    # Two-module-wide columns of data at the right edge, upwards from the corner: a codeword is four modules high.
    damaged = data.draw(st.lists(st.integers(0, 2), max_size=min(repairs, 3) - 1, unique=True))
    for i in damaged:
        picture[21 - 4 * (i + 1) : 21 - 4 * i, 19:21] *= -1
    assert scan(picture) == text


@settings(max_examples=25)
@given(st.text(PRINTABLE, min_size=1, max_size=15))
def test_a_flipped_code_is_not_read(text):
    assert scan(-qr_image(text)) is None


def test_what_is_no_code_is_not_read():
    assert scan(torch.ones(15, 15)) is None
    assert scan(torch.zeros(15, 15)) is None
    noise = torch.randn(21, 21, generator=torch.Generator().manual_seed(0))
    assert scan(noise) is None


def test_only_signs_matter_and_zero_is_black():
    picture = qr_image("DPG", version="M3")
    sizes = torch.rand(picture.shape, generator=torch.Generator().manual_seed(0)) + 1e-9
    assert scan(1e-7 * sizes * picture) == "DPG"
    assert scan(picture.clamp(min=0)) == "DPG"
    assert scan(picture.clamp(max=0)) is None


@pytest.mark.parametrize("signs", [torch.ones(3), torch.ones(0, 4), torch.tensor([[1.0, float("nan")]])])
def test_only_a_picture_can_be_scanned(signs):
    with pytest.raises(ValueError, match="picture of finite numbers"):
        scan(signs)


@pytest.mark.parametrize(
    ("capacity", "character", "version"),
    [(DIGITS, "7", version) for version in DIGITS] + [(BYTES, "a", version) for version in BYTES],
)
def test_the_longest_text_that_fits_is_named(capacity, character, version):
    most = capacity[version]
    text = character * (most + 3)
    assert scan(qr_image(text[:most], version=version)) == text[:most]
    for longer in (text, text[: most + 1]):
        with pytest.raises(ValueError, match=f"version '?{version}'?: '{character * most}', its first {most}, would"):
            qr_image(longer, version=version)


@settings(max_examples=25)
@given(st.text(PRINTABLE, min_size=16, max_size=200), st.sampled_from(["M3", "M4", 1, 2]))
def test_the_beginning_that_is_said_to_fit_is_the_longest(text, version):
    try:
        qr_image(text, version=version)
    except ValueError as error:
        length = int(re.search(r"its first (\d+), would", str(error))[1])
        assert scan(qr_image(text[:length], version=version)) == text[:length]
        with pytest.raises(ValueError, match=f"its first {length}, would"):
            qr_image(text[: length + 1], version=version)


def test_a_text_of_which_nothing_fits():
    with pytest.raises(ValueError, match="not even its first character would"):
        qr_image("small letters", version="M1")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"version": "M9"}, "M9"),
        ({"version": 41}, "41"),
        ({"error_correction": "Z"}, "Z"),
        ({"error_correction": "H", "micro": True}, '"H" is not available for Micro'),
        ({"version": 1, "micro": True}, "1"),
        ({"version": "M2", "micro": False}, "M2"),
        ({"mask": 4, "micro": True}, '"4"'),
        ({"mask": 8, "micro": False}, '"8"'),
    ],
)
def test_a_code_that_does_not_exist_is_refused(options, named):
    with pytest.raises(ValueError, match=f"no such QR code.*{re.escape(named)}"):
        qr_image("67", **options)


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="empty"):
        qr_image("")


def test_a_text_that_would_be_read_otherwise_is_refused(monkeypatch):
    monkeypatch.setattr("dpg.codes.scan", lambda picture: "D?G")
    with pytest.raises(ValueError, match="'DPG' is read as 'D[?]G'"):
        qr_image("DPG")


@settings(max_examples=25)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 2**32))
def test_a_picture_survives_its_file(tmp_path_factory, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    picture = 2.0 * torch.randint(0, 2, (rows, columns), generator=generator) - 1
    folder = tmp_path_factory.mktemp("png")
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA"):
        assert torch.equal(png_image(save(folder / f"{mode}.png", picture, mode)), picture)


def test_a_code_in_a_file_is_still_a_code(tmp_path):
    assert scan(png_image(save(tmp_path / "code.png", qr_image("DPG")))) == "DPG"


def test_a_missing_picture(tmp_path):
    with pytest.raises(ValueError, match="there is no picture .*none.png"):
        png_image(tmp_path / "none.png")


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        png_image(tmp_path)


def test_a_text_file_is_no_picture(tmp_path):
    (tmp_path / "notes.png").write_text("a picture")
    with pytest.raises(ValueError, match="no picture that Pillow can read"):
        png_image(tmp_path / "notes.png")


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_a_damaged_file_is_refused_or_whole(tmp_path_factory, cut):
    picture = qr_image("DPG")
    path = save(tmp_path_factory.mktemp("png") / "code.png", picture)
    content = path.read_bytes()
    path.write_bytes(content[: cut % (len(content) + 1)])
    try:
        assert torch.equal(png_image(path), picture)
    except ValueError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("value", [1, 128, 254])
def test_grey_is_refused_with_its_place(tmp_path, value):
    pixels = np.full((4, 6), 255, np.uint8)
    pixels[2, 5] = value
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=rf"row 2, column 5 has .* \({value}, {value}, {value}, 255\)"):
        png_image(tmp_path / "grey.png")


@pytest.mark.parametrize("colour", [(255, 0, 0, 255), (0, 0, 0, 0), (255, 255, 255, 200)])
def test_colour_and_transparency_are_refused(tmp_path, colour):
    Image.new("RGBA", (3, 3), colour).save(tmp_path / "colour.png")
    with pytest.raises(ValueError, match=f"row 0, column 0 has .* {re.escape(str(colour))}"):
        png_image(tmp_path / "colour.png")


def test_deep_pixels_are_refused(tmp_path):
    Image.fromarray(np.full((3, 3), 30_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="kind I;16"):
        png_image(tmp_path / "deep.png")


@pytest.mark.parametrize("size", [(65, 3), (3, 65), (21 * 8, 21 * 8)])
def test_a_large_picture_is_refused(tmp_path, size):
    Image.new("1", size, 1).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=f"{size[1]} x {size[0]} pixels.*at most 64"):
        png_image(tmp_path / "large.png")


def test_a_picture_of_a_billion_pixels_is_refused_unread(tmp_path):
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 1, 0, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    data = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + data)
    with pytest.raises(ValueError, match="far too large"):
        png_image(tmp_path / "bomb.png")
