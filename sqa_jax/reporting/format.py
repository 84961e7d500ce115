"""How numbers are written in tables."""

from __future__ import annotations


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def points(share: float) -> str:
    return f"{100 * share:+.1f}"


def count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def money(value: float | None) -> str:
    return "unknown" if value is None else f"${value:.2f}" if value >= 1 or value == 0 else f"${value:.2g}"


def cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
