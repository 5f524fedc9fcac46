"""Several real hosts: guests with kernels and clocks of their own, which share storage and lose it."""
