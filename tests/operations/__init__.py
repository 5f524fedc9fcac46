"""The mirror's operations, called directly, without a mount."""
