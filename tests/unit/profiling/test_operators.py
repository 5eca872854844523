import pytest

from hasten.profiling.operators import OTHER, group_of, group_times
from hasten.runtimes.base import OperatorSample

KNOWN = {
    "linear": "aten::addmm aten::mm aten::mv aten::linear aten::matmul aten::_weight_int8pack_mm "
    "aten::_weight_int4pack_mm_for_cpu aten::_dyn_quant_matmul_4bit mkldnn::_linear_pointwise "
    "onednn::qlinear_pointwise "
    "MatMulNBits MatMulInteger DynamicQuantizeLinear Gemm",
    "attention": "aten::_scaled_dot_product_flash_attention_for_cpu aten::scaled_dot_product_attention aten::bmm "
    "aten::_softmax GroupQueryAttention MultiHeadAttention",
    "norm": "aten::rms_norm aten::_fused_rms_norm aten::rsqrt aten::pow aten::mean SimplifiedLayerNormalization "
    "SkipSimplifiedLayerNormalization",
    "rotary": "aten::cos aten::sin aten::neg RotaryEmbedding",
    "activation": "aten::silu aten::gelu aten::silu_ Sigmoid QuickGelu",
    "cache": "aten::index_copy_ aten::index_put_",
    "sampling": "aten::argmax aten::topk aten::multinomial aten::sort",
    "copies and casts": "aten::copy_ aten::_to_copy aten::to aten::clone aten::cat Cast Concat MemcpyToHost aten::item",
    "views and allocation": "aten::view aten::_unsafe_view aten::reshape aten::t aten::transpose aten::slice "
    "aten::select aten::empty aten::as_strided Transpose Reshape",
    OTHER: "aten::mul aten::add aten::embedding aten::index_select aten::index Gather Mul fake::next_token",
}


@pytest.mark.parametrize(("name", "group"), [(name, group) for group, names in KNOWN.items() for name in names.split()])
def test_operators_are_in_the_group_a_reader_expects(name: str, group: str) -> None:
    assert group_of(name) == group


def test_prefill_cancels() -> None:
    prefill = [OperatorSample("aten::mm", 5.0, 10), OperatorSample("aten::rsqrt", 1.0, 1)]
    long = [
        OperatorSample("aten::mm", 5.0 + 2.0, 10 + 40),
        OperatorSample("aten::addmm", 1.0, 20),
        OperatorSample("aten::rsqrt", 0.9, 1),
        OperatorSample("aten::argmax", 0.5, 10),
    ]
    linear, sampling = group_times(prefill, long, 10)
    assert (linear.group, linear.time_s, linear.calls) == ("linear", pytest.approx(0.3), pytest.approx(6))
    assert (sampling.group, sampling.time_s, sampling.calls) == ("sampling", pytest.approx(0.05), pytest.approx(1))


def test_nothing_traced_is_no_group() -> None:
    assert group_times((), (), 32) == []
