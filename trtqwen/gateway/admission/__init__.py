"""Authentication, rates, limits and the queue."""
