"""Numbers as text, for tables and reports; "–" where there is none."""

from __future__ import annotations


def percent(value: float | None) -> str:
    """A percentage, without its sign."""
    return "–" if value is None else f"{value:.2f}"


def points(fraction: float) -> str:
    """A difference of two fractions, in percentage points."""
    return f"{100 * fraction:+.1f}"


def count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def money(value: float | None) -> str:
    """US dollars; two significant digits below one dollar."""
    return "unknown" if value is None else f"${value:.2f}" if value >= 1 or value == 0 else f"${value:.2g}"


def cell(value: float | None) -> str:
    """A score with four digits."""
    return "–" if value is None else f"{value:.4f}"


def duration(seconds: float | None, digits: int = 0) -> str:
    """Seconds, minutes or hours, whichever reads best.

    Args:
      digits: after the point of seconds and minutes; with any, what is below a second is in milliseconds.
    """
    if seconds is None:
        return "–"
    if digits and seconds < 1:
        return f"{1000 * seconds:.{digits}f} ms"
    if seconds < 120:
        return f"{seconds:.{digits}f} s"
    return f"{seconds / 60:.{digits}f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
