"""What this process, the machine and the other processes are to each other: errors, signals, files, the console."""
