"""The model's parts that need numpy only: configuration, prompt, source, action tokens, files."""
