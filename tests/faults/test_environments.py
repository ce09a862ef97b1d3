"""Machines on which no pool can be: said in one sentence, within seconds, and nothing is left."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.leftovers import Leftovers

pytestmark = pytest.mark.faults

# What a user would type; the error's text is the last line.
START = """
import sys
{before}
import dnb
try:
    {call}
except dnb.DnbError as error:
    from dnb.api import pools
    assert pools.current_pool() is None
    print(type(error).__name__, error, sep=": ")
else:
    print("no error")
"""
FIT = "import torch; dnb.fit(torch.nn.Linear(4, 2), (torch.ones(64, 4), torch.ones(64, 2)), loss='mse_loss', {})"


@pytest.fixture
def ask(tmp_path):
    """Runs a line in a fresh interpreter, and proves that it leaves nothing; what it says."""
    home = tmp_path / "home"
    home.mkdir()
    leftovers = Leftovers()

    def ask(call, *, before="", prefix=(), **environment):
        if prefix:
            tried = subprocess.run([*prefix, "true"], cwd=tmp_path, capture_output=True, text=True)
            if tried.returncode:
                pytest.skip(f"this user may not do that: {tried.stderr.strip()}")
        settings = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(home), **environment}
        asked = subprocess.run(
            [*prefix, sys.executable, "-W", "error", "-c", START.format(call=call, before=before)],
            cwd=tmp_path,
            env={name: value for name, value in settings.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert asked.returncode == 0, asked.stderr
        leftovers.wait_until_none()
        assert list(home.iterdir()) == []
        assert not (tmp_path / ".dnb").exists()
        return asked.stdout.strip()

    return ask


def test_a_host_without_a_loopback_interface_is_told_how_to_get_one(ask):
    told = ask("dnb.start(n=1)", prefix=("unshare", "--net"))
    assert told == (
        "PoolError: the processes of a pool talk over 127.0.0.1, which does not work here (Network is unreachable): "
        "the loopback interface is down; `ip link set lo up`, as root, mends that"
    )


FEW_FILES = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"


@pytest.mark.parametrize("call", ["dnb.start(n=1)", FIT.format("steps=1")], ids=["start", "fit"])
def test_a_kernel_that_may_open_few_files_is_told_how_many_are_needed(ask, call):
    told = ask(call, before=FEW_FILES)
    assert told.startswith("PoolError: this kernel may not open enough files (a pool of ")
    assert "engines opens about 1" in told
    assert told.endswith(
        "and 64 are allowed): `ulimit -n 4096` in the shell that starts it, or the nofile limit of its "
        "service or container, allows more"
    )


@pytest.mark.parametrize(
    "call", ["dnb.start(n=1)", "dnb.attach()", FIT.format("steps=1")], ids=["start", "attach", "fit"]
)
def test_an_ipython_folder_that_cannot_be_made_is_named(ask, tmp_path, call):
    (tmp_path / "file").write_text("")
    told = ask(call, IPYTHONDIR=str(tmp_path / "file" / "ipython"))
    assert told == (
        "PoolError: IPython's folder, in which a pool keeps its connection files, cannot be made or written in "
        f"{tmp_path}/file: mend its permissions, or set IPYTHONDIR to a folder that you can write"
    )


def test_a_home_that_is_missing_is_named(ask):
    told = ask("dnb.start(n=1)", IPYTHONDIR=None, HOME="/nonexistent/home")
    assert told.startswith("PoolError: IPython's folder, in which a pool keeps its connection files, cannot be made or")
    assert "in /nonexistent/home: mend its permissions" in told


def test_a_profile_whose_name_is_too_long_for_a_folder_is_refused(ask):
    told = ask("dnb.start(n=1, profile='a' * 300)")
    assert told.startswith(f"PoolError: the profile {'a' * 60!r} cannot be made (File name too long): name another one")


@pytest.mark.parametrize("name", ["'a' * 300", "7"])
def test_a_name_that_no_run_can_have_is_refused_before_a_pool_is_started(ask, name):
    assert ask(FIT.format(f"name={name}")).startswith(
        ("ArgumentError: a run's name has at", "ArgumentError: name must")
    )


def test_a_working_folder_that_cannot_be_written_is_named_before_a_pool_is_started(ask, tmp_path):
    (tmp_path / "read-only").mkdir()
    mount = 'mount -t tmpfs -o ro tmpfs read-only && cd read-only && exec "$@"'
    told = ask(FIT.format("steps=1"), prefix=("unshare", "--mount", "sh", "-c", mount, "sh"))
    assert told == (
        f"ArgumentError: a run is kept in .dnb/runs of the working folder, {tmp_path}/read-only, and none can be made "
        "there (Read-only file system): os.chdir to a folder that you can write, and call it again"
    )


def test_a_soft_limit_of_files_is_raised_where_the_system_allows_it(ask):
    before = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 1024))"
    call = "from dnb.pool.host_checks import check_files; check_files(4)"
    seen = "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    assert ask(f"{call}; {seen}", before=before).splitlines()[0] == "(192, 1024)"
