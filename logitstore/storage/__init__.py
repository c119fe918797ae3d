"""Bytes at a URL: local folders and buckets, retries, credentials, and a local cache."""
