"""Lease storage and time as they really are, for the engine: files and devices by O_DIRECT, boot time."""
