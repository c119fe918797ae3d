"""What a Ray cluster has room for, and functions that run on its workers."""
