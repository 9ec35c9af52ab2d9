"""Takes messages out of Redis without losing any, and validates them."""
