"""What lies on the storage: the geometry of lease areas and every record in them, byte for byte sanlock's."""
