"""The models to compress: their tensors (`source`), their layers (`layout`), one layer at a time (`streaming`)."""
