import os
import sys
import warnings

import msgspec
import numpy as np
import pytest
import torch

from dnb.errors import ArgumentError
from dnb.protocol.run import Package, Settings
from dnb.transport.system.process_settings import (
    AppliedSettings,
    differing_packages,
    imported_packages,
    notebook_settings,
    without_variables,
)


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """Settings that are not those of a fresh process."""
    monkeypatch.setenv("COLOUR_OF_TEST", "blue")
    monkeypatch.chdir(tmp_path)
    before = torch.get_default_dtype(), torch.get_float32_matmul_precision(), np.geterr()
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("medium")
    np.seterr(divide="raise")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a .* word", category=np.exceptions.RankWarning, module="my_mod")
        yield notebook_settings()
    torch.set_default_dtype(before[0])
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(before[1])
    np.seterr(**before[2])


def look():
    return (
        torch.get_default_dtype(),
        torch.get_deterministic_debug_mode(),
        torch.get_float32_matmul_precision(),
        np.geterr()["divide"],
        os.environ.get("COLOUR_OF_TEST"),
        os.getcwd(),
        [(each[0], each[2]) for each in warnings.filters],
    )


def test_settings_survive_a_message_and_are_taken_back(changed, tmp_path, monkeypatch):
    expected = look()
    settings = msgspec.msgpack.decode(msgspec.msgpack.encode(changed), type=Settings)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    np.seterr(divide="warn")
    os.environ["COLOUR_OF_TEST"] = "red"
    os.chdir("/")
    warnings.resetwarnings()
    before = look()
    applied = AppliedSettings(settings)
    assert look() == expected
    assert applied.notes == []
    applied.take_back()
    assert look() == before


def test_a_variable_that_was_removed_is_removed(monkeypatch):
    monkeypatch.setenv("SHAPE_OF_TEST", "round")
    notebook_settings()
    monkeypatch.delenv("SHAPE_OF_TEST")
    settings = notebook_settings()
    assert settings.variables["SHAPE_OF_TEST"] is None
    monkeypatch.setenv("SHAPE_OF_TEST", "square")
    applied = AppliedSettings(settings)
    assert "SHAPE_OF_TEST" not in os.environ
    applied.take_back()
    assert os.environ["SHAPE_OF_TEST"] == "square"


def test_variables_by_which_a_process_was_started_are_not_sent(monkeypatch):
    for name in ("OMP_NUM_THREADS", "IPP_CONNECTION_INFO", "JPY_PARENT_PID"):
        monkeypatch.setenv(name, "12345")
    assert not {"OMP_NUM_THREADS", "IPP_CONNECTION_INFO", "JPY_PARENT_PID"} & notebook_settings().variables.keys()


def test_the_environment_is_in_no_file(changed):
    assert changed.variables["COLOUR_OF_TEST"] == "blue"
    assert without_variables(changed).variables == {}
    assert without_variables(None) is None


def test_a_hub_keeps_its_folder_and_its_warnings(changed):
    os.chdir("/")
    with warnings.catch_warnings():
        warnings.resetwarnings()
        applied = AppliedSettings(changed, everything=False)
        assert os.getcwd() == "/"
        assert warnings.filters == []
        applied.take_back()


def test_a_folder_that_is_not_there_is_said(changed, tmp_path):
    applied = AppliedSettings(msgspec.structs.replace(changed, folder="/not/there"))
    assert applied.notes == [
        "the notebook's folder /not/there cannot be used there (No such file or directory): files are read from "
        f"{tmp_path}"
    ]
    applied.take_back()


def test_a_deep_model_s_recursion_limit_is_raised_and_never_lowered(changed):
    before = sys.getrecursionlimit()
    applied = AppliedSettings(msgspec.structs.replace(changed, recursion_limit=before + 500))
    assert sys.getrecursionlimit() == before + 500
    applied.take_back()
    AppliedSettings(msgspec.structs.replace(changed, recursion_limit=50)).take_back()
    assert sys.getrecursionlimit() == before


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)])
def test_a_notebook_without_gradients_is_told(switch):
    with (
        switch(),
        pytest.raises(ArgumentError, match=r"gradients are switched off in this notebook .* outside of the block"),
    ):
        notebook_settings()


def test_fit_under_autocast_is_told_what_to_give():
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ArgumentError, match="precision='bfloat16'"):
        notebook_settings()


def test_packages_of_another_version_or_file_are_named(tmp_path):
    there = imported_packages()
    assert there["torch"] == Package(version=str(torch.__version__), file=torch.__file__)
    assert differing_packages(there) == ""
    assert differing_packages({}) == ""
    there["numpy"] = Package(version="0.1", file=np.__file__)
    (tmp_path / "msgspec.py").touch()
    (tmp_path / "link").symlink_to(torch.__file__)
    there["torch"] = Package(version=str(torch.__version__), file=str(tmp_path / "link"))
    there["msgspec"] = Package(version=msgspec.__version__, file=str(tmp_path / "msgspec.py"))
    told = differing_packages(there)
    assert f"numpy {np.__version__} (the notebook has 0.1)" in told
    assert f"msgspec from {msgspec.__file__} (the notebook's is {tmp_path}/msgspec.py)" in told
    assert "torch" not in told
    assert told.endswith("engines that are started anew (%dtrain shutdown, %dtrain start) import what is installed now")
