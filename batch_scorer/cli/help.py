"""How `--help` looks: flags grouped in panels, each on its own line above what it does.

Typer's own table leaves 25 of 80 columns to the text, cuts long flags short and reads brackets as
markup.
"""

import inspect
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.text import Text
from typer.core import TyperArgument, TyperCommand, TyperOption

_INDENT = 4


class Command(TyperCommand):
    """A command with that help. Its docstring and the texts of its flags are shown literally."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        console = Console()
        console.print(Text(self.get_usage(ctx), "bold"))
        for paragraph in inspect.cleandoc(self.help or "").split("\n\n"):
            console.print()
            console.print(Text(" ".join(paragraph.split())))
        console.print()
        panels: dict[str, list[Text | Padding]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, TyperArgument | TyperOption):
                usual = "Arguments" if isinstance(parameter, TyperArgument) else "Options"
                lines = panels.setdefault(parameter.rich_help_panel or usual, [])
                lines.append(Text(_usage(parameter), "bold cyan"))
                text = Text(_text(parameter))
                text.highlight_words(["required"], "red")
                lines.append(Padding(text, (0, 0, 0, _INDENT)))
        for title, lines in panels.items():
            console.print(Panel(Group(*lines), title=Text(title), title_align="left"))


def _usage(parameter: TyperArgument | TyperOption) -> str:
    if isinstance(parameter, TyperArgument):
        return parameter.metavar or parameter.name
    flags = " / ".join([*parameter.opts, *parameter.secondary_opts])
    return flags if parameter.is_flag else f"{flags} {parameter.metavar or ''}".rstrip()


def _text(parameter: TyperArgument | TyperOption) -> str:
    return f"{parameter.help or ''}{' [required]' if parameter.required else ''}"
