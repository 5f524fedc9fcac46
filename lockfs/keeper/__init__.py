"""The lease keeper: which opens need a lease, one lease per image and host, grants and refusals."""
