"""Fill in templates of pages and programs. A package keeps its templates in its folder ``pages/``."""

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any


def fill(
    package: str, name: str, values: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]] | None = None
) -> str:
    """Fill in the template ``pages/name`` of a package such as ``finealign.run``. In HTML all values are escaped.

    ``filters`` are further Jinja filters. Raises jinja2's UndefinedError where the template uses a value that is not in
    ``values``.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(package, "pages"),
        autoescape=".html." in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters or {}
    return environment.get_template(name).render(values)


def base_style() -> str:
    """The style sheet that the report and the server's page share."""
    return (files("finealign.runtime") / "pages" / "base.css").read_text(encoding="utf-8")
