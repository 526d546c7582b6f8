"""Headroom: device memory that may still be allocated, as the driver or the kernel reports it."""
