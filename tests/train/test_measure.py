"""dongpt/train/measure.py: shares of time, memory, and the speed of the hardware."""

from types import SimpleNamespace

import pytest
import torch

from dongpt import runtime
from dongpt.train import measure

smoke = pytest.mark.smoke


@smoke
def test_the_peak_of_tensors_is_what_is_held_at_once():
    def work():
        one = torch.ones(2**18)  # 1 MiB
        two = torch.ones(2**19)
        del one
        torch.ones(2**18)
        return two.sum()

    profile = measure.profile_calls(work, 2, runtime.start("cpu"))
    assert measure.peak_tensor_bytes(profile) == pytest.approx(3 * 2**20, rel=0.01)


def test_time_is_sorted_by_kinds_of_operations():
    rt, x = runtime.start("cpu"), torch.ones(400, 400)
    q = torch.ones(1, 2, 512, 64)
    for work, kind in (
        (lambda: [x @ x for _ in range(20)], "matmul"),
        (lambda: [x.exp() for _ in range(50)], "other"),
        (lambda: [torch.nn.functional.scaled_dot_product_attention(q, q, q) for _ in range(20)], "attention"),
    ):
        spent = measure.seconds_by_kind(measure.profile_calls(work, 3, rt), rt)
        shares = measure.time_shares(spent, 0.0, rt)
        assert shares[kind] > 0.7 and sum(shares.values()) == pytest.approx(1), (kind, shares)


@smoke
@pytest.mark.parametrize(
    "name, kind",
    [
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize96x128x32", "matmul"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_TNT", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>(Params)", "matmul"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, cutlass::bfloat16_t>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_sm80", "attention"),
        ("triton_tem_fused_mm_4", "matmul"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_0", "other"),
        ("triton_red_fused_addmm_gelu_2", "other"),
        ("void at::native::vectorized_elementwise_kernel<4>", "other"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "other"),
        ("Memcpy HtoD", "other"),
        ("aten::addmm", "matmul"),
        ("aten::addcmul", "other"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
    ],
)
def test_kernels_of_a_gpu_are_known_by_their_names(name, kind):
    assert measure.operation_kind(name) == kind


@smoke
def test_a_gpu_that_waits_does_something_else():
    spent, gpu, cpu = (
        {"matmul": 1.0, "attention": 1.0, "other": 2.0},
        SimpleNamespace(device_type="cuda"),
        SimpleNamespace(device_type="cpu"),
    )
    assert measure.time_shares(spent, 10.0, gpu) == {"matmul": 0.1, "attention": 0.1, "other": 0.8}
    assert measure.time_shares(spent, 3.0, gpu) == {"matmul": 0.25, "attention": 0.25, "other": 0.5}
    assert measure.time_shares(spent, 10.0, cpu) == {"matmul": 0.25, "attention": 0.25, "other": 0.5}
    assert measure.time_shares(None, 10.0, SimpleNamespace(device_type="mps")) is None


@smoke
def test_the_speed_of_a_product_counts_two_operations_a_weight(monkeypatch):
    looks = iter([0, 0, 2, 5, 5, 6, 20])  # two products, of 2 and of 1 s
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(looks)))
    assert measure.matmul_flops(runtime.start("cpu"), 10, 20, 30, seconds=10) == 2 * 10 * 20 * 30


def test_memory_is_read_at_some_gigabytes_a_second():
    assert 1e8 < measure.memory_bandwidth(runtime.start("cpu")) < 1e13
