"""Running packed linears."""
