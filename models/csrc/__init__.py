"""C kernels, built at first use."""
