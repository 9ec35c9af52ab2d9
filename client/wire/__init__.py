"""What client and worker agree on: requests, results, errors, Redis keys, signatures, and how to reach Redis."""
