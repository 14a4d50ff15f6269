"""Format numbers, names and lists for messages."""

from collections.abc import Sequence

UNITS = ("B", "kB", "MB", "GB", "TB")


def in_bytes(nbytes: int) -> str:
    """Return a number of bytes with at most four digits and its unit."""
    # powers of 1000, as disks are sold and `df -H` counts
    power = min(4, len(str(nbytes)) // 3 - (len(str(nbytes)) % 3 == 0))
    return f"{nbytes / 1000**power:.{min(power, 1)}f} {UNITS[power]}"


def counted(count: int, noun: str) -> str:
    """Return `1 clip`, `2,000 clips`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def some(items: Sequence[object], most: int = 3, separator: str = ", ") -> str:
    """Return the first items and the number of the others: `a, b, c and 4 more`."""
    shown = separator.join(map(str, items[:most]))
    return shown + (f" and {len(items) - most:,} more" if len(items) > most else "")


def duration(seconds: float) -> str:
    """Return 12 as 12s, 754 as 12m34s, 4321 as 1h12m, 100,000 as 1d03h."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{left:02}s" if minutes else f"{left}s"


def printable(text: str) -> str:
    """Return text with non-printable characters escaped, so that it cannot control a terminal."""
    if text.isprintable():  # nearly always
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
