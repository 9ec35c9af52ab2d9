"""What a worker shows to operators: probes, metrics, traces."""
