"""What a worker shows of itself: probes, metrics, traces."""
