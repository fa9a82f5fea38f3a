"""The machine: devices, threads, processes, memory, files, locks, signals, progress."""
