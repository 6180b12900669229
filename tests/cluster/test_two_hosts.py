"""What `two_hosts` does by hand; skipped, and said to be, where no namespaces can be made."""

from pathlib import Path

import pytest

from tests.cluster.hosts import missing
from tests.cluster.two_hosts import scenario

pytestmark = [pytest.mark.slow, pytest.mark.hosts]


def test_a_search_on_two_hosts_survives_power_cuts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        if reason := missing():
            print(f"\ntests/cluster: no search on two hosts: {reason}")
            pytest.skip(reason)
        scenario(tmp_path / "hosts", "inline", "ddp", ["comes-back", "head"], "folder", print)
