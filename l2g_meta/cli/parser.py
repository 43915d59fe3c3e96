"""The parser of ``l2g``: help with examples, and errors that say need, got, remedy."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NoReturn

from l2g_meta import __version__
from l2g_meta.cli import COMMANDS, command
from l2g_meta.errors import did_you_mean

WIDTH = 80  # of paragraphs in help texts
HELP = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)

EXAMPLES = """\
l2g train --inner-lr 0.003 --mix 0.5            # the defaults: L2G on built-in data, in minutes on a CPU
l2g evaluate runs/glyphs-l2g-prototypical-seed0 # on classes it has never seen
l2g predict --model RUN --support known --query new   # your own photos
l2g doctor                                      # what is installed here, and whether it works"""
ENDING = (
    "`l2g COMMAND --help` has a command's flags and examples. Exit codes: 0 done, 1 in part, 2 unusable input, 128 + n "
    "stopped by signal n."
)


def build_parser(names: Collection[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """The parser of ``l2g``; ``command`` is the name of the command given.

    Args:
        names: commands that get their arguments, which imports their files; the others are only listed.
    """
    about = "Few-shot learning that generalises to unseen tasks."
    parser = Parser(prog="l2g", description=about, epilog=f"{examples(EXAMPLES)}\n\n{textwrap.fill(ENDING, WIDTH)}")
    parser.add_argument("--version", action="version", version=__version__)
    commands: Any = parser.add_subparsers(required=True, metavar="COMMAND", dest="command", title="commands")
    for name, line in COMMANDS.items():
        if name in names:
            module = command(name)
            text = {"description": textwrap.fill(module.DESCRIPTION, WIDTH), "epilog": examples(module.EXAMPLES)}
            module.add_arguments(commands.add_parser(name, help=line, **text))
        else:
            commands.add_parser(name, help=line)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of one call of ``l2g``; imports the file of its command alone.

    Raises:
        SystemExit: with 2, after saying what is wrong; with 0 after help.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    named = next((word for word in words if not word.startswith("-")), None)
    return build_parser(() if named is None else (named,)).parse_args(words)


def examples(lines: str) -> str:
    """As they stand at the end of a help text."""
    return "examples:\n" + textwrap.indent(lines, "  ")


class Parser(argparse.ArgumentParser):
    """One whose errors name what is near to a word that it does not know, and leave the long usage out."""

    def __init__(self, **options: Any):
        super().__init__(**{"formatter_class": HELP} | options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but a command tells by itself what it does not know."""
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"need only what it takes, got {' '.join(left)} besides{self.near_flag(left[0])}")
        return found, left

    def near_flag(self, word: str) -> str:
        """The remedy for an unknown flag."""
        flag = "--" + word.partition("=")[0].lstrip("-")
        return did_you_mean(flag, self._option_string_actions) if word.startswith("-") else ""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            raise argparse.ArgumentError(
                action, f"need one of {', '.join(known)}; got {value!r}{did_you_mean(str(value), known)}"
            )

    def error(self, message: str) -> NoReturn:
        """Says what is wrong and where the help is; exits with 2."""
        message = message.replace("the following arguments are required: ", "need ")
        if message == "need COMMAND":
            message = f"need a command of {', '.join(COMMANDS)}"
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")
