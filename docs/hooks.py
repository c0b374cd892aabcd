"""The pages of commands and of settings, written from the code when the site is built."""

from typing import Any

import click
from pydantic import BaseModel


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in ``<!-- commands -->`` and ``<!-- settings -->``."""
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", commands())
    if "<!-- settings -->" in markdown:
        markdown = markdown.replace("<!-- settings -->", settings())
    return markdown


def commands() -> str:
    """Every verb with its arguments and options, from the help texts."""
    import typer

    from finealign.cli import app

    group = typer.main.get_command(app)
    context: Any = click.Context(group, info_name="finealign")  # type: ignore[arg-type]
    found = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = type(context)(command, info_name=name, parent=context)
        rows = [parameter.get_help_record(inner) or (parameter.human_readable_name, "") for parameter in command.params]
        rows = [("`" + " ".join(left.split()) + "`", " ".join(right.split())) for left, right in rows]
        about = " ".join((command.help or "").split())
        listed = _table(("argument or option", "what it is"), rows)
        found.append(f"## {name}\n\n{about}\n\n```text\n{_usage(command, inner)}\n```\n\n{listed}")
    return "\n\n".join(found)


def _usage(command: Any, context: Any) -> str:
    return " ".join(["finealign", context.info_name, *command.collect_usage_pieces(context)])


def settings() -> str:
    """Every setting of the configuration, then those of each method."""
    from finealign.config import Config
    from finealign.method.registry import find_method, method_names

    found = [_section("Top level", Config, "")]
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            found.append(_section(name, section, f"{name}."))
    for name in method_names():
        found.append(_section(f"method: {name}", find_method(name).Options, "method."))
    return "\n\n".join(found)


def _section(title: str, section: type[BaseModel], prefix: str) -> str:
    rows = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        default = field.get_default(call_default_factory=True)
        rows.append((f"`{prefix}{name}`", f"`{default}`", field.description or ""))
    listed = _table(("setting", "default", "what it is"), rows)
    return f"## {title}\n\n{(section.__doc__ or '').strip()}\n\n{listed}"


def _table(header: tuple[str, ...], rows: list[Any]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
