"""C kernels, and how they are built at first use."""
