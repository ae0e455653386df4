"""Calibration: the text that methods see, and the statistics gathered from it."""
