"""Runs several trainings one after another in this process. The argument is a JSON list of argument lists."""

import json
import sys

from trainer.commands import train as train_command

if __name__ == "__main__":
    for argv in json.loads(sys.argv[1]):
        train_command.run(argv)
    train_command.end_process_group()
