"""What client and worker agree on: requests, results, errors, keys in Redis, signatures."""
