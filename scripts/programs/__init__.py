"""Programs that are started and ended here: embedded servers and other processes."""
