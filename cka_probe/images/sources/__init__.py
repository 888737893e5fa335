"""Where images come from: files, data sets, shards; read by number or in their own order."""
