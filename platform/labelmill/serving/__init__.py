"""Using registered models: a folder of one on this machine, prediction over shards, an HTTP server."""
