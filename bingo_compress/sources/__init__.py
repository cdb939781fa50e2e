"""Where images come from: folders, lists, tar shards, zip files, Parquet. Each lists what it holds and opens it."""
