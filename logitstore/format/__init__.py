"""The on-disk format: specs, schemes, codes, arrays, commit records. Pure: no storage, no torch."""
