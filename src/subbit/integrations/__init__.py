"""Where subbit meets other libraries."""
