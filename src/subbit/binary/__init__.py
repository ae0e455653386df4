"""The mathematics that the methods share: masks, scores, splits, scales, compensation, allocation."""
