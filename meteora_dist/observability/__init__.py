"""What operators see of a service: metrics, traces, and one log line a request."""
