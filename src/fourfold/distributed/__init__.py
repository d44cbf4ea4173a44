"""Several GPUs, by PyTorch's own engines: FSDP2 (`fully_shard`) and DDP over packed experts."""
