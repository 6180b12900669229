"""Machines that are namespaces of this one: each with its own network, mounts, processes, name and sshd.

A `Network` is a bridge and the laptop that the commands are typed on; a `Host` is a machine on that bridge. What they
share with this machine is its kernel and, read-only, its file system: hence its Python environment, which is too slow
to install twice. Of their own they have a home, /tmp, /run, /dev/shm and whatever is mounted for them; the checkout
they do not see.

Every one of them lives in a PID namespace and ends with the first process in it, a shell that waits for its input to
end: so all of them are gone when whoever started them is, even by SIGKILL. Nothing is left in /run/netns.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
SUBNET = "10.77.0"
LAPTOP = f"{SUBNET}.1"
PRIVATE = ("/tmp", "/run", "/dev/shm", "/srv")  # a tmpfs of its own, on every machine
PROGRAMS = {"ip": "iproute2", "rsync": "rsync", "sshd": "openssh-server", "ssh": "openssh-client",
            "ssh-keygen": "openssh-client", "unshare": "util-linux", "nsenter": "util-linux"}  # fmt: skip
SSHD = ("-D", "-e", "-f", "/dev/null", "-o", "PidFile=none", "-o", "UsePAM=no", "-o", "UseDNS=no",
        "-o", "PermitRootLogin=yes", "-o", "PasswordAuthentication=no")  # fmt: skip
# on the laptop
SSH = ("ssh", "-i", "/srv/key", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
       "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=5")  # fmt: skip
START_S = 60


def missing() -> str | None:
    """Why no machines can be made here; None where they can."""
    absent = sorted({package for program, package in PROGRAMS.items() if _which(program) is None})
    if absent:
        return f"not installed: {', '.join(absent)}"
    if os.geteuid() != 0:
        return "not root, and namespaces with a network need to be"
    tried = "mount -t tmpfs tmpfs /srv && ip link add br0 type bridge"
    made = subprocess.run([*_unshare(), "sh", "-c", tried], capture_output=True, text=True)
    if made.returncode:
        return f"no namespaces here: {made.stderr.strip()}"
    return None


class Machine:
    """One of them, up. `home`: what is at /root, kept when it goes down. `mounts`: folders, by where it sees them;
    None for a tmpfs that goes with it. `hides`: what it sees nothing of."""

    def __init__(
        self, name: str, home: Path, mounts: Mapping[str, Path | None], hides: Sequence[Path], last_words: str
    ):
        self.name, self.log = name, home.with_suffix(".log")
        home.mkdir(parents=True, exist_ok=True)
        script = "\n".join(["set -e", f"hostname {name}", *_mounts(home, mounts, hides), last_words, "read _ || true"])
        with open(self.log, "a") as log:
            self._unshare = subprocess.Popen(
                [*_unshare(), "bash", "-c", script], stdin=subprocess.PIPE, stdout=log, stderr=log, env=_environment()
            )
        self.pid = self._first_process()

    def _first_process(self) -> int:
        """The PID, out here, of the shell that everything in there ends with."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.is_up():
            for child in psutil.Process(self._unshare.pid).children():
                return child.pid
            time.sleep(0.01)
        raise RuntimeError(f"{self.name} did not start: {self.log.read_text()}")

    def is_up(self) -> bool:
        return self._unshare.poll() is None

    def command(self, *command: str, **environment: str) -> list[str]:
        """What runs `command` there, as root at home."""
        named = [f"{name}={value}" for name, value in environment.items()]
        inside = ["nsenter", f"--target={self.pid}", "--mount", "--uts", "--net", "--pid"]
        return [*inside, "env", "--chdir=/root", *named, *command]

    def start(self, *command: str, log: Path, **environment: str) -> "subprocess.Popen[str]":
        with open(log, "w") as out:
            return subprocess.Popen(
                self.command(*command, **environment), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                text=True, env=_environment(),
            )  # fmt: skip

    def run(self, *command: str, timeout: float = 120, **environment: str) -> str:
        """What it printed; raises RuntimeError where it failed or took longer."""
        try:
            done = subprocess.run(
                self.command(*command, **environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, timeout=timeout, env=_environment(),
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            took = f"{self.name}: {shlex.join(command)} took over {timeout:g} s"
            raise RuntimeError(f"{took}:\n{error.output}") from error
        if done.returncode:
            raise RuntimeError(f"{self.name}: {shlex.join(command)} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def processes(self) -> dict[psutil.Process, str]:
        """The name of every process there, as seen from out here. Ray's say in it what they do."""
        namespace, found = os.readlink(f"/proc/{self.pid}/ns/pid"), {}
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):  # it ended meanwhile
                if os.readlink(f"/proc/{process.pid}/ns/pid") == namespace:
                    found[process] = process.name()
        return found

    def kill(self) -> None:
        """Everything there, at once: nothing is told that it ends."""
        self._unshare.kill()  # it was told to take the first process with it, and the kernel takes the rest
        self._unshare.wait()
        assert self._unshare.stdin is not None
        self._unshare.stdin.close()


class Network:
    """A laptop with a bridge, and the hosts on it. `folder`: homes and logs. Leaving it ends them all.

    names: of the hosts, by the last number of their address. laptop: folders, by where the laptop sees them.
    """

    def __init__(self, folder: Path, names: Mapping[int, str], laptop: Mapping[str, Path | None]):
        self.folder, self.names = folder, names
        self.hosts: dict[int, Machine] = {}
        self.ssh_key = folder / "key"
        folder.mkdir(parents=True, exist_ok=True)
        for key in (self.ssh_key, folder / "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        lines = ["127.0.0.1 localhost", f"{LAPTOP} laptop", *(f"{address(n)} {name}" for n, name in names.items())]
        (folder / "hosts").write_text("".join(f"{line}\n" for line in lines))
        (folder / "resolv.conf").write_text("")
        seen = self._mounts({"/srv/key": self.ssh_key, **laptop})
        self.laptop = Machine("laptop", folder / "laptop", seen, [], "true")
        for line in ("link set lo up", "link add br0 type bridge", f"addr add {LAPTOP}/24 dev br0", "link set br0 up"):
            self._ip(self.laptop, line)

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts.values():
            host.kill()
        self.laptop.kill()

    def boot(self, number: int, mounts: Mapping[str, Path | None]) -> Machine:
        """The host at `address(number)`, as it was left: its sshd answers when this returns."""
        name = self.names[number]
        home = self.folder / name
        authorized = home / ".ssh" / "authorized_keys"
        authorized.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        home.chmod(0o700)
        authorized.write_text(self.ssh_key.with_suffix(".pub").read_text())
        own = {"/srv/host_key": self.folder / "host_key", **mounts}
        sshd = f"mkdir -p /run/sshd; {shlex.join([str(_which('sshd')), *SSHD])} -h /srv/host_key &"
        host = self.hosts[number] = Machine(name, home, self._mounts(own), [ROOT], sshd)
        card = f"02:00:00:00:00:{number:02x}"  # the same after a reboot, as the others remember it
        self._ip(self.laptop, f"link add v-{name} type veth peer name eth0 address {card} netns {host.pid}")
        self._ip(self.laptop, f"link set v-{name} master br0 up")
        # Ray takes the address of the default route for its own
        for line in ("link set lo up", f"addr add {address(number)}/24 dev eth0", "link set eth0 up",
                     f"route add default via {LAPTOP}"):  # fmt: skip
            self._ip(host, line)
        self._wait_for_sshd(number)
        return host

    def cut_power(self, number: int) -> None:
        """The wire first, so that nobody hears of it: without it the kernel would close every connection."""
        self._ip(self.laptop, f"link delete v-{self.names[number]}")
        self.hosts.pop(number).kill()

    def ssh(self, number: int, command: str, timeout: float = 60) -> str:
        return self.laptop.run(*SSH, f"root@{address(number)}", command, timeout=timeout)

    def _wait_for_sshd(self, number: int) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                self.ssh(number, "true", timeout=10)
                return
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _mounts(self, own: Mapping[str, Path | None]) -> dict[str, Path | None]:
        return {"/etc/hosts": self.folder / "hosts", "/etc/resolv.conf": self.folder / "resolv.conf", **own}

    def _ip(self, machine: Machine, line: str) -> None:
        inside = ["nsenter", f"--target={machine.pid}", "--net", "ip", *line.split()]
        subprocess.run(inside, check=True, capture_output=True, text=True)


def address(number: int) -> str:
    return f"{SUBNET}.{number}"


def _unshare() -> list[str]:
    return ["unshare", "--mount", "--pid", "--uts", "--net", "--fork", "--kill-child", "--mount-proc"]


def _environment() -> dict[str, str]:
    """Of everything there: nothing of the process that started it but what finds programs."""
    path = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "HOME": "/root", "LANG": "C.UTF-8", "USER": "root"}


def _which(program: str) -> str | None:
    return shutil.which(program, path=_environment()["PATH"])


def _mounts(home: Path, mounts: Mapping[str, Path | None], hides: Sequence[Path]) -> list[str]:
    """Commands. What is to be seen again in a place that is covered is first laid aside in /srv."""
    covered = [*map(Path, PRIVATE), *hides, Path("/root")]
    python = [Path(folder) for folder in {sys.prefix, sys.base_prefix}]
    python = [folder for folder in python if any(folder.is_relative_to(cover) for cover in covered)]
    given = {place: source for place, source in mounts.items() if source is not None}
    sources = [home, *python, *given.values()]
    aside = {source: f"/srv/.aside/{index}" for index, source in enumerate(sources)}
    lines = ["mount -t tmpfs -o mode=755 tmpfs /srv", "mkdir /srv/.aside"]
    lines += [_bind(source, shlex.quote(str(source)), place) for source, place in aside.items()]
    for cover in [*(place for place in PRIVATE if place != "/srv"), *hides]:
        at = shlex.quote(str(cover))
        lines.append(
            f"mkdir -p {at}; mount -t tmpfs -o mode=1777 tmpfs {at}"
        )  # a checkout may be in /tmp, covered by now
    lines.append(f"mount --bind {aside[home]} /root")
    for source, place in [*((folder, str(folder)) for folder in python), *((of, at) for at, of in given.items())]:
        lines.append(_bind(source, aside[source], shlex.quote(place)))
    for folder in python:
        lines.append(f"mount -o remount,bind,ro {shlex.quote(str(folder))}")
    lines += [f"mkdir -p {at}; mount -t tmpfs tmpfs {at}" for at, source in mounts.items() if source is None]
    return [*lines, "mount -o remount,bind,ro /"]  # last: a bind of what is read-only is read-only


def _bind(source: Path, seen: str, place: str) -> str:
    made = f"mkdir -p {place}" if source.is_dir() else f"[ -e {place} ] || touch {place}"
    return f"{made}; mount --bind {seen} {place}"
