"""What an installer, a newcomer and GitHub read: pyproject.toml, the constraints, the workflows and the forms."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import finealign

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Libraries of which we use what they do not promise to keep; pyproject.toml says of each what that is.
HELD = ["torch", "torchvision", "open-clip-torch", "timm", "pillow", "huggingface-hub", "starlette", "uvicorn"]
HELD += ["onnxscript", "transformers"]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))


def requirements() -> list[Requirement]:
    """Every direct dependency, those of extras as well."""
    extras = [line for group in PROJECT["optional-dependencies"].values() for line in group]
    return [one for one in map(Requirement, PROJECT["dependencies"] + extras) if one.name != "finealign"]


def constraints() -> dict[str, str]:
    """The pinned version of each package that constraints.txt names."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pinned}


def test_dependencies__each_has_a_lowest_version() -> None:
    for one in requirements():
        assert any(part.operator == ">=" for part in one.specifier), one


@pytest.mark.parametrize("name", HELD)
def test_dependencies__a_library_whose_inside_is_used_has_an_upper_bound(name: str) -> None:
    (asked,) = [one for one in requirements() if canonicalize_name(one.name) == name]
    assert any(part.operator == "<" for part in asked.specifier), asked


def test_constraints__every_direct_dependency_is_pinned_to_a_version_that_is_allowed() -> None:
    pinned = constraints()
    asked: dict[str, Requirement] = {canonicalize_name(one.name): one for one in requirements()}
    assert set(pinned) == set(asked)
    for name, version in pinned.items():
        assert asked[name].specifier.contains(version), (name, version)


def test_dockerfile__installs_what_the_makefile_installs() -> None:
    """torch is named in three places, as pip must get it from another index before the rest."""
    wanted = {line for line in PROJECT["dependencies"] if line.startswith("torch")}
    for name in ("Dockerfile", "Makefile"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert set(re.findall(r"[\"'](torch(?:vision)?[>=<][^\"']*)[\"']", text)) == wanted, name


# --- what runs by itself ----------------------------------------------------------------------------------------------


def targets() -> set[str]:
    """The targets of the Makefile."""
    return set(
        re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )


def commands(job: dict[str, Any]) -> list[str]:
    """What the job's steps run, once for each value of a variable of its matrix."""
    matrix = job.get("strategy", {}).get("matrix", {})
    found = []
    for command in (step["run"] for step in job["steps"] if "run" in step):
        asked = re.search(r"\$\{\{ matrix\.(\w+) \}\}", command)
        found += [command.replace(asked[0], value) for value in matrix[asked[1]]] if asked else [command]
    return found


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow__runs_targets_of_the_makefile_and_nothing_else(workflow: Path) -> None:
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    for name, job in jobs.items():
        for command in commands(job):
            make, target, *variables = command.split()
            assert make == "make" and target in targets(), f"{name}: {command}"
            assert all(re.match(r"[A-Z_]+=", given) for given in variables), f"{name}: {command}"
        for step in job["steps"]:
            assert re.fullmatch(r"[\w./-]+@v?[\w./-]+", step.get("uses", "a@v1")), step


def test_workflows__check_what_a_change_may_break() -> None:
    (jobs,) = [yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"] for path in WORKFLOWS if path.stem == "ci"]
    run = {command.split()[1] for job in jobs.values() for command in commands(job)}
    assert run >= {"lint", "types", "test", "lowest", "docs", "wheel", "workflows"}
    lowest = PROJECT["requires-python"].removeprefix(">=")
    assert lowest in jobs["test"]["strategy"]["matrix"]["python"]


def test_makefile__a_target_is_no_file() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)
    assert set(listed.split()) == targets()


def test_workflows__actionlint_has_nothing_to_say() -> None:
    program = shutil.which("actionlint")
    if program is None:
        pytest.skip("no actionlint here: make workflows")
    done = subprocess.run([program, *WORKFLOWS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


# --- what people are asked --------------------------------------------------------------------------------------------


def test_forms__each_is_one_that_github_takes() -> None:
    """Every form has a name, a description and fields; every field an id of its own, and a label that is its own."""
    forms = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) >= 3
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.stem == "config":
            assert set(form) <= {"blank_issues_enabled", "contact_links"}
            continue
        assert {"name", "description", "body"} <= set(form), path
        asked = [field for field in form["body"] if field["type"] != "markdown"]
        assert asked, path
        for field in form["body"]:
            assert field["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}, path
            assert field["attributes"]["value" if field["type"] == "markdown" else "label"], path
        for key in ([field["id"] for field in asked], [field["attributes"]["label"] for field in asked]):
            assert len(set(key)) == len(key), path


def test_citation__names_the_software_and_the_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert cited["message"] and cited["title"] == PROJECT["name"] and cited["license"] == PROJECT["license"]
    assert all({"family-names", "given-names"} <= set(one) or "name" in one for one in cited["authors"])
    assert cited["version"] == finealign.__version__
    (paper,) = cited["references"]
    assert {"type": "other", "value": "arXiv:2507.09615"}.items() <= paper["identifiers"][0].items()


def test_changelog__is_one_that_is_kept() -> None:
    """The newest first, each with its date but for what is to come; changes under the headings of Keep a Changelog."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    titles = [part.partition("\n")[0] for part in parts]
    assert titles[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", title) for title in titles[1:]), titles
    assert titles[1:] == sorted(titles[1:], key=lambda title: title.partition(" - ")[2], reverse=True)
    for part in parts:
        kinds = re.findall(r"^### (.*)$", part, flags=re.MULTILINE)
        assert len(set(kinds)) == len(kinds), part
        assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}, kinds
