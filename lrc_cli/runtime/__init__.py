"""The machine: devices, threads, processes, files, progress."""
