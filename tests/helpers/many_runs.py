"""Runs several trainings one after another in this process. The argument is a JSON list of argument lists."""

import json
import sys

import torch

from trainer.commands import train as train_command

if __name__ == "__main__":
    for argv in json.loads(sys.argv[1]):
        train_command.run(argv)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
