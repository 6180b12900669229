"""A search on two hosts of one's own, brought up as a user brings them up, one of which loses power on the way.

    python -m tests.cluster.two_hosts [--launcher train | inline] [--power-cuts stays-away comes-back head]
                                      [--storage folder | bucket] [--strategy ddp | fsdp2] [--folder DIR]

On a laptop and two hosts, which are namespaces of this machine (see `hosts`):

    ray up clusters/on-prem.yaml                     from the checkout, token authentication on
    ssh -N -L 8265:127.0.0.1:8265 HEAD               since the dashboard listens on the head's loopback alone
    ray job submit --address http://127.0.0.1:8265 --working-dir . -- python -m minitron_search.run --config ...
    a job whose run directory the worker would not see is refused
    the worker loses power while a trial trains on it, and stays away: the head ends the search by itself
    a second job; the worker loses power, comes back, joins again, and trains on
    a third job; the head loses power, an empty machine takes its place, ray up, the job again with --resume
    ray down clusters/on-prem.yaml

and the same search on the laptop, without a cluster: it has the same rows, number by number. Caches are on each host's
own disk; the run is in a folder that both mount, or in a bucket (moto's server, on the laptop) and then on no shared
disk at all. The winner is retrained on all hosts there are by then, together: whole on each, or a share of it.

What differs from two real hosts: of the project's file the addresses, user and key are filled in, and each host says it
has one CPU; installing the environment twice would take minutes, so each finds it installed (this machine's, read-only)
and `clusters/node.sh` has little left to do; Ray gives up a silent host after 25 s and not after 65.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import yaml

from minitron_search.records.paths import is_uri, working_folder
from tests.cluster.hosts import LAPTOP, ROOT, SSH, Machine, Network, address, missing
from tests.runs import rows, tiny_inputs

HEAD, WORKER = 11, 12
HOSTS = {HEAD: "head", WORKER: "worker"}
ADDRESSES = {address(number) for number in HOSTS}
CLUSTER_FILE = ROOT / "clusters" / "on-prem.yaml"
CHECKOUT, SHARED = "/srv/checkout", "/srv/shared"  # the laptop sees the one, all three see the other
CACHE = ".cache/minitron_search"  # of its home, where node.sh has a host keep its caches
PORT, BUCKET = 5000, "searches"  # of the S3 server on the laptop
BUCKET_S = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}
MAKE_BUCKET = f"""
import boto3
boto3.client("s3", endpoint_url="http://127.0.0.1:{PORT}", region_name="us-east-1").create_bucket(Bucket="{BUCKET}")
"""
DASHBOARD = "http://127.0.0.1:8265"
POWER_CUTS = ("stays-away", "comes-back", "head")
TRAINS = {"train": "ray::RayTrainWorker", "inline": "ray::ImplicitFunc"}  # what Ray calls those that train
STEP_TOKENS = 256
# seconds: for two hosts to be nodes; from a job's start to a trial on the worker; until its loss is noticed; until it
# is a node again; until a job has ended; until no Ray process is left. Many times what they take on a quiet machine.
UP_S, TRIAL_S, LOST_S, BACK_S, END_S, DOWN_S = 300, 300, 120, 300, 600, 120
# Of Ray's own patience: with hosts that say nothing, and of a worker with a head that has gone.
PATIENCE = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
    "AUTOSCALER_HEARTBEAT_TIMEOUT_S": "15",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}
# the newer autoscaler never starts the workers of a `local` provider
LAPTOP_S = {"RAY_UP_enable_autoscaler_v2": "0", "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
ALIVE = f"""
from ray.util.state import list_nodes
print(*(node.node_ip for node in list_nodes({DASHBOARD!r}, filters=[("state", "=", "ALIVE")])))
"""


def configuration(folder: Path) -> dict[str, Any]:
    """`tiny_inputs` in `folder`, as the machines see it; what is proposed does not depend on who is first."""
    found = tiny_inputs(folder)
    found["teacher"]["model"] = f"{SHARED}/teacher"
    found["corpus"]["train"] = found["corpus"]["validation"] = f"{SHARED}/text.txt"
    found["stages"] = ["importance", "search", "retrain"]
    found["retraining"] = {"tokens": 20 * STEP_TOKENS}
    found["search"] = {"trials": 8, "rungs": [steps * STEP_TOKENS for steps in (25, 125, 225)], "reduction_factor": 2,
                       "sampler": "random", "controls": False}  # fmt: skip
    found["distillation"] = {"batch_tokens": STEP_TOKENS}
    return found


def cluster_file(template: str) -> str:
    """The project's file for hosts of one's own, for these hosts."""
    file = yaml.safe_load(template)
    file["provider"] |= {"head_ip": address(HEAD), "worker_ips": [address(WORKER)]}
    file["auth"] |= {"ssh_user": "root", "ssh_private_key": "/srv/key"}
    small = "--num-cpus=1 --object-store-memory=200000000"
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        file[commands] = [line.replace("ray start", f"ray start {small}") for line in file[commands]]
    return yaml.safe_dump(file, sort_keys=False)


class Cluster:
    """Two hosts, and a laptop with the checkout, the cluster file, a key and a token. `shared`: what all see."""

    def __init__(self, folder: Path, network: Network):
        self.folder, self.network, self.laptop, self.shared = folder, network, network.laptop, folder / "shared"
        self._write(folder / "laptop" / "cluster.yaml", cluster_file(CLUSTER_FILE.read_text()))
        self._write(folder / "laptop" / ".ray" / "auth_token", uuid.uuid4().hex)
        for number, name in HOSTS.items():
            own = {**PATIENCE, **BUCKET_S, "HF_HUB_OFFLINE": "1"}
            lines = [f"export {name}={value}\n" for name, value in own.items()]
            self._write(folder / name / ".bashrc", "".join(lines))
            installed(folder / name / "venv")
            self.boot(number)

    def _write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def boot(self, number: int) -> None:
        self.network.boot(number, {SHARED: self.shared})

    def typed(self, *command: str) -> list[str]:
        """To be run on the laptop, in the checkout."""
        return ["env", f"--chdir={CHECKOUT}", *command]

    def up(self) -> None:
        self.laptop.run(*self.typed("ray", "up", "-y", "--no-config-cache", "/root/cluster.yaml"), **LAPTOP_S)
        # what `ray dashboard` does, which gives up where the head is busy for 15 s
        forward = [*SSH, "-N", "-L", "8265:127.0.0.1:8265", f"root@{address(HEAD)}"]
        self.laptop.start(*forward, log=self.folder / "dashboard.log")
        self.wait_for_nodes()

    def replace_head(self) -> None:
        """The head loses power, and whoever on the laptop talked to it gives up; a machine with nothing on its disk but
        the environment takes its place, and is brought up."""
        self.network.cut_power(HEAD)
        for process, name in self.network.laptop.processes().items():
            if name in ("ssh", "ray"):
                process.kill()
        shutil.rmtree(self.folder / HOSTS[HEAD] / ".cache")
        self.boot(HEAD)
        self.up()

    def serve_bucket(self) -> None:
        self.laptop.start("moto_server", "-H", "0.0.0.0", "-p", str(PORT), log=self.folder / "bucket.log")
        deadline = time.monotonic() + UP_S
        while True:
            try:
                self.laptop.run("python", "-c", MAKE_BUCKET, **BUCKET_S)
                return
            except RuntimeError:
                assert time.monotonic() < deadline, (self.folder / "bucket.log").read_text()

    def down(self) -> None:
        self.laptop.run(*self.typed("ray", "down", "-y", "/root/cluster.yaml"), **LAPTOP_S)

    def wait_for_nodes(self) -> None:
        deadline, found = time.monotonic() + UP_S, ""
        while set(found.split()) != ADDRESSES:
            assert time.monotonic() < deadline, f"nodes after {UP_S} s: {found}\n{self.autoscaler()}"
            time.sleep(0.5)
            with suppress(RuntimeError):  # the dashboard, and the way to it, take some seconds
                found = self.laptop.run("python", "-c", ALIVE, **LAPTOP_S)

    def autoscaler(self) -> str:
        """What it last said, on the head."""
        return self.network.ssh(HEAD, "tail -n 60 /tmp/ray/session_latest/logs/monitor.*")

    def processes(self) -> dict[str, list[str]]:
        """Ray's, by host."""
        named = {host.name: set(host.processes().values()) for host in self.network.hosts.values()}
        return {host: sorted(name for name in names if "ray" in name) for host, names in named.items()}


def installed(venv: Path) -> None:
    """This machine's environment, as clusters/node.sh leaves one: it has then nothing to install."""
    venv.mkdir(parents=True)
    for entry in Path(sys.prefix).iterdir():
        if not entry.name.startswith("."):
            (venv / entry.name).symlink_to(entry)
    stamp = 'cat pyproject.toml constraints.txt - <<< " " | sha256sum'
    done = subprocess.run(["bash", "-c", stamp], cwd=ROOT, check=True, capture_output=True, text=True)
    (venv / ".installed").write_text(done.stdout)


class Job:
    """A search, submitted from the laptop: what it prints is in `log`. `output`: its run directory, or the working copy
    of one in a bucket, on the head's disk."""

    def __init__(self, cluster: Cluster, name: str, flags: list[str], folder: str = SHARED):
        self.cluster, self.name, self.log = cluster, name, cluster.folder / f"{name}.log"
        address = f"{folder}/{name}"
        if is_uri(folder):  # moto refuses the delayed way of pyarrow's to open a stream otherwise
            endpoint = quote(f"http://{LAPTOP}:{PORT}", safe="")
            address += f"?region=us-east-1&allow_delayed_open=true&endpoint_override={endpoint}"
            self.output = cluster.folder / HOSTS[HEAD] / CACHE / "runs" / working_folder(address).name
        else:
            self.output = cluster.shared / name
        submit = ["ray", "job", "submit", "--address", DASHBOARD, "--working-dir", ".", "--"]
        self.process = cluster.laptop.start(
            *cluster.typed(*submit, *search(address, flags)), log=self.log, PYTHONUNBUFFERED="1", **LAPTOP_S
        )

    def until(self, what: str, happened: Callable[[], Any], seconds: float) -> Any:
        """What `happened` returns, once that is something."""
        deadline = time.monotonic() + seconds
        while not (found := happened()):
            if self.process.poll() is not None:
                raise AssertionError(f"the job ended before {what}:\n{self.log.read_text()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"{seconds:g} s, and not yet: {what}\n{self.log.read_text()}")
            time.sleep(0.05)
        return found

    def ended(self) -> int:
        """Waits for its end; its exit status."""
        try:
            return self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end in {END_S} s:\n{self.log.read_text()}") from None

    def events(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        return [line for line in lines(self.output / "events.jsonl")
                if line["event"] == kind and fields.items() <= line.items()]  # fmt: skip

    def trains_on(self, node: str) -> str | None:
        """A trial that has finished a rung, and is some steps on its way to the next one there."""
        last = {event["trial"]: event["node"] for event in self.events("trial_placed")}
        for trial in [trial for trial, at in last.items() if at == node]:
            kinds = [line["kind"] for line in lines(self.output / "trials" / trial / "metrics.jsonl")]
            if "rung" in kinds and kinds[-1] == "step":
                return trial
        return None


def search(output: str, flags: list[str]) -> list[str]:
    """The command."""
    return ["python", "-m", "minitron_search.run", "--config", f"{SHARED}/search.yaml", "--output", output, *flags]


def lines(log: Path) -> list[dict[str, Any]]:
    """Those that are whole."""
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def finished(output: Path) -> dict[tuple[str, int], float]:
    """LM loss by trial and rung, of every rung in the trials' own logs."""
    found = {}
    for log in (output / "trials").glob("search-*/metrics.jsonl"):
        for line in lines(log):
            if line["kind"] == "rung":
                assert (line["trial"], line["rung"]) not in found, "a finished rung was computed again"
                found[line["trial"], line["rung"]] = line["lm_loss"]
    return found


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Every row of the search is the same. A retraining that two processes shared sums in another order."""
    apart = [[row for row in table if row["arm"] != "retrained"] for table in (ours, theirs)]
    assert apart[0] == apart[1]
    retrained = [[row["lm_loss"] for row in table if row["arm"] == "retrained"] for table in (ours, theirs)]
    assert len(retrained[0]) == len(retrained[1]) == 1
    assert abs(retrained[0][0] - retrained[1][0]) < 1e-4 * retrained[1][0], retrained


def told_of(told: Callable[[str], None], what: str, line: str) -> None:
    told(f"{what}: {line}")


def alone(cluster: Cluster) -> list[dict[str, Any]]:
    """The rows of the same search on the laptop, without a cluster."""
    cluster.laptop.run(
        *cluster.typed(*search(f"{SHARED}/alone", ["--resources.launcher", "inline"])), timeout=END_S,
        RAY_OVERRIDE_RESOURCES='{"CPU": 1}',  # how many threads compute the importance decides how it is rounded
        OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MINITRON_SEARCH_CACHE="/root/cache",
    )  # fmt: skip
    return rows(cluster.shared / "alone")


def trial_on_the_worker(cluster: Cluster, job: Job, launcher: str) -> str:
    """A trial that trains there, some steps past its first rung. Until one is placed there the head stands still."""
    with StandingStill(cluster.network.hosts[HEAD], launcher) as head:

        def placed() -> list[dict[str, Any]]:
            head.look()
            return job.events("trial_placed", node=address(WORKER))

        job.until("a trial is placed on the worker", placed, TRIAL_S)
    return job.until("a trial trains on the worker", lambda: job.trains_on(address(WORKER)), TRIAL_S)


def search_through_a_power_cut(
    cluster: Cluster, launcher: str, strategy: str, power_cut: str, folder: str, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Its rows; no finished one is lost or computed again."""
    worker, comes_back = address(WORKER), power_cut == "comes-back"
    flags = ["--resources.launcher", launcher, "--resources.strategy", strategy]
    job = Job(cluster, f"{launcher}-{power_cut}", flags, folder)
    trial = trial_on_the_worker(cluster, job, launcher)
    before = finished(job.output)
    say(f"the worker loses power; {trial} trains on it; {len(before)} rungs are finished")
    cluster.network.cut_power(WORKER)
    with StandingStill(cluster.network.hosts[HEAD], launcher) as head:

        def noticed(kind: str) -> list[dict[str, Any]]:
            if comes_back:
                head.look()
            return job.events(kind, node=worker)

        lost = job.until("the loss is a row of events.jsonl", lambda: noticed("node_lost"), LOST_S)[0]
        say(f"the driver has seen it: {lost['message']}")
        if comes_back:
            cluster.boot(WORKER)
            back = job.until("the worker is a node again", lambda: noticed("node_joined"), BACK_S)[0]
            say(f"it is back, {back['time'] - lost['time']:.0f} s later")
            job.until("it has a trial again", lambda: any(
                event["time"] > back["time"] for event in noticed("trial_placed")
            ), TRIAL_S)  # fmt: skip
    assert job.ended() == 0, job.log.read_text()
    placed = job.events("trial_placed")
    assert {event["node"] for event in placed} == ADDRESSES
    assert comes_back == any(event["node"] == worker and event["time"] > lost["time"] for event in placed)
    assert len(nodes := [event["node"] for event in placed if event["trial"] == trial]) > 1
    reached = finished(job.output)
    assert before.items() <= reached.items()
    table = rows(job.output)
    assert {(row["trial"], row["rung"]): row["lm_loss"] for row in table if row["arm"] == "search"} == reached
    say(f"the search has ended, {len(table)} rows; {trial} ran on {', '.join(nodes)}")
    return table


def search_through_the_loss_of_the_head(
    cluster: Cluster, launcher: str, strategy: str, folder: str, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Its rows, from a second job that goes on with what the first had finished, on a cluster with another head."""
    name, flags = f"{launcher}-head", ["--resources.launcher", launcher, "--resources.strategy", strategy]
    job = Job(cluster, name, flags, folder)
    trial = trial_on_the_worker(cluster, job, launcher)
    before = finished(job.output)
    say(f"the head loses power; {trial} trains on the worker; {len(before)} rungs are finished")
    cluster.replace_head()
    say("ray up: another head, and both hosts are nodes")
    job = Job(cluster, name, [*flags, "--resume"], folder)
    assert job.ended() == 0, job.log.read_text()
    reached = finished(job.output)
    assert before.items() <= reached.items()
    assert len(job.events("run_started")) == 2
    table = rows(job.output)
    say(f"the search has ended, {len(table)} rows, {len(reached) - len(before)} rungs since")
    return table


def refuse_a_folder_of_one_host(cluster: Cluster) -> None:
    """Output that only the head would see: said before anything is written, and the job has failed."""
    job = Job(cluster, "unshared", [], "/root")
    assert job.ended() != 0
    assert "output: /root/unshared is on this machine alone" in job.log.read_text()
    assert not (cluster.folder / HOSTS[HEAD] / "unshared").exists()


class StandingStill:
    """What trains on `host` does not, until this is left: it would end a search this short by itself. `look` finds what
    has begun to since, and is called often."""

    def __init__(self, host: Machine, launcher: str):
        self.host, self.trains, self.stopped = host, TRAINS[launcher], set[psutil.Process]()

    def look(self) -> None:
        for process, name in self.host.processes().items():
            if name.startswith(self.trains) and process not in self.stopped:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
                    self.stopped.add(process)

    def __enter__(self) -> "StandingStill":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.stopped:
            with suppress(psutil.NoSuchProcess):  # its group was half on the host that was lost
                process.resume()


@contextmanager
def two_hosts(folder: Path) -> Iterator[Cluster]:
    """All three, booted. Nothing is left of them afterwards but `folder`."""
    shared = folder / "shared"
    shared.mkdir(parents=True)
    (shared / "search.yaml").write_text(yaml.safe_dump(configuration(shared)))
    with Network(folder, HOSTS, {SHARED: shared, CHECKOUT: ROOT}) as network:
        yield Cluster(folder, network)


def scenario(
    folder: Path, launcher: str, strategy: str, power_cuts: list[str], storage: str, say: Callable[[str], None]
) -> None:
    began = time.monotonic()

    def told(line: str) -> None:
        say(f"{time.monotonic() - began:6.1f} s  {line}")

    with two_hosts(folder) as cluster:
        told("two hosts and a laptop are up")
        with ThreadPoolExecutor(1) as beside:
            searched = beside.submit(alone, cluster)
            cluster.up()
            told("ray up: both hosts are nodes")
        theirs = searched.result()
        told(f"a search on the laptop alone has ended, {len(theirs)} rows")
        if storage == "bucket":
            cluster.serve_bucket()
            told("a bucket is served")
        refuse_a_folder_of_one_host(cluster)
        told("a run directory that only the head would see was refused")
        for power_cut in power_cuts:
            if WORKER not in cluster.network.hosts:
                cluster.boot(WORKER)
                cluster.wait_for_nodes()
                told("the worker is a node again")
            place = f"s3://{BUCKET}" if storage == "bucket" else SHARED
            said = partial(told_of, told, f"{launcher}, {power_cut}")
            if power_cut == "head":
                table = search_through_the_loss_of_the_head(cluster, launcher, strategy, place, said)
            else:
                table = search_through_a_power_cut(cluster, launcher, strategy, power_cut, place, said)
            compare(table, theirs)
            told(f"{launcher}, {strategy}: every row is the same as on the laptop alone")
        cluster.down()
        told(f"ray down; left: {cluster.processes()}")
        deadline = time.monotonic() + DOWN_S
        while any(cluster.processes().values()):
            assert time.monotonic() < deadline, cluster.processes()
            time.sleep(0.5)
        told("no process of Ray is left")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--launcher", choices=["train", "inline"], default="train")
    parser.add_argument("--power-cuts", choices=POWER_CUTS, nargs="+", default=POWER_CUTS)
    parser.add_argument("--storage", choices=["folder", "bucket"], default="folder")
    parser.add_argument("--strategy", choices=["ddp", "fsdp2"], default="ddp", help="of a retraining on both hosts")
    parser.add_argument("--folder", type=Path, help="a new one, kept; default: a temporary one")
    options = parser.parse_args(arguments)
    if reason := missing():
        print(f"skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "hosts"
        scenario(folder.absolute(), options.launcher, options.strategy, options.power_cuts, options.storage, print)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
