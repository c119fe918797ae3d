"""Writes a target's distributions and models' losses into a store: `logitstore dump` as a script, for `ray job submit`.

ray job submit --working-dir . -- python jobs/dump_logits.py --store s3://bucket/cache.zarr --target MODEL --data DATA
"""

from logitstore.commands.dump import main
from logitstore.commands.user_errors import leave

if __name__ == "__main__":
    leave(main())
