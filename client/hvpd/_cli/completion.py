"""`hvpd completion`: the code that completes commands and flags in a shell."""

import argparse
import importlib.util
import os

from hvpd._errors import MissingExtraError

_SHELLS = ("bash", "zsh", "fish")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    completion = commands.add_parser(
        "completion",
        help="print the code for completion in a shell",
        description='Print the code for completion in a shell. In ~/.bashrc or ~/.zshrc: eval "$(hvpd completion bash)". For fish: '
        "hvpd completion fish > ~/.config/fish/completions/hvpd.fish. Needs pip install 'hvpd[completion]'.",
    )
    completion.add_argument("shell", choices=_SHELLS, help="the shell")
    completion.set_defaults(run=_run)


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell, and exit, if it asks for completions."""
    if "_ARGCOMPLETE" in os.environ and importlib.util.find_spec("argcomplete"):
        import argcomplete

        argcomplete.autocomplete(parser)


def _run(arguments: argparse.Namespace) -> int:
    if not importlib.util.find_spec("argcomplete"):
        raise MissingExtraError("completion needs argcomplete: pip install 'hvpd[completion]'")
    from argcomplete.shell_integration import shellcode

    print(shellcode(["hvpd"], shell=arguments.shell))
    return 0
