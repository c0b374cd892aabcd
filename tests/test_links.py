"""Every link that stays inside leads somewhere: to a file of the repository, and to a heading where it names one.

The site's own pages are checked by its build as well; this also reads what lies outside ``docs/``, the notebooks, and
the forms, which nothing builds.
"""

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.md"), *(ROOT / "docs").rglob("*.md")])
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
LINK = re.compile(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
OUTSIDE = re.compile(r"[a-z][a-z0-9+.-]*:")
# Files that are named without a link, in issue forms, workflows and the Makefile.
NAMED = re.compile(r"(?<![\w/.$-])((?:docs|src|tests|benchmarks|recipes|\.ci|\.github)/[\w./-]*\w\.\w+|[A-Z_]+\.md)\b")


def without_code(text: str) -> str:
    """The text of a page without its fenced and inline code."""
    text = re.sub(r"^(```+).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs both write them."""
    text = re.sub(r"^(```+).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+?)\s*$", text, flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)) for heading in headings]
    return {re.sub(r"\s", "-", heading.strip().lower()) for heading in plain}


def dead(text: str, page: Path) -> list[str]:
    """The links in a page's text that stay inside and lead nowhere."""
    found = []
    for link in LINK.findall(text):
        if OUTSIDE.match(link):
            continue
        place, _, anchor = unquote(link).partition("#")
        target = (page.parent / place).resolve() if place else page
        # The reference's anchors are made from names in the code; the site's build knows them.
        titled = anchor and target.suffix == ".md" and target.name != "python.md"
        inside = target.exists() and target.is_relative_to(ROOT)
        if not inside or (titled and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_page__its_links_lead_somewhere(page: Path) -> None:
    assert not dead(without_code(page.read_text(encoding="utf-8")), page)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook__its_links_lead_somewhere(notebook: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert not dead(without_code(text), notebook)


def test_pages__a_dead_link_is_found() -> None:
    """The check itself: files, headings, and what leads out of the repository."""
    text = "[a](nowhere.md) [b](README.md#results) [c](README.md#no-such-heading) [d](https://example.org) [e](../x.md)"
    assert dead(text, ROOT / "README.md") == ["nowhere.md", "README.md#no-such-heading", "../x.md"]


def test_files__those_that_forms_workflows_and_the_makefile_name_exist() -> None:
    named = [ROOT / "Makefile", ROOT / "mkdocs.yml", ROOT / "pyproject.toml", ROOT / ".pre-commit-config.yaml"]
    for path in [*named, *(ROOT / ".github").rglob("*.*")]:
        for name in NAMED.findall(path.read_text(encoding="utf-8")):
            assert (ROOT / name).exists() or (ROOT / "docs" / name).exists(), f"{path.name} names {name}"


def test_navigation__every_page_of_the_site_is_in_it() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = set(re.findall(r"'([\w./-]+\.md)'", str(nav)))
    assert listed == {str(path.relative_to(ROOT / "docs")) for path in PAGES if path.is_relative_to(ROOT / "docs")}
