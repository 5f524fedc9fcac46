"""lockfs is killed while programs work on its mount: they see a pause and nothing else."""
