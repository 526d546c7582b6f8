"""The model side: loading, paged KV memory, attention, sampling."""
