"""What the allocators of torch_npu and CUDA say when memory runs out, as users meet it."""

NPU_TEXT = (
    "NPU out of memory. Tried to allocate 2.00 GiB (NPU 0; 61.25 GiB total capacity; 40.50 GiB already allocated; "
    "40.50 GiB current active; 764.00 MiB free; 44.25 GiB reserved in total by PyTorch)"
)
CUDA_TEXT = (
    "CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 79.25 GiB of which 256.00 MiB is "
    "free. Process 7 has 78.75 GiB memory in use. Of the allocated memory 77.00 GiB is allocated by PyTorch, and "
    "1.25 GiB is reserved by PyTorch but unallocated."
)
