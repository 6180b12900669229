"""clusters/node.sh in an empty home, with a `python3` that writes down what it is asked instead of installing."""

import os
import shutil
import subprocess

import pytest

from tests.cluster_files.files import ROOT

PYTHON = """#!/usr/bin/env bash
echo "$*" >> ~/asked
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *fails*) exit 1 ;;
esac
"""


@pytest.fixture
def home(tmp_path):
    """With a token, a tree and that python."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("t" * 64)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text(PYTHON)
    (tmp_path / "bin/python3").chmod(0o755)
    (tmp_path / "minitron-search/clusters").mkdir(parents=True)
    shutil.copy(ROOT / "clusters/node.sh", tmp_path / "minitron-search/clusters")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / "minitron-search")
    return tmp_path


def node(home, *arguments, **environment):
    """Exit status, error, and what python was asked: pip's lines without its flags."""
    (home / "asked").unlink(missing_ok=True)
    ran = subprocess.run(
        ["bash", str(home / "minitron-search/clusters/node.sh"), *arguments], capture_output=True, text=True, cwd="/",
        env={"HOME": str(home), "PATH": f"{home}/bin:{os.environ['PATH']}", **environment},
    )  # fmt: skip
    asked = (home / "asked").read_text().splitlines() if (home / "asked").exists() else []
    pip = "-m pip install --quiet --disable-pip-version-check -c constraints.txt "
    return ran.returncode, ran.stderr, [line.removeprefix(pip) for line in asked if not line.startswith("-c ")]


def login(home, command):
    """As Ray runs a command on a node."""
    shell = f"source ~/.bashrc; export OMP_NUM_THREADS=1 && ({command})"
    ran = subprocess.run(["bash", "--login", "-c", "-i", shell], capture_output=True, text=True, check=True,
                         env={"HOME": str(home), "PATH": os.environ["PATH"]}, start_new_session=True)  # fmt: skip
    return ran.stdout.strip()


def test_it_installs_the_pinned_packages_and_the_extras(home):
    assert node(home, "aws,gpu")[::2] == (0, [f"-m venv {home}/venv", "torch", "-e .[aws,gpu]"])
    assert node(home, VENV=f"{home}/other")[2] == [f"-m venv {home}/other", "torch", "-e ."]
    assert node(home, "aws", "https://torch/cpu")[2][1:] == ["--index-url https://torch/cpu torch", "-e .[aws]"]


def test_a_node_that_is_ready_installs_nothing_and_one_whose_pins_changed_does(home):
    node(home)
    assert node(home)[::2] == (0, [])
    with open(home / "minitron-search/constraints.txt", "a") as file:
        file.write("more==1\n")
    assert node(home)[2][-1] == "-e ."


def test_an_installation_that_failed_is_done_again(home):
    assert node(home, "fails")[0] == 1
    assert node(home, "fails")[2][-1] == "-e .[fails]"
    assert not (home / ".minitron_search.env").exists()


def test_every_login_shell_finds_the_environment_the_token_mode_and_the_caches(home):
    for _ in range(2):
        node(home, CACHE=f"{home}/nvme")
    assert (home / ".bashrc").read_text().count("minitron_search.env") == 1
    assert login(home, "command -v python") == f"{home}/venv/bin/python"
    assert login(home, "echo $RAY_AUTH_MODE $HF_HOME $MINITRON_SEARCH_CACHE") == \
        f"token {home}/nvme/huggingface {home}/nvme/minitron_search"  # fmt: skip
    assert (home / "nvme/minitron_search").is_dir()


def test_a_login_shells_own_lines_are_kept(home):
    (home / ".bashrc").write_text("export OF_THE_IMAGE=1")
    with open(home / ".bashrc", "a") as file:
        file.write("\n")
    node(home)
    assert login(home, "echo $OF_THE_IMAGE $RAY_AUTH_MODE") == "1 token"


def test_without_a_token_it_says_how_to_make_one(home):
    (home / ".ray/auth_token").write_text("")
    status, error, asked = node(home)
    assert status == 1 and "ray get-auth-token --generate" in error and not asked


def test_the_token_is_the_users_alone(home):
    node(home)
    assert (home / ".ray/auth_token").stat().st_mode & 0o777 == 0o600
