"""From stores to batches: the order of documents, packing, sharding over ranks, reading ahead. Knows no model."""
