"""``l2g completion``: a script that completes commands, flags and their values in a shell."""

from __future__ import annotations

import argparse
from typing import Any

from l2g_meta.cli.parser import Commands, build_parser, new_command
from l2g_meta.errors import L2GError

SHELLS = ("bash", "zsh", "fish")
FOLDERS, FILES = ("RUN", "DIR", "OUT"), ("FILE", "DIR|FILE")  # metavars
EXAMPLES = """\
l2g completion bash > ~/.local/share/bash-completion/completions/l2g
l2g completion zsh > ~/.zfunc/_l2g                   # in ~/.zshrc: fpath+=~/.zfunc; autoload -U compinit; compinit
l2g completion fish > ~/.config/fish/completions/l2g.fish"""


def add(commands: Commands) -> None:
    """Adds the command."""
    completion = new_command(
        commands,
        "completion",
        "Prints a script that completes commands, flags, choices and folders after l2g in your shell. It is made from "
        "the flags of this version: make it again after an upgrade.",
        EXAMPLES,
    )
    completion.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"one of {', '.join(SHELLS)}")


def run(args: argparse.Namespace) -> int:
    """Prints the script."""
    print(script(args.shell))
    return 0


def script(shell: str) -> str:
    """The completion script of a shell, static: nothing of this package runs when a key is pressed.

    Raises:
        L2GError: if shtab is missing, with what to install.
    """
    try:
        import shtab
    except ImportError as error:
        raise L2GError('completion needs shtab; pip install "l2g-meta[completion]"') from error
    parser = build_parser()
    _name_paths(parser, {**dict.fromkeys(FOLDERS, shtab.DIRECTORY), **dict.fromkeys(FILES, shtab.FILE)})
    return shtab.complete(parser, shell=shell)


def _name_paths(parser: argparse.ArgumentParser, kinds: dict[str, Any]) -> None:
    """Tells shtab which arguments are files and folders, by their metavars."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _name_paths(child, kinds)
        elif action.metavar in kinds:
            action.complete = kinds[str(action.metavar)]  # type: ignore[attr-defined]
