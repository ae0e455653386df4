"""What a person reads of a finished checkpoint: the report, HTML and Markdown, and the model card for the hub."""
