"""Once for an AWS account: what cluster.yaml expects to be there. Run again, it changes nothing, or what you changed.

    python clusters/aws_account.py --bucket NAME [--region us-west-2] [--ssh-from 203.0.113.7/32]

A bucket (private, encrypted), two security groups, and a role with an instance profile for the head and for workers, of
the policies beside this file. With --ssh-from, ssh to the head from that network; without, through Systems Manager, and
no port is open. Uses your own AWS credentials, keeps none, starts nothing that costs by the hour.
"""

import argparse
import json
from collections.abc import Callable
from ipaddress import IPv4Network
from pathlib import Path
from string import Template
from typing import Any

import boto3
from botocore.exceptions import ClientError

CLUSTER = "minitron-search"  # cluster.yaml's cluster_name: the head may end instances with this tag, and no others
EC2_ASSUMES = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}],
}


def main(bucket: str, region: str = "us-west-2", ssh_from: str | None = None) -> None:
    """Make what is not there, and print what to fill in. `ssh_from`: a network that may reach the head by ssh."""
    network = None if ssh_from is None else IPv4Network(ssh_from)
    if network and network.num_addresses > 2**16:
        raise SystemExit(f"--ssh-from {ssh_from}: {network.num_addresses:,} addresses; valid: 203.0.113.7/32 (yours)")
    make_bucket(bucket, region)
    cluster, ssh = security_groups(region, network)
    account = boto3.client("sts", region_name=region).get_caller_identity()["Account"]
    names = {"BUCKET": bucket, "REGION": region, "ACCOUNT": account, "CLUSTER": CLUSTER, "GROUP": cluster}
    make_role("worker", ["worker"], names)
    make_role("head", ["worker", "head"] + ([] if ssh_from else ["session"]), names)
    allow_spot()
    filled = {"sg-FILL-IN-CLUSTER": cluster, "sg-FILL-IN-SSH": ssh, "region: us-west-2": f"region: {region}"}
    print("done. Now:\nsed -i", *(f"-e 's/{old}/{new}/'" for old, new in filled.items()), "cluster.yaml")
    print(f"and give runs --output s3://{bucket}/NAME")


def make_bucket(name: str, region: str) -> None:
    """Private; encrypted, as every new bucket is; parts of uploads that were cut off are removed."""
    s3 = boto3.client("s3", region_name=region)
    where: Any = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    _unless("BucketAlreadyOwnedByYou", lambda: s3.create_bucket(Bucket=name, **where))
    blocks = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
    s3.put_public_access_block(Bucket=name, PublicAccessBlockConfiguration=dict.fromkeys(blocks, True))
    ended = {"ID": "cut-off-uploads", "Status": "Enabled", "Filter": {"Prefix": ""},
             "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7}}  # fmt: skip
    s3.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration={"Rules": [ended]})


def security_groups(region: str, ssh_from: IPv4Network | None) -> tuple[str, str]:
    """Ids of the group of all nodes, which lets in nothing but itself, and of the head's, which lets in ssh."""
    ec2 = boto3.client("ec2", region_name=region)
    vpcs = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not vpcs:
        raise SystemExit(f"{region} has no default VPC; valid: aws ec2 create-default-vpc --region {region}")
    groups = []
    for name, purpose in ((CLUSTER, "the cluster itself"), (f"{CLUSTER}-ssh", "ssh to the head")):
        of_name = [{"Name": "group-name", "Values": [name]}, {"Name": "vpc-id", "Values": [vpcs[0]["VpcId"]]}]
        found = ec2.describe_security_groups(Filters=of_name)["SecurityGroups"]
        described = {"GroupName": name, "Description": f"minitron_search: {purpose}", "VpcId": vpcs[0]["VpcId"]}
        groups.append(found[0] if found else ec2.create_security_group(**described))
    cluster, ssh = (group["GroupId"] for group in groups)
    itself: Any = [{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": cluster}]}]
    _unless("InvalidPermission.Duplicate", lambda: ec2.authorize_security_group_ingress(
        GroupId=cluster, IpPermissions=itself))  # fmt: skip
    if before := groups[1].get("IpPermissions"):  # the addresses of last time
        ec2.revoke_security_group_ingress(GroupId=ssh, IpPermissions=before)
    if ssh_from:
        port: Any = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": str(ssh_from)}]}
        ec2.authorize_security_group_ingress(GroupId=ssh, IpPermissions=[port])
    return cluster, ssh


def make_role(kind: str, policies: list[str], names: dict[str, str]) -> None:
    """Role and instance profile minitron-search-KIND with these policies and no others."""
    iam, name = boto3.client("iam"), f"{CLUSTER}-{kind}"
    trust = json.dumps(EC2_ASSUMES)
    _unless("EntityAlreadyExists", lambda: iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust))
    for old in set(iam.list_role_policies(RoleName=name)["PolicyNames"]) - set(policies):
        iam.delete_role_policy(RoleName=name, PolicyName=old)
    for policy in policies:
        document = Template((Path(__file__).parent / f"aws-policy-{policy}.json").read_text()).substitute(names)
        iam.put_role_policy(RoleName=name, PolicyName=policy, PolicyDocument=document)
    _unless("EntityAlreadyExists", lambda: iam.create_instance_profile(InstanceProfileName=name))
    _unless("LimitExceeded", lambda: iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name))


def allow_spot() -> None:
    """The account's role for spot instances: made by EC2 where a person starts the first one, but the head may not."""
    iam = boto3.client("iam")
    roles = iam.get_paginator("list_roles").paginate(PathPrefix="/aws-service-role/spot.amazonaws.com/")
    if not any(page["Roles"] for page in roles):
        iam.create_service_linked_role(AWSServiceName="spot.amazonaws.com")


def _unless(there: str, make: Callable[[], object]) -> None:
    """`make()`, where AWS does not answer with the error that says it was made before."""
    try:
        make()
    except ClientError as error:
        if error.response["Error"]["Code"] != there:
            raise


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bucket", required=True, help="of the runs' output, new or yours; unique in the world")
    parser.add_argument("--region", default="us-west-2", help="cluster.yaml's")
    parser.add_argument("--ssh-from", metavar="NETWORK", help="your address as a network, as in 203.0.113.7/32")
    main(**vars(parser.parse_args()))
