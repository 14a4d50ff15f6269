"""How numbers and names are told."""

UNITS = ("B", "kB", "MB", "GB", "TB")


def in_bytes(nbytes: int) -> str:
    """Return a number of bytes with at most four digits and its unit."""
    power = min(4, len(str(nbytes)) // 3 - (len(str(nbytes)) % 3 == 0))
    return f"{nbytes / 1000**power:.{min(power, 1)}f} {UNITS[power]}"


def counted(count: int, noun: str) -> str:
    """Return `1 clip`, `2,000 clips`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def printable(text: str) -> str:
    """Return text that cannot steer a terminal: what does not print is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
