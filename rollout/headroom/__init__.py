"""Device memory that may still be taken: read from the driver or the kernel, never assumed."""
