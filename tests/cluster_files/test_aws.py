"""cluster.yaml on AWS, in the account that clusters/aws_account.py made ready: what is sent, and what it allows."""

import io
import subprocess
from contextlib import redirect_stdout

import boto3
import pytest
import yaml
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config

from clusters import aws_account
from tests.cluster_files.aws import BUCKET, HERE, REGION, empty_account, policies
from tests.cluster_files.files import ROOT


@pytest.fixture(scope="module")
def resolved(tmp_path_factory):
    """cluster.yaml after the command that aws_account.py says to run, as `ray up` resolves it before it starts any."""
    with empty_account():
        said = io.StringIO()
        with redirect_stdout(said):
            aws_account.main(BUCKET, REGION, HERE)
        folder = tmp_path_factory.mktemp("project")
        (folder / "cluster.yaml").write_text((ROOT / "cluster.yaml").read_text())
        (sed,) = (line for line in said.getvalue().splitlines() if line.startswith("sed "))
        subprocess.run(["bash", "-c", sed], cwd=folder, check=True)
        config = prepare_config(yaml.safe_load((folder / "cluster.yaml").read_text()))
        config = AWSNodeProvider.fillout_available_node_types_resources(config)
        validate_config(config)
        yield AWSNodeProvider.bootstrap_config(config)


@pytest.fixture(scope="module")
def launched(resolved):
    """{node type: (the request for one, the instance)}"""
    provider, requests, found = AWSNodeProvider(resolved["provider"], resolved["cluster_name"]), [], {}
    events = provider.ec2_fail_fast.meta.client.meta.events
    events.register("provide-client-params.ec2.RunInstances", lambda params, **_: requests.append(params))
    for name, node_type in resolved["available_node_types"].items():
        kind = "head" if name == resolved["head_node_type"] else "worker"
        tags = {"ray-node-type": kind, "ray-node-name": f"ray-{kind}", "ray-user-node-type": name,
                "ray-node-status": "uninitialized", "ray-launch-config": "hash"}  # fmt: skip
        (started,) = provider.create_node(node_type["node_config"], tags, 1).values()
        found[name] = requests.pop(), started
    assert not requests
    return found


def test_workers_are_spot_and_the_head_is_not(launched):
    (head, head_instance), (worker, worker_instance) = launched["head"], launched["gpu_spot"]
    assert worker["InstanceMarketOptions"] == {"MarketType": "spot"} and worker_instance.instance_lifecycle == "spot"
    assert "InstanceMarketOptions" not in head and head_instance.instance_lifecycle != "spot"
    assert (head["InstanceType"], worker["InstanceType"]) == ("m7i-flex.xlarge", "g6e.2xlarge")
    assert (worker["MinCount"], worker["MaxCount"]) == (1, 1)


def test_ray_knows_the_workers_gpu_and_gives_the_head_none(resolved):
    head, worker = (resolved["available_node_types"][name]["resources"] for name in ("head", "gpu_spot"))
    assert head["CPU"] == head["GPU"] == 0
    assert worker["CPU"] == 8 and worker["GPU"] == 1 and worker["memory"] > 40e9


def test_images_are_amazons_and_canonicals_latest(launched):
    head, worker = (launched[name][0]["ImageId"] for name in ("head", "gpu_spot"))
    assert head.startswith("resolve:ssm:/aws/service/canonical/ubuntu/server/24.04/")
    assert worker.startswith("resolve:ssm:/aws/service/deeplearning/ami/x86_64/")


def test_every_volume_is_encrypted_and_ends_with_its_node(launched):
    for request, _ in launched.values():
        for mapping in request["BlockDeviceMappings"]:
            assert mapping["Ebs"]["Encrypted"] and mapping["Ebs"]["DeleteOnTermination"]
    assert [volume.encrypted for volume in boto3.resource("ec2").volumes.all()] == [True, True]


def test_metadata_needs_a_token(launched):
    for request, instance in launched.values():
        assert request["MetadataOptions"]["HttpTokens"] == "required"
        assert request["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
        assert instance.metadata_options["HttpTokens"] == "required"


def test_everything_is_tagged_with_the_cluster(launched):
    for name, (request, _) in launched.items():
        of = {spec["ResourceType"]: {tag["Key"]: tag["Value"] for tag in spec["Tags"]}
              for spec in request["TagSpecifications"]}  # fmt: skip
        assert of["instance"]["ray-cluster-name"] == aws_account.CLUSTER
        assert of["instance"]["ray-user-node-type"] == name
        assert of["instance"]["project"] == of["volume"]["project"] == "minitron-search"


def test_nothing_is_open_but_ssh_to_the_head_from_where_the_user_said(launched):
    ec2 = boto3.resource("ec2")
    (_, head), (_, worker) = launched["head"], launched["gpu_spot"]
    cluster, ssh = (ec2.SecurityGroup(each["GroupId"]) for each in head.security_groups)
    assert [each["GroupId"] for each in worker.security_groups] == [cluster.id]
    (itself,) = cluster.ip_permissions
    assert not itself["IpRanges"] and not itself.get("Ipv6Ranges") and not itself.get("PrefixListIds")
    assert [pair["GroupId"] for pair in itself["UserIdGroupPairs"]] == [cluster.id]
    (port,) = ssh.ip_permissions
    assert (port["FromPort"], port["ToPort"], port["IpProtocol"]) == (22, 22, "tcp")
    assert port["IpRanges"] == [{"CidrIp": HERE}] and not port.get("Ipv6Ranges")


def test_ray_adds_no_group_rule_role_or_secret_of_its_own(launched):
    names = {group.group_name for group in boto3.resource("ec2").security_groups.all()}
    assert names <= {"default", "minitron-search", "minitron-search-ssh"}
    roles = {role["RoleName"] for role in boto3.client("iam").list_roles()["Roles"]}
    assert roles <= {
        "minitron-search-head",
        "minitron-search-worker",
        "AWSServiceRoleForspot",
    }  # moto's name of the last
    for name, (request, _) in launched.items():
        assert "UserData" not in request
        assert request["IamInstanceProfile"] == {"Name": f"minitron-search-{'head' if name == 'head' else 'worker'}"}


def test_the_bucket_is_private(resolved):
    s3 = boto3.client("s3")
    assert all(s3.get_public_access_block(Bucket=BUCKET)["PublicAccessBlockConfiguration"].values())


def test_workers_may_use_the_bucket_and_nothing_else(resolved):
    for statement in statements(policies("worker")):
        assert all(action.startswith("s3:") and "*" not in action for action in listed(statement["Action"]))
        assert all(
            each in (f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*") for each in listed(statement["Resource"])
        )


def test_the_head_may_start_and_end_workers_of_this_cluster_only(resolved):
    found = {statement["Sid"]: statement for statement in statements(policies("head"))}
    anywhere = {action for each in found.values() if each["Resource"] == "*" for action in listed(each["Action"])}
    assert anywhere == {"ec2:DescribeInstances", "ec2:DescribeInstanceTypes"}  # AWS knows no narrower resource
    cluster = resolved["cluster_name"]
    for statement in found.values():
        assert statement["Effect"] == "Allow" and not any("*" in action for action in listed(statement["Action"]))
        if "ec2:TerminateInstances" in listed(statement["Action"]):
            assert statement["Condition"] == {"StringEquals": {"aws:ResourceTag/ray-cluster-name": cluster}}
        if "ec2:RunInstances" in listed(statement["Action"]) and "instance/" in str(statement["Resource"]):
            assert statement["Condition"]["StringEquals"]["aws:RequestTag/ray-cluster-name"] == cluster
    worker = resolved["available_node_types"]["gpu_spot"]["node_config"]
    (group,) = worker["SecurityGroupIds"]
    assert found["InTheClustersGroup"]["Resource"][0].endswith(f":security-group/{group}")
    profile = boto3.client("iam").get_instance_profile(InstanceProfileName=worker["IamInstanceProfile"]["Name"])
    assert found["GiveWorkersTheirRole"]["Resource"] == profile["InstanceProfile"]["Roles"][0]["Arn"]


def statements(documents):
    return [statement for document in documents.values() for statement in document["Statement"]]


def listed(value):
    return value if isinstance(value, list) else [value]
