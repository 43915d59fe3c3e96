"""Names of files and classes, which may be anything, as text for terminals, spreadsheets and pages."""

from __future__ import annotations

FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # how a cell begins that is computed


def shown(text: str) -> str:
    r"""A file's name without what would steer a terminal or cannot be printed.

    Example:
        >>> print(shown("a\n\x1b[2J é"))
        a\n\x1b[2J é
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cell(text: str) -> str:
    r"""A name as a cell that a spreadsheet does not compute and a terminal does not obey.

    Source:
        OWASP, *CSV Injection*: a quotation mark before what would begin a formula, and every cell in quotation marks,
        which the writer of the file adds.

    Example:
        >>> print(cell("=cmd|' /C calc'!A0"), cell("a\x1b[2J.png"), cell("a.png"))
        '=cmd|' /C calc'!A0 a\x1b[2J.png a.png
    """
    return "'" * text.startswith(FORMULAS) + shown(text)
