"""What this machine can do, measured and kept."""

from __future__ import annotations

import json

import pytest
import torch

from graphwright.runtime import machine


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder for what is measured, and nothing remembered."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(machine, "_MEASURED", {})
    monkeypatch.setattr(machine, "_FAR_BYTES", 8 << 20)
    return tmp_path


def test_measured_once_and_kept(folder, monkeypatch) -> None:
    """The first call measures rates that a CPU can have, later ones and other processes read them."""
    found = machine.this_machine()
    assert found.measured
    assert 1e8 < found.flops_per_second < 1e14
    assert 1e8 < found.bytes_per_second < 1e13
    assert 0 < found.call_us < 1000
    assert set(found.efficiency) == {"attention", "rest"}
    assert all(ratio > 0 for ratio in found.efficiency.values())
    monkeypatch.setattr(machine, "measure_thread", lambda: pytest.fail("measured again"))
    assert machine.this_machine() == found
    machine._MEASURED.clear()
    assert machine.this_machine() == found


def test_a_damaged_file_is_measured_anew(folder) -> None:
    """What is not whole, or of another version, is no measurement."""
    machine.this_machine()
    (path,) = (folder / "machine").glob("*.json")
    whole = json.loads(path.read_text())
    for text in ("{", "[]", json.dumps(whole | {"format": 0}), json.dumps(whole | {"more": 1}), json.dumps({"format": 1})):
        path.write_text(text)
        machine._MEASURED.clear()
        assert machine.this_machine().measured
        assert json.loads(path.read_text()).keys() == whole.keys()


def test_an_unwritable_folder_is_no_error(folder, monkeypatch) -> None:
    """Without a place to keep it, it is measured and used."""
    (folder / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "file"))
    assert machine.this_machine().measured


def test_threads(folder) -> None:
    """Several threads compute more, memory serves two, and a call costs what it costs; PyTorch's threads stay as they are."""
    before = torch.get_num_threads()
    one = machine.measure_thread()
    assert torch.get_num_threads() == before
    four = machine.with_threads(one, 4)
    assert four.flops_per_second == 4 * one.flops_per_second
    assert four.bytes_per_second == 2 * one.bytes_per_second
    assert four.call_us == one.call_us
    assert four.name.endswith("4 threads")
