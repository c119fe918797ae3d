"""Trains a draft from a store: `logitstore train` as a script, for `ray job submit` and torchrun.

ray job submit --working-dir . -- python jobs/train_draft.py --store URL --draft MODEL --output_dir URL --num_workers 8
torchrun --nproc_per_node 8 jobs/train_draft.py --store URL --draft MODEL --output_dir DIR
"""

from logitstore.commands.user_errors import leave
from trainer.commands.train import main

if __name__ == "__main__":
    leave(main())
