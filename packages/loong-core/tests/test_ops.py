"""Choosing and binding ops: by name, by rank, with reasons, and errors that name what to do. No tensor library."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loong_core.errors import NotFound, PluginError, Unsupported
from loong_core.op_declarations import DECLARATIONS
from loong_core.ops import OPS, OpChoice, bind, choose
from loong_core.types import OpImpl, OpRequest

REQUEST = OpRequest(backend="cpu", dtype="float32", degrees={"cp": 1}, fields={})


def only_fp32(request):
    return None if request.dtype == "float32" else f"it computes in float32, not in {request.dtype}"


def broken(request):
    raise RuntimeError("boom")


def impl(name, rank=5, op="rms_norm", **more):
    return OpImpl(op=op, name=name, target="loong_core.references.norm:rms_norm", rank=rank, **more)


def test_every_declared_op_has_a_reference_that_resolves():
    ops = bind(OPS, REQUEST, {})
    assert set(ops.choices) == set(DECLARATIONS)
    for name in DECLARATIONS:
        assert callable(getattr(ops, name))
        assert ops.choices[name].name == "torch" and ops.choices[name].reason
    assert "rms_norm=torch" in repr(ops)


def test_the_reason_tells_what_was_passed_over():
    assert "transformer_engine passed over: it runs on backend cuda" in choose(OPS, REQUEST, {})["attention"].reason


def test_the_highest_rank_that_can_run_wins():
    rows = [*OPS, impl("fast"), impl("faster", rank=9, backends=frozenset({"cuda"}))]
    assert choose(rows, REQUEST, {})["rms_norm"].name == "fast"
    assert choose(rows, REQUEST._replace(backend="cuda"), {})["rms_norm"].name == "faster"


def test_a_named_one_is_taken_whatever_its_rank():
    chosen = choose([*OPS, impl("fast")], REQUEST, {"rms_norm": "torch"})
    assert chosen["rms_norm"] == OpChoice("rms_norm", "torch", "named in the recipe")


RESIDUAL = "residual_rms_norm"
BOTH = [impl("mine"), impl("mine", op=RESIDUAL)]


@pytest.mark.parametrize(
    ("rows", "choices", "name"),
    [
        (BOTH, {}, "mine"),
        (BOTH, {"rms_norm": "torch"}, "torch"),
        (BOTH, {"rms_norm": "torch", RESIDUAL: "mine"}, "mine"),
        ([impl("mine"), impl("other", op=RESIDUAL)], {"rms_norm": "mine"}, "other"),
        ([*BOTH, impl("other", 9, RESIDUAL)], {"rms_norm": "mine"}, "mine"),
        ([impl("mine"), impl("mine", op=RESIDUAL, backends=frozenset({"cuda"}))], {"rms_norm": "mine"}, "torch"),
    ],
)
def test_who_names_a_norm_names_it_where_its_input_is_handed_through_too(rows, choices, name):
    chosen = choose([*OPS, *rows], REQUEST, choices)[RESIDUAL]
    assert chosen.name == name
    assert ("as rms_norm" in chosen.reason) == (chosen.name == choices.get("rms_norm") and RESIDUAL not in choices)


def test_needs_are_checked_against_known_capabilities():
    rows = [*OPS, impl("wants", needs=frozenset({"fp8"}))]
    assert choose(rows, REQUEST, {}, frozenset({"fp8", "bf16"}))["rms_norm"].name == "wants"
    chosen = choose(rows, REQUEST, {}, frozenset({"bf16"}))["rms_norm"]
    assert chosen.name == "torch" and "lacks fp8" in chosen.reason


def test_supports_decides_with_a_reason():
    rows = [*OPS, impl("fast", supports=f"{__name__}:only_fp32")]
    assert choose(rows, REQUEST, {})["rms_norm"].name == "fast"
    chosen = choose(rows, REQUEST._replace(dtype="bfloat16"), {})["rms_norm"]
    assert chosen.name == "torch" and "fast passed over: it computes in float32, not in bfloat16" in chosen.reason


def test_a_named_one_that_cannot_run_is_an_error_with_its_reason_and_the_others():
    with pytest.raises(Unsupported) as caught:
        choose(OPS, REQUEST, {"attention": "transformer_engine"})
    text = str(caught.value)
    assert "ops.attention = transformer_engine" in text and "backend cuda, not on cpu" in text and "torch" in text


def test_equal_ranks_are_an_error_that_names_both():
    with pytest.raises(PluginError, match=r"one .*two.* same rank 5.*ops: \{rms_norm: one\}"):
        choose([*OPS, impl("one"), impl("two")], REQUEST, {})
    assert choose([*OPS, impl("one"), impl("two")], REQUEST, {"rms_norm": "two"})["rms_norm"].name == "two"


def test_unknown_names_are_all_reported_with_the_nearest():
    with pytest.raises(NotFound) as caught:
        choose(OPS, REQUEST, {"rmsnorm": "torch", "attention": "transformer_engin"})
    assert len(caught.value.problems) == 2
    assert "'rms_norm'" in caught.value.problems[0] and "'transformer_engine'" in caught.value.problems[1]


def test_no_implementation_at_all_is_an_error_with_every_reason():
    rows = [row for row in OPS if row.op != "rms_norm"]
    with pytest.raises(Unsupported, match="op rms_norm: no implementation can run.*none is installed"):
        choose(rows, REQUEST, {})
    with pytest.raises(Unsupported, match="fast: it runs on backend cuda"):
        choose([*rows, impl("fast", backends=frozenset({"cuda"}))], REQUEST, {})


def test_a_plugin_that_breaks_the_contract_is_named():
    with pytest.raises(PluginError, match="op 'nonesuch', which is not declared"):
        choose([*OPS, impl("x", op="nonesuch")], REQUEST, {})
    with pytest.raises(PluginError, match="RuntimeError: boom"):
        choose([*OPS, impl("x", supports=f"{__name__}:broken")], REQUEST, {})
    with pytest.raises(PluginError):
        bind([*OPS, OpImpl(op="rms_norm", name="x", target="loong_core.nowhere:f", rank=3)], REQUEST, {})


def test_choosing_needs_no_tensor_library():
    code = (
        "import sys; from loong_core.ops import OPS, choose; from loong_core.types import OpRequest;"
        "choose(OPS, OpRequest('cuda', 'bfloat16', {'cp': 1}, {}), {});"
        "bad = {'torch', 'numpy', 'megatron', 'transformer_engine'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
