"""Signatures: checking calls, containers of results, and JSON."""

from __future__ import annotations

import collections
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphwright.ir.containers import Constant, Container, Leaf, build, describe, from_data, to_data
from graphwright.ir.errors import ArtifactError, InputError
from graphwright.ir.signature import Parameter, Range, Signature, TensorSpec, evaluate

KIND = "positional_or_keyword"


def make(results=None):
    return Signature(
        parameters=(
            Parameter("ids", KIND),
            Parameter("mask", KIND, None, True),
            Parameter("use_cache", KIND, None, True),
            Parameter("scale", KIND, 1.0, True),
        ),
        arguments={
            "ids": Leaf(0),
            "mask": Leaf(1),
            "use_cache": Constant(False),
            "extra": Container("dict", "", ("a", "b"), (Leaf(2), Constant(3))),
        },
        tensors=(
            TensorSpec("ids", torch.int64, "cpu", ("batch", "tokens")),
            TensorSpec("mask", torch.bool, "cpu", ("batch", "tokens")),
            TensorSpec("extra.a", torch.float32, "cpu", ("2*tokens + 1", 4)),
        ),
        dimensions={"batch": Range(0, None), "tokens": Range(1, 8)},
        results=results or Leaf(0),
    )


def arguments(batch=2, tokens=3, **changes):
    good = {
        "ids": torch.zeros(batch, tokens, dtype=torch.int64),
        "mask": torch.ones(batch, tokens, dtype=torch.bool),
        "extra": {"b": 3, "a": torch.zeros(2 * tokens + 1, 4)},
    }
    return {name: value for name, value in {**good, **changes}.items() if value is not ...}


def test_a_good_call_gives_its_tensors_in_flat_order():
    """Positions and names in any order give the same tensors; constants and defaults may be passed or left out."""
    signature, given_ = make(), arguments()
    expected = [given_["ids"], given_["mask"], given_["extra"]["a"]]
    for args, kwargs in (
        ((), given_),
        ((given_["ids"],), {"extra": given_["extra"], "mask": given_["mask"]}),
        ((given_["ids"], given_["mask"], False, 1.0), {"extra": given_["extra"]}),
        ((), {**given_, "use_cache": False, "scale": 1}),
    ):
        found = signature.flatten(args, kwargs)
        assert all(a is b for a, b in zip(found, expected, strict=True))
    assert signature.check(expected) == {"batch": 2, "tokens": 3}
    signature.flatten((), arguments(batch=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": ...}, "'ids' is missing"),
        ({"ids": ..., "idz": torch.zeros(1)}, "'ids' is missing \\('idz' is not an argument"),
        ({"maks": 1}, "no argument 'maks'. Did you mean 'mask'"),
        ({"mask": None}, "mask: expected a tensor, bool.batch, tokens. on cpu, and found NoneType"),
        ({"mask": [1]}, "mask: expected a tensor"),
        ({"ids": torch.zeros(2, 3)}, "ids: wrong dtype: expected int64.batch, tokens. on cpu, and found float32.2, 3."),
        ({"ids": torch.zeros(2, 3, dtype=torch.int64, device="meta")}, "ids: wrong device"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "ids: wrong rank"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask: dimension 1 is 4, and 'tokens' is 3 in ids"),
        ({"extra": {"a": torch.zeros(7, 5), "b": 3}}, r"extra\.a: dimension 1 must be 4"),
        ({"extra": {"a": torch.zeros(8, 4), "b": 3}}, r"extra\.a: dimension 0 must be 2\*tokens \+ 1 = 7, and is 8"),
        ({"extra": {"a": torch.zeros(7, 4), "b": 4}}, r"extra\.b=4: the model was captured with extra\.b=3"),
        ({"extra": {"a": torch.zeros(7, 4)}}, "extra: expected a dict of a, b, and found a dict of a"),
        ({"extra": [torch.zeros(7, 4), 3]}, "extra: expected a dict"),
        ({"use_cache": True}, "use_cache=True: the model was captured with use_cache=False"),
        ({"scale": 2.0}, r"scale=2\.0: the model was captured without 'scale'"),
        ({"scale": torch.ones(2)}, "scale=a tensor of shape"),
    ],
)
def test_a_wrong_call_is_refused_with_what_was_expected(changes, message):
    """Every way in which a call can differ from the capture has its own message."""
    with pytest.raises(InputError, match=message):
        make().flatten((), arguments(**changes))


def test_wrong_sizes_and_positions():
    """Sizes out of range, too many positional arguments and arguments passed twice are refused."""
    with pytest.raises(InputError, match="ids \\(dimension 1\\): 'tokens' must be from 1 to 8, and is 9"):
        make().flatten((), arguments(tokens=9))
    given_ = arguments()
    with pytest.raises(InputError, match="5 positional arguments"):
        make().flatten((given_["ids"], given_["mask"], False, 1.0, 2), {})
    with pytest.raises(InputError, match="'ids' was passed twice"):
        make().flatten((given_["ids"],), given_)


Pair = collections.namedtuple("Pair", ["first", "second"])


def leaf(path, value):
    del path
    return Leaf(value) if type(value) is int else None


plain = st.none() | st.booleans() | st.text(max_size=3) | st.floats(allow_nan=False)
nested = st.recursive(
    st.integers(0, 9) | plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
        | st.tuples(inner, inner).map(lambda pair: Pair(*pair))
        | st.dictionaries(st.text(max_size=3), inner, max_size=3).map(collections.OrderedDict)
    ),
    max_leaves=8,
)


@given(nested)
def test_containers_survive_json(value):
    """Any nesting of containers is described, written, read and built to an equal value of the same types."""
    structure = describe(value, leaf)
    read = from_data(json.loads(json.dumps(to_data(structure))))
    assert read == structure
    for found in (build(structure, range(10)), build(read, range(10))):
        assert found == value
        assert type(found).__name__ == type(value).__name__


def test_signatures_survive_json():
    """A signature that was written and read checks and names as before."""
    signature = make(Container("tuple", "", (), (Leaf(0), Constant(torch.float16), Constant(torch.device("cpu")))))
    read = Signature.from_json(signature.to_json())
    for name in ("parameters", "arguments", "tensors", "dimensions", "results"):
        assert getattr(read, name) == getattr(signature, name)
    assert read.unflatten([7]) == (7, torch.float16, torch.device("cpu"))
    with pytest.raises(InputError, match="from 1 to 8"):
        read.flatten((), arguments(tokens=9))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"parameters": 3}',
        make().to_json().replace('"leaf": 0', '"leaf": "x"'),
        make().to_json().replace("int64", "nn"),
    ],
)
def test_other_text_is_no_signature(text):
    """What is not a signature is refused as such."""
    with pytest.raises(ArtifactError):
        Signature.from_json(text)


def test_a_name_in_a_file_runs_nothing():
    """A result type that is not a container, such as a function, is not called."""
    found = build(from_data({"kind": "dataclass", "name": "os:system", "keys": ["x"], "children": [{"leaf": 0}]}), ["true"])
    assert (type(found).__name__, found.x) == ("system", "true")
    assert build(Container("list", "subprocess:Popen", (), (Leaf(0),)), ["true"]) == ["true"]
    with pytest.raises(InputError):
        evaluate("__import__('os').getpid()", {})


def test_results_without_the_model_s_code(tmp_path):
    """A process that does not know the type gives fields by attribute, key and position, under the type's name."""
    structure = Container("dataclass", "nowhere.models:Output", ("loss", "logits", "more"), (Constant(None), Leaf(0), Leaf(1)))
    (tmp_path / "signature.json").write_text(make(structure).to_json())
    script = (
        "import pathlib, sys\n"
        "from graphwright.ir.signature import Signature\n"
        "found = Signature.from_json(pathlib.Path('signature.json').read_text()).unflatten([1, 2])\n"
        "assert type(found).__name__ == 'Output' and found.logits == found['logits'] == found[0] == 1, found\n"
        "assert found.loss is None and found.to_tuple() == (1, 2) and list(found) == ['logits', 'more'] and len(found) == 2\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=60)


def test_outputs_of_transformers_are_made_again():
    """A ModelOutput that was written and read is of its own class."""
    from transformers.modeling_outputs import BaseModelOutput

    output = BaseModelOutput(last_hidden_state=torch.ones(1), hidden_states=(torch.ones(2),))
    leaves = []

    def tensor(path, value):
        del path
        if isinstance(value, torch.Tensor):
            leaves.append(value)
            return Leaf(len(leaves) - 1)
        return None

    read = from_data(json.loads(json.dumps(to_data(describe(output, tensor)))))
    found = build(read, leaves)
    assert type(found) is BaseModelOutput
    assert found.to_tuple()[0] is output.last_hidden_state
    assert found.hidden_states == output.hidden_states
    assert found.attentions is None
