"""The mixture-of-experts layer: router, balance losses, dispatch, experts, and the block that joins them."""
