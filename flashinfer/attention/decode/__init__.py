"""One query token a request."""
