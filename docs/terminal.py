"""Draws what a command prints on a terminal, cell by cell: no font has all of braille's dots at one width."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

_CELL = (8, 17)
_FONT = "DejaVuSansMono.ttf"  # Debian's fonts-dejavu-core
_THEME = TerminalTheme(
    *((22, 25, 29), (216, 220, 226)),
    [(60, 66, 75), (240, 100, 90), (70, 190, 130), (230, 160, 70), (80, 150, 230), (200, 120, 190), (80, 190, 200)]
    + [(216, 220, 226)],
    [(110, 118, 130), (250, 130, 120), (100, 215, 150), (245, 190, 100), (92, 179, 240), (221, 148, 198)]
    + [(110, 215, 225), (255, 255, 255)],
)
_ROUND = str.maketrans("╭╮╰╯", "┌┐└┘")
_DOTS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3))  # of the bits of a braille character


def draw_terminal(text: str, width: int) -> Image.Image:
    """A picture of a text with ANSI colours, on a terminal of so many columns."""
    console = Console(width=width, file=io.StringIO(), force_terminal=True, highlight=False, color_system="truecolor")
    lines = console.render_lines(Text.from_ansi(text), pad=False)
    wide, high = _CELL
    image = Image.new("RGB", (width * wide + 24, len(lines) * high + 20), tuple(_THEME.background_color))
    draw, font = ImageDraw.Draw(image), ImageFont.truetype(_FONT, 13)
    for row, line in enumerate(lines):
        column = 0
        for segment in line:
            style = segment.style
            colour = tuple(_THEME.foreground_color)
            if style is not None and style.color is not None:
                colour = tuple(style.color.get_truecolor(_THEME))
            if style is not None and style.dim:
                colour = tuple((2 * c + b) // 3 for c, b in zip(colour, _THEME.background_color, strict=True))
            for sign in segment.text:
                _draw_sign(
                    draw, font, sign, 12 + column * wide, 10 + row * high, colour, bold=bool(style and style.bold)
                )
                column += 1
    return image


def _draw_sign(
    draw: ImageDraw.ImageDraw, font: Any, sign: str, x: int, y: int, colour: tuple[int, ...], *, bold: bool
) -> None:
    wide, high = _CELL
    sign = sign.translate(_ROUND)
    bits = ord(sign) - 0x2800
    if 0 <= bits < 256:
        for bit, (across, down) in enumerate(_DOTS):
            if bits >> bit & 1:
                left, top = x + 1 + 4 * across, y + 1 + 4 * down
                draw.rectangle((left, top, left + 2, top + 2), fill=colour)
    elif "▁" <= sign <= "█":
        draw.rectangle((x, y + high - 2 * (ord(sign) - 0x2580), x + wide - 2, y + high - 1), fill=colour)
    elif sign in "─━╸╺┌┐└┘├┤┬┴│":
        cx, cy, thick = x + wide // 2, y + high // 2, 1 + (sign in "━╸╺")
        if sign != "│":
            draw.line(
                (cx if sign in "┌└├╺" else x, cy, cx if sign in "┐┘┤╸" else x + wide, cy), fill=colour, width=thick
            )
        if sign not in "─━╸╺":
            top, bottom = (cy if sign in "┌┐┬" else y), (cy if sign in "└┘┴" else y + high)
            draw.line((cx, top, cx, bottom), fill=colour)
    else:
        draw.text((x, y + 1), sign, fill=colour, font=font, stroke_width=0)
        if bold:
            draw.text((x + 0.6, y + 1), sign, fill=colour, font=font)
