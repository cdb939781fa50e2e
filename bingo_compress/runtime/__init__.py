"""What every room stands on: the run folder, saves, processes, signals, the machine, the screen."""
