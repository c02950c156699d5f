"""The process and its machine: errors, signals, files, the console, other processes."""
