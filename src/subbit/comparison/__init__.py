"""Many recipes on one model, one after the other, and what came of it as a table and as figures."""
