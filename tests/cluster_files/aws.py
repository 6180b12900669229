"""Accounts of Amazon's that are all in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto import mock_aws
from ray.autoscaler._private.aws import utils

REGION, BUCKET, HERE = "us-west-2", "some-bucket", "203.0.113.7/32"


@contextmanager
def empty_account() -> Iterator[None]:
    with mock_aws():
        utils.resource_cache.cache_clear()  # Ray keeps the clients of the last account
        utils.client_cache.cache_clear()
        yield


def policies(kind: str) -> dict[str, dict[str, Any]]:
    iam, role = boto3.client("iam"), f"minitron-search-{kind}"
    names = iam.list_role_policies(RoleName=role)["PolicyNames"]
    assert not iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]
    return {name: iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"] for name in names}
