"""Files of compiled models."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load as load_safetensors

from graphwright.ir.errors import ArtifactError
from graphwright.runtime import artifact
from graphwright.runtime.executable import Executable
from graphwright.runtime.schedule import Buffer, View


@pytest.fixture
def path(example, tmp_path):
    target = tmp_path / "model.gw"
    extra = {"report.json": "{}", "ir/00-captured.txt": "text\n"}
    artifact.save(target, example.schedule, example.weights, example.signature, extra)
    return target


def rewrite(path, change):
    """Write a file anew with changed members; a change to None takes a member away."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members.update(change(members))
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            if data is not None:
                archive.writestr(name, data)


def changed_manifest(**changes):
    def change(members):
        manifest = json.loads(members["manifest.json"])
        return {"manifest.json": json.dumps(manifest | {k: f(manifest[k]) for k, f in changes.items()})}

    return change


def test_what_is_saved_comes_back(example, path):
    """A file gives back the schedule, the signature, the weights and the texts."""
    found = artifact.load(path)
    assert found.schedule == example.schedule
    assert found.signature.to_json() == example.signature.to_json()
    assert found.weights.keys() == example.weights.keys()
    assert all(torch.equal(found.weights[name], weight) for name, weight in example.weights.items())
    assert found.extra == {"report.json": "{}", "ir/00-captured.txt": "text\n"}
    assert found.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_a_loaded_model_computes_the_same(example, path):
    """The loaded program gives the same bits as the one that was saved."""
    found = artifact.load(path)
    run = Executable(found.schedule, found.weights, found.signature)
    x = torch.randn(2, 7, 24)
    assert all(torch.equal(a, b) for a, b in zip(run(x), example.executable()(x), strict=True))


def test_changing_loaded_weights_changes_no_file(example, path):
    """Weights share the file's memory, but not its contents when they are written to."""
    artifact.load(path).weights["first.weight"].fill_(0)
    assert torch.equal(artifact.load(path).weights["first.weight"], example.weights["first.weight"])


def test_the_same_model_gives_the_same_file(example, path, tmp_path):
    """Nothing in a file depends on when or where it is written."""
    again = tmp_path / "again.gw"
    found = artifact.load(path)
    artifact.save(again, found.schedule, found.weights, found.signature, found.extra)
    assert again.read_bytes() == path.read_bytes()


def test_weights_are_plain_safetensors(example, path):
    """The member with the weights can be read by the library of the format, and large tensors are aligned in the file."""
    with zipfile.ZipFile(path) as archive:
        found = load_safetensors(archive.read("weights.safetensors"))
    assert all(torch.equal(found[name], weight) for name, weight in example.weights.items())
    weights = artifact.load(path).weights
    assert all(w.data_ptr() % 64 == 0 for w in weights.values() if w.nbytes % 64 == 0)
    assert any(w.nbytes % 64 == 0 for w in weights.values())


def test_runs_in_a_process_without_the_compiler(example, path, tmp_path):
    """Loading and running imports no module that captures, rewrites or generates."""
    x = torch.randn(1, 5, 24)
    torch.save(x, tmp_path / "x.pt")
    script = f"""
import sys, torch
from graphwright.runtime import artifact
from graphwright.runtime.executable import Executable
from graphwright.runtime.schedule import Buffer, View
found = artifact.load({str(path)!r})
run = Executable(found.schedule, found.weights, found.signature)
torch.save(list(run(torch.load({str(tmp_path / "x.pt")!r}))), {str(tmp_path / "y.pt")!r})
wanted = ("graphwright.passes", "graphwright.codegen", "graphwright.capture", "graphwright.ir.program", "transformers", "onnx")
print([name for name in sys.modules if name.startswith(wanted)])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    found = torch.load(tmp_path / "y.pt")
    assert all(torch.equal(a, b) for a, b in zip(found, example.executable()(x), strict=True))


def test_a_failed_save_leaves_what_was_there(example, path, monkeypatch):
    """When writing breaks off, the old file is whole and no draft is left."""
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(artifact, "write_weights", fail)
    with pytest.raises(OSError, match="disk full"):
        artifact.save(path, example.schedule, example.weights, example.signature)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["model.gw"]


def test_a_save_replaces_a_file_that_is_in_use(example, path):
    """Weights loaded from a file stay when another model is saved over it."""
    found = artifact.load(path)
    zeros = {name: torch.zeros_like(weight) for name, weight in example.weights.items()}
    artifact.save(path, example.schedule, zeros, example.signature)
    assert torch.equal(found.weights["second.weight"], example.weights["second.weight"])


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "", "manifest.json", "kernels/scale.py", "a/../b"])
def test_extra_texts_have_plain_names(example, tmp_path, name):
    """A text cannot take the place of something else."""
    with pytest.raises(ArtifactError, match="name"):
        artifact.save(tmp_path / "x.gw", example.schedule, example.weights, example.signature, {name: ""})
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_artifact_is_refused(tmp_path):
    """Other files are refused as such."""
    path = tmp_path / "x.gw"
    path.write_bytes(b"")
    with pytest.raises(ArtifactError, match="not a whole compiled model"):
        artifact.load(path)
    path.write_bytes(b"PK" + b"0" * 1000)
    with pytest.raises(ArtifactError, match="not a whole compiled model"):
        artifact.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(ArtifactError, match="not a compiled model"):
        artifact.load(path)
    with pytest.raises(FileNotFoundError):
        artifact.load(tmp_path / "y.gw")


def test_truncated_files_are_refused(path):
    """A file that lost its end is refused, wherever it was cut."""
    data = path.read_bytes()
    for part in range(0, 20):
        path.write_bytes(data[: len(data) * part // 20])
        with pytest.raises(ArtifactError):
            artifact.load(path)


def test_damaged_files_are_refused(path):
    """A flipped bit anywhere is noticed, or does not matter."""
    data = path.read_bytes()
    before = artifact.load(path)
    refused = 0
    directory = data.rindex(b"PK\1\2")
    for at in (*range(3, directory, directory // 60), *range(directory, len(data))):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        try:
            found = artifact.load(path)
        except ArtifactError:
            refused += 1
            continue
        assert found.schedule == before.schedule
        assert all(torch.equal(found.weights[name], weight) for name, weight in before.weights.items())
    assert refused > 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {"weights.safetensors": m["weights.safetensors"][:-4] + b"abcd"}, "weights.safetensors is not what was"),
        (lambda m: {"kernels/scale.py": m["kernels/scale.py"] + b"\n"}, "kernels/scale.py is not what was written"),
        (lambda m: {"kernels/scale.py": None}, "parts are missing: kernels/scale.py"),
        (lambda m: {"kernels/evil.py": b"import os"}, "unknown parts: kernels/evil.py"),
        (lambda m: {"report.json": None}, "parts are missing: report.json"),
        (lambda m: {"manifest.json": b"[]"}, "not that of a compiled model"),
        (lambda m: {"manifest.json": b"{"}, "not a whole compiled model"),
        (changed_manifest(format=lambda n: 99), "the format is 99.*install a later one"),
        (changed_manifest(device=lambda d: "tpu"), "compiled for the device 'tpu'"),
        (changed_manifest(schedule=lambda s: s | {"inputs": ["nothing"]}), "no buffer 'nothing'"),
        (changed_manifest(schedule=lambda s: s | {"steps": 3}), "not the schedule"),
        (changed_manifest(schedule=lambda s: s | {"device": "cuda"}), "the device is 'cpu'"),
        (changed_manifest(signature=lambda s: {}), "not the signature"),
        (changed_manifest(members=lambda m: {}), "not that of a compiled model"),
    ],
)
def test_changed_files_are_refused(path, change, message):
    """A file whose parts do not fit each other is refused, and the message says what does not fit."""
    rewrite(path, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        artifact.load(path)
    assert str(path) in str(caught.value)


def test_kernels_that_are_more_than_kernels_are_refused(example, tmp_path):
    """A kernel source that would run something else is neither saved nor loaded."""
    evil = replace(example.schedule, kernels=dict(example.schedule.kernels, scale="import os\nos.abort()\n"))
    with pytest.raises(ArtifactError, match="kernel scale: kernel source, line 1"):
        artifact.save(tmp_path / "x.gw", evil, example.weights, example.signature)
    assert list(tmp_path.iterdir()) == []


def test_duplicate_members_are_refused(path):
    """A name that stands for two members is refused."""
    data = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(data, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("report.json", "[]")
    path.write_bytes(data.getvalue())
    with pytest.raises(ArtifactError, match="twice"):
        artifact.load(path)


def test_weights_of_every_kind_come_back(example, path, tmp_path):
    """Dtypes, empty and scalar tensors, and strides survive in value."""
    weights = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "half": torch.randn(7).half(),
        "bool": torch.tensor([True, False, True]),
        "i64": torch.arange(9).reshape(3, 3).T,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "fp8": torch.randn(16).to(torch.float8_e4m3fn),
        "negative zero": torch.tensor([-0.0, float("nan"), float("inf")]),
    }
    buffers = {
        f"w{k}": Buffer(f"w{k}", str(w.dtype).removeprefix("torch."), tuple(w.shape), w.contiguous().stride(), "weight", name)
        for k, (name, w) in enumerate(weights.items())
    }
    schedule = replace(
        example.schedule,
        dimensions={},
        inputs=(),
        steps=(),
        kernels={},
        buffers=buffers,
        outputs=tuple(View(name, b.shape, b.strides) for name, b in buffers.items()),
    )
    target = tmp_path / "w.gw"
    artifact.save(target, schedule, weights, example.signature)
    for name, found in artifact.load(target).weights.items():
        assert found.dtype == weights[name].dtype
        assert found.shape == weights[name].shape
        assert found.reshape(-1).view(torch.uint8).equal(weights[name].contiguous().reshape(-1).view(torch.uint8))
