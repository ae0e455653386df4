"""Gradient descent on what a method chose: a decoder layer against its teacher, then the whole model."""
