"""The three YAML files: every key with its meaning, the reader, and error messages that name the fix."""
