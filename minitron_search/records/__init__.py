"""Keep what a run leaves on disk: paths, logs, the run directory, the content cache, buckets, the console."""
