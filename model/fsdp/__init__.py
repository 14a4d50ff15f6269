"""A model that FSDP2 has cut into parts: how they are written, read and put together."""
