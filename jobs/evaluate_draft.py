"""Measures how often a target accepts a draft's tokens: `logitstore evaluate` as a script, for `ray job submit`.

ray job submit --working-dir . --entrypoint-num-gpus 1 -- python jobs/evaluate_draft.py --draft MODEL --store URL
"""

from logitstore.commands.user_errors import leave
from trainer.commands.evaluate import main

if __name__ == "__main__":
    leave(main())
