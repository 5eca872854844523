from collections.abc import Sequence

import pytest

from hasten.profiling.kernels import groups_of, kernel_group
from hasten.profiling.timeline import Work

KNOWN = {
    "attention": [
        "decode_attention",
        "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4>>(Flash_fwd_params)",
        "void pytorch_flash::flash_fwd_splitkv_combine_kernel<...>(pytorch_flash::Flash_fwd_params)",
        "fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x64x128_4x1x1_kernel0_0",
    ],
    "linear": [
        "stream_linear",
        "_int8_matmul_kernel",
        "nvjet_tst_64x8_64x16_2x1_v_bz_TNT",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4, false>",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_warpgroupsize1x1x1_execute_segment_k_off",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16, __nv_bfloat16, float>",
    ],
    "norm": [
        "_rms_norm_kernel",
        "_rms_norm_fp8_kernel",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float>>>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::rsqrt_kernel_cuda(at::TensorIteratorBase&)>",
    ],
    "rotary": [
        "_rotate_and_write_kernel",
        "void at::native::vectorized_elementwise_kernel<4, at::native::neg_kernel_cuda>",
    ],
    "activation": ["_silu_mul_kernel", "void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>"],
    "sampling": [
        "greedy_tiles",
        "find_intervals",
        "finish",
        "_sample_rows_kernel",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>>>",
    ],
    "copies": [
        "_begin_kernel",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<at::native::OpaqueType<2u>>",
        "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>",
    ],
    "quantization": ["_quantize_fp8_kernel"],
    "other": [
        "void finishing_touch",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
    ],
}


@pytest.mark.parametrize(("name", "group"), [(name, group) for group, names in KNOWN.items() for name in names])
def test_kernels_are_in_the_group_a_reader_expects(name: str, group: str) -> None:
    assert kernel_group(name) == group


def work_of(names: Sequence[str], ranges: tuple[str, ...] = ()) -> list[Work]:
    return [Work(name, index, index + 0.5, False, 1, None, ranges) for index, name in enumerate(names)]


def test_products_are_named_by_their_place_between_attention_kernels() -> None:
    layer = ["stream_linear", "_decode_attention", "stream_linear", "stream_linear", "stream_linear"]
    step = [*layer, *layer, "stream_linear", "_greedy"]
    named = ["qkv", "attention", "o", "gate_up", "down"]
    assert groups_of(work_of([*step, *step])) == [*named, *named, "head", "sampling"] * 2


def test_separate_projections_and_second_kernels_of_a_product_are_named_too() -> None:
    attention = ["flash_fwd_splitkv_kernel", "flash_fwd_splitkv_combine_kernel"]
    layer = ["gemv", "nvjet", "splitKreduce_kernel", "gemv", "_rotate", *attention, *["gemv"] * 4]
    named = ["qkv", "qkv", "qkv", "qkv", "rotary", "attention", "attention", "o", "gate_up", "gate_up", "down"]
    assert groups_of(work_of([*layer, *layer, "gemv"])) == [*named, *named, "head"]


def test_products_in_unknown_numbers_stay_linear() -> None:
    names = ["stream_linear", "_decode_attention", "stream_linear", "stream_linear", "_decode_attention"]
    assert groups_of(work_of(names)) == ["qkv", "attention", "linear", "linear", "attention"]


@pytest.mark.parametrize(
    ("kernel", "ranges", "group"),
    [
        ("gemv", ("decode", "module model", "module k_proj"), "qkv"),
        ("gemv", ("decode", "module lm_head"), "head"),
        ("elementwise_add", ("decode", "module input_layernorm"), "norm"),
        ("elementwise_mul", ("decode", "module self_attn"), "rotary"),
        ("CatArrayBatchedCopy", ("decode", "module self_attn"), "copies"),
        ("flash_fwd", ("decode", "module self_attn"), "attention"),
        ("elementwise_mul", ("decode", "module mlp"), "activation"),
        ("elementwise_add", ("decode", "module 3"), "other"),
        ("elementwise_mul", ("sampling",), "sampling"),
        ("_decode_attention", ("decode",), "attention"),
    ],
)
def test_a_module_or_phase_tells_more_than_a_kernels_name(kernel: str, ranges: tuple[str, ...], group: str) -> None:
    assert groups_of(work_of([kernel], ranges)) == [group]
