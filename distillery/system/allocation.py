"""Recognise an allocation that failed, whoever says so: torch, the CPU's allocator, CUDA or one of its libraries."""

import contextlib
import re

import torch

# what CUDA and its libraries say; torch has an error of its own for its GPU allocator alone
_ON_GPU = re.compile(
    r"out of memory|cudaErrorMemoryAllocation|CU(BLAS|DNN|SOLVER|SPARSE)_STATUS_(\w+_)?ALLOC\w*_FAILED"
)
# a library that finds no room for its workspace says that it was not initialised
_NO_WORKSPACE = re.compile(r"CU(BLAS|DNN|SOLVER|SPARSE)_STATUS_NOT_INITIALIZED")
_SMALL_WORKSPACE = 512 << 20


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the CPU or on the GPU, in torch or in one of CUDA's libraries."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error) or is_out_of_gpu_memory(error)


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Whether an allocation on the GPU failed."""
    if isinstance(error, torch.OutOfMemoryError) or _ON_GPU.search(str(error)):
        return True
    return _NO_WORKSPACE.search(str(error)) is not None and _is_gpu_full()


def _is_gpu_full() -> bool:
    """Whether the present GPU has too little memory left for a library's workspace."""
    with contextlib.suppress(RuntimeError):  # after some errors CUDA answers nothing any more
        return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < _SMALL_WORKSPACE
    return False
