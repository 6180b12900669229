"""clusters/aws_account.py in an empty account, and again in one that it made."""

import json
from string import Template

import boto3
import pytest
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

from clusters import aws_account
from tests.cluster_files.aws import BUCKET, HERE, REGION, empty_account, policies
from tests.cluster_files.files import ROOT, prepared


@pytest.fixture
def account():
    with empty_account():
        yield


def test_as_shipped_nothing_starts(account):
    with pytest.raises(AssertionError):  # Ray's, after it has said that there are no such groups
        AWSNodeProvider.bootstrap_config(prepared("cluster.yaml"))
    assert not list(boto3.resource("ec2").instances.all())


def test_a_second_run_changes_the_address_and_nothing_else(account):
    def permissions():
        groups = boto3.client("ec2").describe_security_groups()["SecurityGroups"]
        return {group["GroupName"]: group["IpPermissions"] for group in groups}

    aws_account.main(BUCKET, REGION, HERE)
    before = permissions()
    aws_account.main(BUCKET, REGION, "198.51.100.0/30")
    after = permissions()
    assert [rule["CidrIp"] for rule in after["minitron-search-ssh"][0]["IpRanges"]] == ["198.51.100.0/30"]
    assert after["minitron-search"] == before["minitron-search"] and after.keys() == before.keys()


def test_without_an_address_no_port_is_open_and_systems_manager_reaches_the_head(account):
    aws_account.main(BUCKET, REGION)
    groups = boto3.client("ec2").describe_security_groups()["SecurityGroups"]
    assert [group["IpPermissions"] for group in groups if group["GroupName"] == "minitron-search-ssh"] == [[]]
    assert set(policies("head")) == {"worker", "head", "session"} and set(policies("worker")) == {"worker"}
    aws_account.main(BUCKET, REGION, HERE)
    assert set(policies("head")) == {"worker", "head"}


@pytest.mark.parametrize("network", ["0.0.0.0/0", "10.0.0.0/8"])
def test_the_world_is_refused(account, network):
    with pytest.raises(SystemExit, match="valid: 203.0.113.7/32"):
        aws_account.main(BUCKET, REGION, network)


def test_policies_are_whole_once_filled_in():
    names = dict.fromkeys(("BUCKET", "REGION", "ACCOUNT", "CLUSTER", "GROUP"), "x")
    for file in (ROOT / "clusters").glob("aws-policy-*.json"):
        assert json.loads(Template(file.read_text()).substitute(names))["Version"] == "2012-10-17"
