"""The command line. Only code in this package and in `trainer.commands` ends the process."""
