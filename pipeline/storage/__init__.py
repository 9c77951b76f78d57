"""Local folders and `s3://` prefixes behind one small protocol: whole-or-nothing writes, ranges, retries.

Three variables are read: LATHE_STORAGE_RETRY_SECONDS, how long a silent or busy S3 server is waited for (60; a quarter
of it is how long an object may be silent); LATHE_STORAGE_MIN_KIB_PER_SECOND, the rate below which a request is made
again (16; 0 = any); and LATHE_S3_PART_MIB, the size of the parts that larger files travel in (32, at least 5).
"""

from pipeline.storage.base import GIVE_UP_VARIABLE, RETRY_VARIABLE, Entry, OpenFile, Store
from pipeline.storage.lease import LEASE, RENEWED_SECONDS, Holder, Lease, holder
from pipeline.storage.shards import ShardAddress, find_shard_entries, find_shards
from pipeline.storage.stream import Stream, open_stream
from pipeline.storage.temporary import temporary_folder
from pipeline.storage.traffic import counters
from pipeline.storage.urls import fetch_folder, local_path, open_store, read_file, split

__all__ = [
    "GIVE_UP_VARIABLE",
    "LEASE",
    "RENEWED_SECONDS",
    "RETRY_VARIABLE",
    "Entry",
    "Holder",
    "Lease",
    "OpenFile",
    "ShardAddress",
    "Store",
    "Stream",
    "counters",
    "fetch_folder",
    "find_shard_entries",
    "find_shards",
    "holder",
    "local_path",
    "open_store",
    "open_stream",
    "read_file",
    "split",
    "temporary_folder",
]
