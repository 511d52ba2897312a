"""Symbols of all ages: upgraded as MXNet does it, and never trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from branchgraph.ir.errors import FormatError, MissingError
from branchgraph.mx import symbol_file
from branchgraph.mx.operators import Operator
from branchgraph.mx.symbol_file import Entry, Symbol, load_symbol, read_symbol, user_attributes
from branchgraph.mx.translate import translate
from tests.goldens import golden

FORMATS = "mxnet/formats"
RECORDED = [
    "plain_d5_v08", "plain_d5_v010", "cross_d14_v08", "cross_d14_v010", "attributes",
    "hidden_keys_v08",
]  # fmt: skip
UPGRADED = ["plain_d5_v08", "cross_d14_v08", "hidden_keys_v08"]


def recorded(name: str) -> Symbol:
    return load_symbol(golden(f"{FORMATS}/{name}-symbol.json"))


def description(name: str) -> dict[str, Any]:
    listed = json.loads(golden(f"{FORMATS}/formats.json").read_text())["symbols"]
    return next(d for d in listed if d["file"] == f"{name}-symbol.json")


@pytest.mark.parametrize("name", RECORDED)
def test_names_come_in_mxnets_order(name: str) -> None:
    symbol, expected = recorded(name), description(name)
    assert symbol.argument_names() == [n for n, _ in expected["arguments"]]
    assert symbol.auxiliary_names() == [n for n, _ in expected["auxiliary_states"]]
    assert symbol.output_names() == [n for n, _ in expected["outputs"]]


@pytest.mark.parametrize("name", RECORDED)
def test_shapes_follow_from_the_data(name: str) -> None:
    expected = description(name)
    (data, shape), *_ = expected["arguments"]
    translation = translate(recorded(name), {data: shape})
    arguments = [[n, list(v.shape)] for n, v in translation.arguments]
    assert arguments == expected["arguments"]
    assert [[n, list(v.shape)] for n, v in translation.auxiliary] == expected["auxiliary_states"]
    outputs = [[n, list(v.shape)] for n, v in translation.graph.outputs.items()]
    assert outputs == expected["outputs"]


@pytest.mark.parametrize("name", UPGRADED)
def test_old_symbols_are_upgraded_as_mxnet_does_it(name: str) -> None:
    ours, theirs = recorded(name), recorded(f"{name}_upgraded_by_1.9.1")
    assert [(n.name, n.attributes) for n in ours.nodes] == [
        (n.name, n.attributes) for n in theirs.nodes
    ]
    assert (ours.nodes, ours.heads) == (theirs.nodes, theirs.heads)


@pytest.mark.parametrize("name", ["attributes", "hidden_keys_v08"])
def test_attributes_are_those_that_mxnet_lists(name: str) -> None:
    symbol = recorded(name)
    for node in symbol.nodes:
        listed = description(name)["attr_dict"].get(node.name, {})
        plain = {k[2:-2]: v for k, v in user_attributes(node).items()}
        mirrored = {k: v for k, v in listed.items() if k not in plain}
        assert dict(node.attributes) == mirrored, node.name


def test_visible_outputs_are_those_of_mxnet() -> None:
    symbol = recorded("attributes")
    internals = [n for number in symbol.walk() for n in symbol.nodes[number].output_names]
    assert internals == description("attributes")["internals"]


# -- made here -----------------------------------------------------------------------------------


def variable(name: str, **attributes: str) -> dict[str, Any]:
    return {"op": "null", "name": name, "attrs": attributes, "inputs": []}


def node(op: str, name: str, inputs: list[Any], **attributes: str) -> dict[str, Any]:
    return {"op": op, "name": name, "attrs": attributes, "inputs": inputs}


def symbol_of(*nodes: dict[str, Any], **changes: Any) -> dict[str, Any]:
    variables = [i for i, n in enumerate(nodes) if n.get("op") == "null"]
    made = {
        "nodes": list(nodes),
        "arg_nodes": variables,
        "heads": [[len(nodes) - 1, 0, 0]],
        "attrs": {"mxnet_version": ["int", 10901]},
    }
    return {**made, **changes}


def read(content: Any) -> Symbol:
    return read_symbol(json.dumps(content))


FLAT = symbol_of(variable("data"), node("Flatten", "flat", [[0, 0, 0]]))


def test_entries_have_two_or_three_numbers() -> None:
    two = symbol_of(variable("data"), node("Flatten", "flat", [[0, 0]]), heads=[[1, 0]])
    assert read(two) == read(FLAT)
    assert read(FLAT).nodes[1].inputs == (Entry(0, 0),)


def test_two_variables_may_share_a_name() -> None:
    twins = symbol_of(variable("a"), variable("a"), node("elemwise_add", "sum", [[0, 0], [1, 0]]))
    assert read(twins).argument_names() == ["a", "a"]


@pytest.mark.parametrize(
    ("alias", "canonical"),
    [("_Plus", "elemwise_add"), ("_mul", "elemwise_mul"), ("_Power", "_power"),
     ("_Maximum", "_maximum"), ("broadcast_minus", "broadcast_sub"), ("_Div", "elemwise_div")],
)  # fmt: skip
def test_aliases_are_the_operators_they_name(alias: str, canonical: str) -> None:
    twins = symbol_of(variable("a"), node(alias, "y", [[0, 0], [0, 0]]))
    operator = read(twins).nodes[1].operator
    assert operator is not None
    assert operator.spelling == canonical


def test_every_alias_of_the_specification_is_known() -> None:
    aliases = """_Plus _plus _add _Minus _minus _sub _Mul _mul _Div _div _Power _Maximum _Minimum
        _PlusScalar _MinusScalar _RMinusScalar _MulScalar _DivScalar _RDivScalar _PowerScalar
        _RPowerScalar _MaximumScalar _MinimumScalar ElementWiseSum concat split reshape flatten
        stop_gradient identity cast pad swapaxes crop Softmax broadcast_plus broadcast_minus
        sum_axis max_axis min_axis CuDNNBatchNorm BatchNorm_v1 Convolution_v1 Pooling_v1"""
    assert not [a for a in aliases.split() if a not in Operator.registry]
    assert Operator.registry["crop"] is not Operator.registry["Crop"]


def test_a_minus_one_axis_meant_all_before_0_9_5() -> None:
    def axis(version: int) -> Any:
        attrs = {"mxnet_version": ["int", version]}
        largest = node("argmax", "best", [[0, 0]], axis="-1")
        operator = read(symbol_of(variable("data"), largest, attrs=attrs)).nodes[1].operator
        return operator.axis  # type: ignore[union-attr]

    assert (axis(904), axis(905)) == (None, -1)


def test_a_suffixed_key_goes_to_the_variable_or_stays() -> None:
    dense = node("FullyConnected", "fc", [[0, 0], [1, 0], [2, 0]], num_hidden="3",
                 weight_lr_mult="0.5")  # fmt: skip
    old = symbol_of(variable("x"), variable("w"), variable("b"), dense, attrs={})
    assert read(old).nodes[1].attributes == {"__lr_mult__": "0.5"}
    dense["attrs"]["gamma_lr_mult"] = "0.5"
    with pytest.raises(FormatError, match="no parameter 'gamma_lr_mult'"):
        read(old)


def test_a_newer_symbol_is_read_with_a_warning() -> None:
    newer = symbol_of(*FLAT["nodes"], attrs={"mxnet_version": ["int", 20000]})
    with pytest.warns(UserWarning, match="newer than 10901"):
        assert read(newer).nodes == read(FLAT).nodes


REFUSED: list[tuple[str, Any, str]] = [
    ("a list", [], "a symbol is an object"),
    ("no nodes", {"heads": [], "arg_nodes": []}, "no 'nodes'"),
    ("no heads", {k: v for k, v in FLAT.items() if k != "heads"}, "no 'heads'"),
    ("empty heads", {**FLAT, "heads": []}, "'heads' is empty"),
    ("no arg_nodes", {k: v for k, v in FLAT.items() if k != "arg_nodes"}, "no 'arg_nodes'"),
    ("arg_nodes", {**FLAT, "arg_nodes": [9]}, "names node 9; there are 2"),
    ("unknown key", {**FLAT, "extra": 1}, "the key 'extra'; known are"),
    ("unknown node key", symbol_of({**variable("x"), "shape": "()"}), "the key 'shape'"),
    ("nameless", symbol_of({"op": "null", "inputs": []}), "node 0 has no 'name'"),
    ("number value", symbol_of({**variable("x"), "attrs": {"a": 1}}), "is a text, got '1'"),
    ("list of attributes", symbol_of({**variable("x"), "attrs": []}), "is an object"),
    ("forward", symbol_of(variable("x"), node("Flatten", "y", [[2, 0]])), "reads node 2, but"),
    ("cycle", symbol_of(node("Flatten", "y", [[0, 0]])), "reads node 0, but nodes come after"),
    ("negative", symbol_of(variable("x"), node("Flatten", "y", [[-1, 0]])), "reads node -1"),
    ("negative output", symbol_of(variable("x"), node("Flatten", "y", [[0, -1]])), "output -1"),
    ("boolean", symbol_of(variable("x"), node("Flatten", "y", [[False, 0]])), "an integer"),
    ("four numbers", symbol_of(variable("x"), node("Flatten", "y", [[0] * 4])), "two or three"),
    ("output", symbol_of(variable("x"), node("Flatten", "y", [[0, 1]])), "output 1 of 'x'"),
    ("head", {**FLAT, "heads": [[1, 3, 0]]}, "output 3 of 'flat' is read; it has 1"),
    ("operator", symbol_of(variable("x"), node("Foo", "y", [[0, 0]])), "no operator 'Foo'; known"),
    ("parameter", symbol_of(variable("x"), node("Flatten", "y", [[0, 0]], axis="1")), "'axis'"),
    ("missing", symbol_of(variable("x"), node("Convolution", "y", [[0, 0]])), "kernel is missing"),
    ("count", symbol_of(variable("x"), node("Flatten", "y", [])), "takes 1 inputs"),
    ("operands", symbol_of(variable("x"), node("Concat", "y", [[0, 0]], num_args="99999")), "1 to"),
    ("outputs", symbol_of(variable("x"), node("split", "y", [[0, 0]], num_outputs="-1")), "1 to"),
    ("state", symbol_of(variable("x"), node("Flatten", "f", [[0, 0]]),
                        node("BatchNorm", "bn", [[1, 0]] * 5)), "moving_mean of 'bn' is a state"),
    ("variable with inputs", symbol_of(variable("x"), node("null", "y", [[0, 0]])), "has inputs"),
    ("subgraphs", symbol_of({**variable("x"), "subgraphs": [{}]}), "sub-graphs"),
    ("version", {**FLAT, "attrs": {"mxnet_version": 3}}, "is a pair"),
    ("version text", {**FLAT, "attrs": {"mxnet_version": ["int", "3"]}}, "an integer"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "rule"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_is_no_symbol_is_refused(content: Any, rule: str) -> None:
    with pytest.raises(FormatError, match=rule) as refusal:
        read(content)
    assert len(str(refusal.value)) < 3000


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[" * 100_000, b'{"nodes": ' + b"9" * 10_000, b"NaN"]
)
def test_what_is_no_json_is_refused(content: bytes) -> None:
    with pytest.raises(FormatError, match=r"^bad"):
        read_symbol(content, "bad")


def test_sizes_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, rule in (
        ("LARGEST_FILE", "more than 1 bytes"),
        ("MOST_NODES", "at most 1 are read"),
        ("MOST_ENTRIES", "more than 1 inputs"),
    ):
        with monkeypatch.context() as context:
            context.setattr(symbol_file, limit, 1)
            twice = symbol_of(variable("x"), node("_Plus", "y", [[0, 0], [0, 0]]))
            with pytest.raises(FormatError, match=rule):
                read(twice)


def test_a_long_chain_is_walked_without_recursion() -> None:
    chain = [variable("x"), *(node("negative", f"n{i}", [[i, 0]]) for i in range(5000))]
    assert len(list(read(symbol_of(*chain)).walk())) == 5001


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="there is no such file"):
        load_symbol(tmp_path / "net-symbol.json")
