"""A product for GPUs without sparse `wgmma`: Ampere and later, through jax-triton."""
