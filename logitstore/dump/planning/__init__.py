"""What a dump would take, before it runs: documents, bytes, hours and price."""
