"""Several real hosts: guests with their own kernels and clocks, which share storage and are cut off from it."""
