"""Device types, HCCL settings and what error codes mean; the only room besides kernels that spells npu and hccl."""
