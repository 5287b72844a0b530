"""The engine: processes and devices, optimiser, checkpoints, run folders, records. No contrast."""
