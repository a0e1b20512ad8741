"""Floating-point operations of a model's own matmuls, and what devices can do at most: the two halves of MFU.

Counted is what the model's mathematics asks for: active and shared experts, the latents of attention, router
and head. Not counted is what an implementation adds: recomputed layers, logits made twice, rows computed and
masked. A multiply-add is two operations. Checked against torch's FlopCounterMode on transformers' own models.
"""

from __future__ import annotations

from typing import Any

from lightning_npu_tp.estimates.model_sizes import ModelSizes

_FORWARD_AND_BACKWARD = 3

# Dense bf16 matrix TFLOP/s of one device, from the vendors' data sheets; Ascend: cube cores x frequency x 8192.
# A name is found if it begins with the key, the longest one first.
_PEAKS = {
    "Ascend910B1": 373.88,
    "Ascend910B2": 353.89,
    "Ascend910B3": 294.91,
    "Ascend910B4": 245.76,
    "Ascend910_9392": 353.89,
    "NVIDIA A100": 311.9,
    "NVIDIA A800": 311.9,
    "NVIDIA A40": 149.7,
    "NVIDIA A10": 125.0,
    "NVIDIA A10G": 70.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40": 181.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA H20": 148.0,
    "NVIDIA H100": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H800": 989.4,
    "NVIDIA H200": 989.4,
    "NVIDIA B200": 2250.0,
    "NVIDIA GeForce RTX 3090": 71.0,
    "NVIDIA GeForce RTX 4090": 165.2,
}


def forward_flops_per_token(config: Any, length: int, *, causal: bool = False) -> float:
    """Operations of one token's forward pass in a sequence of `length` tokens.

    config: transformers config of a supported family.
    causal: count the half of the attention matrix that a causal mask leaves. Kernels compute between half and all of
            it; the literature's MFU mostly counts all.
    Raises AttributeError for a config that is no decoder's.
    """
    sizes = ModelSizes.of(config)
    seen = (length + 1) / 2 if causal else length
    scores = sizes.heads * (sizes.key_dim + sizes.value_dim) * seen
    dense_mlp = 3 * sizes.hidden * sizes.dense_width
    multiplies = (
        sizes.layers * (_projections(sizes) + scores)
        + (sizes.layers - sizes.sparse_layers) * dense_mlp
        + sizes.sparse_layers * _sparse_mlp(sizes)
        + sizes.hidden * sizes.vocabulary
    )
    return 2 * multiplies


def training_flops_per_token(config: Any, length: int, *, causal: bool = False) -> float:
    """Operations of one token's forward and backward pass: the gradients of inputs and weights cost a forward each."""
    return _FORWARD_AND_BACKWARD * forward_flops_per_token(config, length, causal=causal)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations per second of a device by its name, as the driver tells it; None for an unknown one."""
    # "NVIDIA A10" must not claim an A100, nor "Ascend910B" of one card that of another.
    found = [name for name in _PEAKS if device_name == name or device_name.startswith((f"{name} ", f"{name}-"))]
    return _PEAKS[max(found, key=len)] * 1e12 if found else None


def _projections(sizes: ModelSizes) -> int:
    """Multiply-adds of one token in the projections of one attention layer."""
    queries, values = sizes.heads * sizes.key_dim, sizes.heads * sizes.value_dim
    output = values * sizes.hidden
    if not sizes.kv_latent:
        return sizes.hidden * (queries + sizes.key_heads * (sizes.key_dim + sizes.value_dim)) + output
    from_hidden = sizes.hidden * queries
    query = sizes.hidden * sizes.q_latent + sizes.q_latent * queries if sizes.q_latent else from_hidden
    down = sizes.hidden * (sizes.kv_latent + sizes.rope_dim)
    up = sizes.kv_latent * sizes.heads * (sizes.key_dim - sizes.rope_dim + sizes.value_dim)
    return query + down + up + output


def _sparse_mlp(sizes: ModelSizes) -> int:
    """Multiply-adds of one token in one mixture layer: router, its picks, shared experts."""
    active = sizes.picks * sizes.expert_width + sizes.shared_width
    return sizes.hidden * (sizes.experts + 3 * active + int(sizes.shared_gate))
