"""Many query tokens a request."""
