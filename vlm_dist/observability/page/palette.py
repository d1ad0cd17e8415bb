"""Colours of the pages, light and dark.

Figures are drawn with the light ones; the page's script puts the dark ones in their place. Pairs of text and ground
have a contrast of at least 4.5 to 1, and neighbours in `SERIES` differ for colour-blind readers too.
"""

from __future__ import annotations

#: Name of the CSS variable: (light, dark).
COLORS = {
    "ground": ("#f6f7f8", "#13161a"),
    "surface": ("#ffffff", "#1b1f25"),
    "sunken": ("#eef0f2", "#22272e"),
    "line": ("#d9dee3", "#343b44"),
    "ink": ("#1b2026", "#e5e9ed"),
    "muted": ("#5a6570", "#9ea9b5"),
    "accent": ("#1d5fae", "#80b5f3"),
    "good": ("#18704f", "#5cc79f"),
    "good-soft": ("#e0f3ea", "#173529"),
    "warn": ("#8a5200", "#eeb25c"),
    "warn-soft": ("#fdf1dc", "#3a2c13"),
    "bad": ("#b02a37", "#f58f98"),
    "bad-soft": ("#fce6e8", "#431d22"),
    "accent-soft": ("#e2edf9", "#1a3048"),
    "series-1": ("#2a6ebb", "#6fabeb"),
    "series-2": ("#c9660c", "#f0994c"),
    "series-3": ("#1a8668", "#4cc2a1"),
    "series-4": ("#8250b8", "#b794e6"),
    "series-5": ("#c03d4b", "#f08089"),
    "series-6": ("#7b7714", "#c9c25a"),
    "series-7": ("#5f6f83", "#9dacbf"),
    "series-8": ("#b5478a", "#e48cc2"),
}

SERIES = tuple(light for name, (light, _) in COLORS.items() if name.startswith("series-"))
INK = COLORS["ink"][0]
MUTED = COLORS["muted"][0]
LINE = COLORS["line"][0]
GOOD = COLORS["good"][0]
WARN = COLORS["warn"][0]
BAD = COLORS["bad"][0]
