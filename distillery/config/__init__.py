"""The three YAML files: every key with its meaning, reading them, and errors that say what to type."""
