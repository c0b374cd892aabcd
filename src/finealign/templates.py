"""Pages and programs that are written from the templates in ``pages/``."""

from collections.abc import Callable, Mapping
from typing import Any


def fill(name: str, values: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]] | None = None) -> str:
    """A template filled in, HTML with everything escaped. Raises jinja2's UndefinedError for a missing value."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("finealign", "pages"),
        autoescape=".html." in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters or {}
    return environment.get_template(name).render(values)
