"""Local folders and `s3://` prefixes behind one small protocol: whole-or-nothing writes, ranges, retries."""

from pipeline.storage.base import Entry, Store
from pipeline.storage.urls import fetch_folder, find_shards, local_path, open_store, read_file, split

__all__ = ["Entry", "Store", "fetch_folder", "find_shards", "local_path", "open_store", "read_file", "split"]
