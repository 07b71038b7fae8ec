"""Who computes what: process groups, layouts, and what megatron-core needs where there is no CUDA."""
