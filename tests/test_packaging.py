"""What an installer, a newcomer and GitHub read: pyproject.toml, the constraints, the workflows and the forms."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Libraries of which we use what they do not promise to keep; pyproject.toml says of each what that is.
HELD = ["torch", "torchvision", "open-clip-torch", "timm", "pillow", "huggingface-hub", "starlette", "uvicorn"]
HELD += ["onnxscript", "transformers"]


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
    asked = {canonicalize_name(one.name): one for one in requirements()}
    assert set(pinned) == set(asked)
    for name, version in pinned.items():
        assert asked[name].specifier.contains(version), (name, version)


def test_dockerfile__installs_what_the_makefile_installs() -> None:
    """torch is named in three places, as pip must get it from another index before the rest."""
    wanted = {line for line in PROJECT["dependencies"] if line.startswith("torch")}
    for name in ("Dockerfile", "Makefile"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert set(re.findall(r"[\"'](torch(?:vision)?[>=<][^\"']*)[\"']", text)) == wanted, name
