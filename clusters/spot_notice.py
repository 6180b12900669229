"""Waits on a spot node for its cloud's notice, and tells Ray to place nothing more there.

    python clusters/spot_notice.py aws | gcp [--endpoint URL] [--every SECONDS]

AWS gives two minutes, Google thirty seconds. What runs on the node runs until it is gone, and goes on elsewhere from
its last checkpoint; the search writes the notice to events.jsonl as `node_leaving`. Needs nothing but Python and Ray.
"""

import argparse
import subprocess
import sys
import time
import urllib.error
import urllib.request

TOKEN_S = 3600
# where the notice is, the headers it asks for, and the seconds it gives
NOTICES = {
    "aws": ("http://169.254.169.254", "/latest/meta-data/spot/instance-action", {}, 120),
    "gcp": ("http://metadata.google.internal", "/computeMetadata/v1/instance/preempted",
            {"Metadata-Flavor": "Google"}, 30),
}  # fmt: skip


def answer(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """None where there is nothing there, as long as no notice is given."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=5) as found:
            return found.read().decode().strip()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        print(f"spot_notice: {url}: {error}", file=sys.stderr, flush=True)
        return None


def noticed(cloud: str, endpoint: str) -> str | None:
    """What the notice says."""
    _, path, headers, _ = NOTICES[cloud]
    if cloud == "aws":  # the version of the metadata service that asks for a token, the only one cluster.yaml leaves on
        wanted = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)}
        headers = {"X-aws-ec2-metadata-token": answer(f"{endpoint}/latest/api/token", wanted, "PUT") or ""}
    said = answer(endpoint + path, headers)
    return None if said is None or said == "FALSE" else said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cloud", choices=NOTICES)
    parser.add_argument("--endpoint", help="of the metadata service")
    parser.add_argument("--every", type=float, default=5.0)
    asked = parser.parse_args()
    endpoint, seconds = asked.endpoint or NOTICES[asked.cloud][0], NOTICES[asked.cloud][3]
    while (said := noticed(asked.cloud, endpoint)) is None:
        time.sleep(asked.every)
    print(f"spot_notice: {said}", flush=True)
    return subprocess.run([
        "ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", f"spot notice: {said}",
        "--deadline-remaining-seconds", str(seconds),
    ]).returncode  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
