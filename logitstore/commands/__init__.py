"""The command line. Only this package and `trainer.commands` end the process."""
