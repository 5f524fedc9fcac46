"""The lease storage: real files and devices, stuck threads, buffers that stay, descriptors that go."""
