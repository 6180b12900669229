"""What holds of every file that `ray up` reads: Ray takes it, its commands parse, and it is closed to the world."""

import re
import shlex
import subprocess
import tomllib

import pytest
from jsonschema import ValidationError
from ray.autoscaler._private.util import validate_config
from ray.scripts.scripts import start

from tests.cluster_files.files import CLOUDS, RAY_UP, ROOT, commands, prepared, read

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_accepts_it(name):
    validate_config(prepared(name))


@pytest.mark.parametrize("name", RAY_UP)
def test_and_would_refuse_a_misspelt_key(name):
    config = prepared(name)
    config["setup_comands"] = config.pop("setup_commands")
    with pytest.raises(ValidationError, match="setup_comands"):
        validate_config(config)


@pytest.mark.parametrize("name", CLOUDS)
def test_the_head_runs_no_trials_and_workers_start_from_none(name):
    config = prepared(name)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0 and head["resources"].get("GPU", 0) == 0 and head["max_workers"] == 0
    assert types and all(each["min_workers"] == 0 < each["max_workers"] for each in types.values())
    assert options(config, "head")["num_cpus"] == options(config, "head")["num_gpus"] == 0


@pytest.mark.parametrize("name", RAY_UP)
def test_dashboard_and_jobs_are_on_the_heads_loopback(name):
    config = read(name)
    assert options(config, "head")["dashboard_host"] == "127.0.0.1"
    assert options(config, "head")["ray_client_server_port"] is None
    assert options(config, "worker")["address"] == "$RAY_HEAD_IP:6379"


@pytest.mark.parametrize("name", RAY_UP)
def test_every_ray_start_asks_for_the_token(name):
    starts = [line for line in commands(read(name)) if "ray start" in line]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token ray start" in line for line in starts)


@pytest.mark.parametrize("name", RAY_UP)
def test_the_token_is_copied_and_no_secret_is_written(name):
    text = (ROOT / name).read_text()
    assert read(name)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert not re.search(
        r"AKIA|ASIA|PRIVATE KEY|hf_[A-Za-z]{8}|[0-9a-f]{32}|(password|secret)\w*:", text, re.IGNORECASE
    )


@pytest.mark.parametrize("name", RAY_UP)
def test_every_node_gets_what_it_installs_from(name):
    mounts = {remote: local for remote, local in read(name)["file_mounts"].items() if not local.startswith("~")}
    assert all((ROOT / local).exists() and remote == f"~/minitron-search/{local}" for remote, local in mounts.items())
    packages = {pattern.removesuffix("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"pyproject.toml", "constraints.txt", PROJECT["project"]["readme"]} <= set(mounts.values())


@pytest.mark.parametrize("name", RAY_UP)
def test_every_node_is_made_by_node_sh_with_extras_that_exist(name):
    config = prepared(name)
    for kind in ("head", "worker"):
        words = shlex.split(" ".join(config[f"{kind}_setup_commands"]))
        assert words.count("~/minitron-search/clusters/node.sh") == 1
        extras = "".join(words[words.index("~/minitron-search/clusters/node.sh") + 1 :][:1])
        assert set(filter(None, extras.split(","))) <= set(PROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize("name", RAY_UP)
def test_commands_are_shell(name):
    for command in commands(read(name)):
        subprocess.run(["bash", "-n", "-c", command], check=True)


def options(config, kind):
    """What `ray start` of the head or of a worker is given, read by its own command line."""
    (line,) = (line for line in config[f"{kind}_start_ray_commands"] if "ray start" in line)
    words = shlex.split(line.replace("~", "/home/node"))
    return start.make_context("ray start", words[words.index("start") + 1 :]).params
