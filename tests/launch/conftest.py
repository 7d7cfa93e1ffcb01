"""What programs share that the tests of this folder start."""

import pytest


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """A folder of compiled programs, for `--compile_cache`. One that is killed while it
    writes there leaves what the next start mends (`launch.command`)."""
    return tmp_path_factory.mktemp("programs")
