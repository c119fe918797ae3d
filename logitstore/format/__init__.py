"""The on-disk format: specs, schemes, codes, arrays, commit records. Nothing here does I/O or imports torch."""
