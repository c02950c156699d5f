import pytest
import torch

from distillery.system.allocation import is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cudaErrorMemoryAllocation: out of device memory"),
    ],
)
def test_every_way_to_run_out_of_memory_is_recognised(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "text",
    ["CUDA error: an illegal memory access was encountered", "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
     "CUDA error: CUBLAS_STATUS_INVALID_VALUE", "mat1 and mat2 shapes cannot be multiplied"],
)  # fmt: skip
def test_other_errors_are_not_taken_for_it(text):
    assert not is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize("library", ["CUBLAS", "CUDNN"])
def test_a_library_that_was_not_initialised_lacked_memory_only_where_the_gpu_is_full(monkeypatch, library):
    error = RuntimeError(f"CUDA error: {library}_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")
    assert not is_out_of_memory(error)  # there is no GPU that could be full
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, expected in ((100 << 20, True), (10 << 30, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 80 << 30))
        assert is_out_of_memory(error) is expected

    def answer_nothing():
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "mem_get_info", answer_nothing)
    assert not is_out_of_memory(error)
