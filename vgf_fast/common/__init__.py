"""What many modules share: files and locks, signals, memory, arrays, bounds; knows nothing of agents."""
