from __future__ import annotations

import json
import subprocess
import sys

import pytest

CODE = """
import json, resource, sys
from dnb.transport.system.open_files import raise_file_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
raise_file_limit()
print(json.dumps(resource.getrlimit(resource.RLIMIT_NOFILE)))
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [((256, 1024), [1024, 1024]), ((1024, 1024), [1024, 1024]), ((64, 100_000), [65_536, 100_000])],
    ids=["to the hard limit", "as it is", "to what is enough"],
)
def test_the_soft_limit_of_files_is_raised_as_far_as_it_may_and_needs_to(before: tuple[int, int], after: list[int]):
    import resource

    if before[1] > resource.getrlimit(resource.RLIMIT_NOFILE)[1]:
        pytest.skip("this user may not open so many files")
    command = [sys.executable, "-c", CODE, *map(str, before)]
    assert json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == after
