"""What is left of files in which something is too large or missing; tests/test_images.py reads such files."""

import io

import pytest
from PIL import Image, PngImagePlugin

from finealign.images.repairs import LONGEST_TEXT, without_text


def png(**texts: str) -> bytes:
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new("RGB", (2, 2), "red").save(file, "PNG", pnginfo=info)
    return file.getvalue()


@pytest.mark.parametrize("missing", range(5))
def test_without_text__a_png_without_texts_stays_as_it_is_even_cut_short(missing: int) -> None:
    cut = png()[: len(png()) - missing]
    assert without_text(cut) == cut


def test_without_text__short_plain_texts_stay_while_there_is_room() -> None:
    room = LONGEST_TEXT - len("a\0")
    assert without_text(png(a="x" * room)) == png(a="x" * room)
    assert without_text(png(a="x" * (room + 1))) == png()
    assert without_text(png(a="x" * (room - 2), b="")) == png(a="x" * (room - 2), b="")
    assert without_text(png(a="x" * (room - 1), b="")) == png(a="x" * (room - 1))
