import pytest

from tests.cluster_files.aws import REGION


@pytest.fixture(scope="package", autouse=True)
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray keeps the ssh key it makes in ~/.ssh
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        yield
