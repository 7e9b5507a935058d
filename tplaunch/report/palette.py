"""Colours of pictures: runs that the colour-blind can tell apart, on paper and in the dark."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Palette:
    """Colours of a background.

    Args:
        runs: of curves, in order; they come again after the last.
        parts: of stacked bars.
    """

    background: str
    surface: str
    ink: str
    muted: str
    grid: str
    runs: tuple[str, ...]
    parts: tuple[str, ...]
    good: str
    warn: str
    bad: str

    def run(self, number: int) -> str:
        return self.runs[number % len(self.runs)]


# After Okabe and Ito (2008), darker on white and lighter on black until each stands out 3:1 or more.
LIGHT = Palette(
    *("#ffffff", "#f6f7f9", "#1c2024", "#5d6672", "#dfe3e8"),
    runs=("#0b6fb8", "#c05a00", "#00795a", "#9a4683", "#6b5b00", "#3d4fc4"),
    parts=(
        "#0b6fb8",
        "#4fa3dd",
        "#00795a",
        "#54b894",
        "#c05a00",
        "#eda04f",
        "#9a4683",
        "#cc8fbb",
        "#6b5b00",
        "#98a1ad",
    ),
    good="#00795a",
    warn="#a65f00",
    bad="#c0271c",
)
DARK = Palette(
    *("#14171b", "#1d2127", "#e7eaee", "#9aa4b1", "#333a43"),
    runs=("#5cb3f0", "#f0914a", "#3fc79b", "#dd94c6", "#d6c445", "#98a6ff"),
    parts=(
        "#5cb3f0",
        "#2a76b0",
        "#3fc79b",
        "#1f8163",
        "#f0914a",
        "#ad5f22",
        "#dd94c6",
        "#8f5480",
        "#d6c445",
        "#6d7784",
    ),
    good="#3fc79b",
    warn="#f0b04a",
    bad="#ff7b6e",
)
