"""Zero-shot tasks for lm-evaluation-harness that read local files; the YAML files here are its task definitions."""
