"""A simulated Ascend under the real torch_npu. So far: reference kernels of torch_npu's own operators.

Imports nothing of the packages that are tested with it, and torch_npu only when asked to register the kernels.
"""
